"""Layouts that a training could have, and the cheapest that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from nemo_convert.architecture import Architecture
from recipes.planning.estimate import Estimate, estimate, memory
from recipes.planning.hardware import Hardware
from recipes.planning.workload import Layout, Workload, split_axes

HEADROOM = 0.92
"""Share of a device's memory that a proposal may take: the estimate is good to a few percent."""
PARALLEL_SIZES = (1, 2, 4, 8)
LONG = 32768
"""Tokens of a window from which the sequence itself is worth splitting."""


@dataclass(frozen=True)
class Proposal:
    """A layout, and what the job would cost on it."""

    job: Workload
    estimate: Estimate


def fits_shape(arch: Architecture, layout: Layout) -> bool:
    """Whether a model can be split that way: what ``parallelism`` has rules for."""
    return (
        all(getattr(arch, axis) % layout.tensor == 0 for axis in (*split_axes(arch), "vocab_size"))
        and arch.num_layers >= layout.pipeline
        and (layout.expert == 1 or bool(arch.num_moe_experts))
        and arch.num_moe_experts % layout.expert == 0
        and layout.data * layout.context % layout.expert == 0
    )


def fits(job: Workload, hardware: Hardware) -> bool:
    """Whether a job can be built on its layout and has room there."""
    layout, models = job.layout, [m for m in (job.trained, job.teacher) if m is not None]
    if layout.data == 0 or job.global_batch_size % (layout.data * layout.micro_batch_size):
        return False
    if job.seq_length % (layout.tensor * 2 * layout.context):
        return False
    if layout.data * layout.context % (layout.optimizer_instances * layout.expert):
        return False
    if not all(fits_shape(arch, layout) for arch in models):
        return False
    room = HEADROOM * hardware.memory_of_rank(layout.devices)
    return memory(job, hardware).total <= room


def candidates(job: Workload, devices: int, node: int) -> Iterator[Workload]:
    """The job on every layout of so many devices, ``node`` to a node at most."""
    per_node = min(devices, node)
    contexts = PARALLEL_SIZES if job.seq_length >= LONG else (1,)
    moe = job.trained is not None and job.trained.num_moe_experts
    tensors = [size for size in PARALLEL_SIZES if size <= per_node]
    # Which layers are on the last stage, and whether they hold what is compared, was checked for
    # the job's own layout alone.
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
    """The cheapest layout of so many devices that fits; the simplest of equally cheap ones."""
    found = [
        Proposal(candidate, estimate(candidate, hardware))
        for candidate in candidates(job, devices, node)
        if fits(candidate, hardware)
    ]
    return min(found, key=lambda p: round(p.estimate.device_hours, 3), default=None)


def proposals(job: Workload, hardware: Hardware, node: int = 8) -> list[Proposal]:
    """The best layout of each number of devices up to the job's own, the cheapest first."""
    most, devices, found = max(job.layout.ranks, node), 1, []
    while devices <= most:
        if (proposal := best(job, hardware, devices, node)) is not None:
            found.append(proposal)
        devices *= 2
    if most & (most - 1) and (proposal := best(job, hardware, most, node)) is not None:
        found.append(proposal)
    return sorted(found, key=lambda p: p.estimate.dollars)
