"""Checks Megatron's parallel sizes, and proposes the cheapest layouts that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from nemo_convert.architecture import Architecture
from recipes.planning import rules
from recipes.planning.hardware import Hardware
from recipes.planning.rules import Problem, has_error
from recipes.planning.training_cost import TrainingCost, peak_memory, training_cost
from recipes.planning.workload import Layout, Workload, split_axes, workloads_of_shapes

GEMM_MULTIPLE = 16
"""cuBLASLt's FP8 GEMMs need every dimension to be a multiple of 16. bfloat16 needs 8."""
USABLE_MEMORY_FRACTION = 0.92
"""Fraction of a device's memory that a proposal may use. Estimates are off by a few percent."""
PARALLEL_SIZES = (1, 2, 4, 8)
"""Sizes that proposals try for each type of parallelism and for micro batches."""
LONG_SEQUENCE = 32768
"""Tokens from which context parallelism is worth trying."""


def shape_layout_problems(
    workload: Workload, shapes: Sequence[Architecture], hardware: Hardware
) -> list[Problem]:
    """Checks a layout for every shape that the trained model may have.

    Returns:
        The problems of the largest shape that has errors; without errors, those of the largest.
    """
    first, *others = (
        list(layout_problems(w, hardware)) for w in workloads_of_shapes(workload, shapes)
    )
    return next(filter(has_error, [first, *others]), first)


def layout_problems(workload: Workload, hardware: Hardware) -> Iterator[Problem]:
    """Checks a layout against the ranks, the models, the sequences and the batch."""
    layout = workload.layout
    yield from _rank_problems(workload)
    yield from _context_problems(workload, hardware)
    if layout.sequence_parallel and workload.seq_length % layout.tensor:
        yield Problem(
            rules.SEQUENCE_PARALLEL,
            f"seq_length={workload.seq_length} is not divisible by TP={layout.tensor}",
            "set sequence_parallel=false, or another seq_length",
        )
    # If the teacher itself is trained, its problems are reported once.
    models = {"teacher": workload.teacher, "student": workload.trained}
    if workload.trained == workload.teacher:
        del models["student"]
    for role, arch in models.items():
        if arch is not None:
            yield from _shape_problems(layout, role, arch)
    if "student" in models and workload.trained is not None:
        yield from _alignment_problems(layout, workload.trained)


