"""Layouts that a training could have, and the cheapest that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from recipes.planning.hardware import Hardware
from recipes.planning.parallelism import layout_problems
from recipes.planning.rules import ERROR
from recipes.planning.training_cost import TrainingCost, peak_memory, training_cost
from recipes.planning.workload import Layout, Workload

HEADROOM = 0.92
"""Fraction of a device's memory that a proposal may use: estimates are off by a few percent."""
PARALLEL_SIZES = (1, 2, 4, 8)
LONG_SEQUENCE = 32768
"""Tokens from which context parallelism is worth trying."""


@dataclass(frozen=True)
class Proposal:
    """A workload on another layout, and its cost there."""

    job: Workload
    cost: TrainingCost


def fits(job: Workload, hardware: Hardware) -> bool:
    """Whether a workload can be built on its layout and fits into memory."""
    layout = job.layout
    if any(problem.rule.severity == ERROR for problem in layout_problems(job, hardware)):
        return False
    if job.seq_length % (2 * layout.tensor * layout.context):
        return False
    available = HEADROOM * hardware.memory_of_rank(layout.devices)
    return peak_memory(job, hardware).total <= available


def candidates(job: Workload, devices: int, node: int) -> Iterator[Workload]:
    """Yields the workload on every layout of ``devices`` devices, at most ``node`` on a node."""
    per_node = min(devices, node)
    contexts = PARALLEL_SIZES if job.seq_length >= LONG_SEQUENCE else (1,)
    moe = job.trained is not None and job.trained.num_moe_experts
    tensors = [size for size in PARALLEL_SIZES if size <= per_node]
    # The layers whose hidden states are compared were checked for the given pipeline only.
    pipelines = (job.layout.pipeline,) if job.compares_hidden_states else PARALLEL_SIZES
    recomputed = ("none",) if job.compares_hidden_states else ("none", "full")
    for tensor, pipeline, context, expert, micro, recompute_granularity in product(
        tensors, pipelines, contexts, PARALLEL_SIZES if moe else (1,), PARALLEL_SIZES, recomputed
    ):
        layout = Layout(
            nodes=devices // per_node,
            devices=per_node,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            expert=expert,
            optimizer_instances=job.layout.optimizer_instances,
            micro_batch_size=micro,
            sequence_parallel=tensor > 1,
            recompute_granularity=recompute_granularity,
        )
        yield replace(job, layout=layout)


def best(job: Workload, hardware: Hardware, devices: int, node: int) -> Proposal | None:
    """Returns the cheapest layout of ``devices`` devices that fits, the simplest of equal ones."""
    found = [
        Proposal(candidate, training_cost(candidate, hardware))
        for candidate in candidates(job, devices, node)
        if fits(candidate, hardware)
    ]
    return min(found, key=lambda p: round(p.cost.device_hours, 3), default=None)


def proposals(job: Workload, hardware: Hardware, node: int = 8) -> list[Proposal]:
    """Returns the best layout of each number of devices up to the workload's, cheapest first."""
    most = max(job.layout.ranks, node)
    numbers = sorted({most, *(2**n for n in range(most.bit_length()))})
    found = [best(job, hardware, devices, node) for devices in numbers]
    return sorted((p for p in found if p is not None), key=lambda p: p.cost.dollars)