def _rank_problems(workload: Workload) -> Iterator[Problem]:
    layout, batch = workload.layout, workload.global_batch_size
    if layout.data == 0:  # one replica needs more ranks, or does not divide them
        sizes = f"TP={layout.tensor} x PP={layout.pipeline}"
        sizes += f" x CP={layout.context}" if layout.context > 1 else ""
        yield Problem(
            rules.RANKS,
            f"{layout.ranks} rank(s) cannot be split into {sizes}",
            f"set resources.devices to a multiple of {layout.replica_ranks}",
        )
    elif batch % (step := layout.data * layout.micro_batch_size):
        yield Problem(
            rules.BATCH,
            f"global_batch_size={batch} is not a multiple of DP={layout.data} x "
            f"micro_batch_size={layout.micro_batch_size}",
            f"use a multiple of {step}",
        )
    if layout.data and layout.tensor > layout.devices:
        yield Problem(
            rules.TENSOR_NODES,
            f"TP={layout.tensor} spans nodes, which have {layout.devices} device(s) each",
            f"set tensor_model_parallel_size to a divisor of {layout.devices}",
        )
    # Megatron splits the optimizer's state over data- and context-parallel ranks.
    dp_cp_ranks, instances = layout.data * layout.context, layout.optimizer_instances
    if dp_cp_ranks % (instances * layout.expert) and instances > 1:
        experts = f" with EP={layout.expert}" if layout.expert > 1 else ""
        max_instances = max(1, dp_cp_ranks // layout.expert)
        yield Problem(
            rules.OPTIMIZER_INSTANCES,
            f"{dp_cp_ranks} data-parallel rank(s){experts} cannot be split into {instances} groups",
            f"set num_distributed_optimizer_instances to a divisor of {max_instances}",
        )


def _context_problems(workload: Workload, hardware: Hardware) -> Iterator[Problem]:
    context = workload.layout.context
    if context == 1:
        return
    if not hardware.on_gpu:
        yield Problem(
            rules.CONTEXT_PARALLEL,
            f"context_parallel_size={context} needs a GPU, but hardware={hardware.name}: only "
            "TransformerEngine's attention supports it",
            "set context_parallel_size=1, or set hardware to your GPU's profile",
        )
    if workload.seq_length % (2 * context):
        yield Problem(
            rules.CONTEXT_PARALLEL,
            f"seq_length={workload.seq_length} cannot be split into two chunks for each of "
            f"CP={context} ranks",
            f"use a multiple of {2 * context}",
        )


def _expert_problems(layout: Layout, role: str, shape: Architecture) -> Iterator[Problem]:
    expert, experts = layout.expert, shape.num_moe_experts
    replicas = layout.data * layout.context
    if expert == 1:
        return
    if not experts or experts % expert:
        yield Problem(
            rules.EXPERT_PARALLEL,
            f"the {role}'s {experts} experts cannot be split over EP={expert} ranks",
            f"set expert_model_parallel_size to {f'a divisor of {experts}' if experts else 1}",
        )
    elif replicas % expert:
        yield Problem(
            rules.EXPERT_PARALLEL,
            f"experts are split over DP x CP = {replicas} ranks, not a multiple of EP={expert}",
            "lower expert_model_parallel_size",
        )


def _shape_problems(layout: Layout, role: str, shape: Architecture) -> Iterator[Problem]:
    tensor = layout.tensor
    for axis in split_axes(shape):
        if (size := getattr(shape, axis)) % tensor:
            yield Problem(
                rules.TENSOR_PARALLEL,
                f"the {role}'s {axis}={size} is not divisible by TP={tensor}",
                "lower tensor_model_parallel_size",
            )
    if shape.vocab_size % tensor:
        yield Problem(
            rules.VOCABULARY,
            f"the {role}'s vocab_size={shape.vocab_size} is not divisible by TP={tensor}",
            "lower tensor_model_parallel_size",
        )
    if shape.num_layers < layout.pipeline:
        yield Problem(
            rules.PIPELINE_PARALLEL,
            f"the {role} has {shape.num_layers} layers, fewer than PP={layout.pipeline}",
            f"set pipeline_model_parallel_size to at most {shape.num_layers}",
        )
    if shape.num_moe_experts and tensor > 1 and not layout.sequence_parallel:
        yield Problem(
            rules.SEQUENCE_PARALLEL,
            f"Megatron does not train experts at TP={tensor} without sequence parallelism",
            "set sequence_parallel=true",
        )
    yield from _expert_problems(layout, role, shape)


def _alignment_problems(layout: Layout, student: Architecture) -> Iterator[Problem]:
    """Checks the sizes of the GEMMs on each rank. ``_shape_problems`` reports indivisible sizes."""
    # Each axis, with the number of ranks that it is split over.
    for axis, ranks in (("hidden_size", 1), (split_axes(student)[-1], layout.tensor)):
        size = getattr(student, axis)
        if size % ranks == 0 and size // ranks % GEMM_MULTIPLE:
            where = f" is {size // ranks} on each of TP={ranks} ranks," if ranks > 1 else " is"
            yield Problem(
                rules.SLOW_SIZES,
                f"the student's {axis}={size}{where} not a multiple of {GEMM_MULTIPLE}",
                f"prune to a multiple of {GEMM_MULTIPLE * ranks}",
            )


# Proposals


@dataclass(frozen=True)
class Proposal:
    """A workload with a proposed layout, and its cost."""

    workload: Workload
    cost: TrainingCost


def fits(workload: Workload, hardware: Hardware) -> bool:
    """Returns whether a workload's layout is valid and fits into memory."""
    layout = workload.layout
    if has_error(layout_problems(workload, hardware)):
        return False
    # A context-parallel rank holds two chunks of a sequence. Sequence parallelism splits each.
    # Without context parallelism, the factor 2 is stricter than necessary.
    if workload.seq_length % (2 * layout.tensor * layout.context):
        return False
    available = USABLE_MEMORY_FRACTION * hardware.memory_of_rank(layout.devices)
    return peak_memory(workload, hardware).total <= available


def workloads_on_all_layouts(
    workload: Workload, devices: int, node_size: int
) -> Iterator[Workload]:
    """Yields the workload on every layout of ``devices`` devices, ``node_size`` on each node."""
    per_node = min(devices, node_size)
    # A cache has the logits of whole sequences, so context parallelism is refused.
    is_long = workload.seq_length >= LONG_SEQUENCE and not workload.teacher_is_cached
    contexts = PARALLEL_SIZES if is_long else (1,)
    moe = workload.trained is not None and workload.trained.num_moe_experts
    tensors = [size for size in PARALLEL_SIZES if size <= per_node]
    # A loss on hidden states forbids recomputation. The layers that it compares were checked only
    # for the configured pipeline size.
    pipelines = (workload.layout.pipeline,) if workload.compares_hidden_states else PARALLEL_SIZES
    recomputed = ("none",) if workload.compares_hidden_states else ("none", "full")
    micros = PARALLEL_SIZES
    if workload.trained is None:
        # A teacher's forward pass can only have tensor parallelism, without sequence parallelism.
        # Large micro batches come first, so that the largest that fits is proposed.
        pipelines, contexts, recomputed, micros = (1,), (1,), ("none",), PARALLEL_SIZES[::-1]
    for tensor, pipeline, context, expert, micro, recompute_granularity in product(
        tensors, pipelines, contexts, PARALLEL_SIZES if moe else (1,), micros, recomputed
    ):
        layout = Layout(
            nodes=devices // per_node,
            devices=per_node,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            expert=expert,
            optimizer_instances=workload.layout.optimizer_instances,
            micro_batch_size=micro,
            sequence_parallel=tensor > 1 and workload.trained is not None,
            recompute_granularity=recompute_granularity,
        )
        yield replace(workload, layout=layout)


def cheapest_proposal(
    workload: Workload, hardware: Hardware, devices: int, node_size: int
) -> Proposal | None:
    """Returns the cheapest layout of ``devices`` devices that fits into memory.

    If several are equally cheap, ``min`` returns the first: that with the smallest parallel sizes.
    """
    fitting = [
        Proposal(candidate, training_cost(candidate, hardware))
        for candidate in workloads_on_all_layouts(workload, devices, node_size)
        if fits(candidate, hardware)
    ]
    return min(fitting, key=lambda p: round(p.cost.device_hours, 3), default=None)


def proposals(workload: Workload, hardware: Hardware, node_size: int = 8) -> list[Proposal]:
    """Returns the cheapest layout of each number of devices, the lowest price first.

    The numbers are all powers of 2 up to the workload's ranks, or up to ``node_size`` if that is
    more, and this maximum itself.
    """
    maximum = max(workload.layout.ranks, node_size)
    numbers = sorted({maximum, *(2**n for n in range(maximum.bit_length()))})
    cheapest = [cheapest_proposal(workload, hardware, devices, node_size) for devices in numbers]
    return sorted((p for p in cheapest if p is not None), key=lambda p: p.cost.dollars)
