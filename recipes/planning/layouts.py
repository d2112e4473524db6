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
"""Fraction of a device's memory that a proposal may use; estimates are off by a few percent."""
PARALLEL_SIZES = (1, 2, 4, 8)
"""Sizes that proposals try for each type of parallelism and for micro batches."""
LONG_SEQUENCE = 32768
"""Sequence length in tokens from which proposals also try context parallelism."""


def shape_layout_problems(
    workload: Workload, shapes: Sequence[Architecture], hardware: Hardware
) -> list[Problem]:
    """Checks a layout for every shape that the trained model may have, the largest first.

    Returns the problems of the first shape that has an error. If no shape has an error, returns the
    warnings of the first shape.
    """
    problems_by_shape = [
        list(layout_problems(workload_of_shape, hardware))
        for workload_of_shape in workloads_of_shapes(workload, shapes)
    ]
    return next(filter(has_error, problems_by_shape), problems_by_shape[0])


def layout_problems(workload: Workload, hardware: Hardware) -> Iterator[Problem]:
    """Checks that a layout can split ranks, models, sequences and batch."""
    layout = workload.layout
    yield from _rank_problems(workload)
    yield from _context_problems(workload, hardware)
    if layout.sequence_parallel and workload.seq_length % (layout.tensor * layout.context):
        sizes = f"TP={layout.tensor}"
        sizes += f" x CP={layout.context}" if layout.context > 1 else ""
        yield Problem(
            rules.SEQUENCE_PARALLEL,
            f"seq_length={workload.seq_length} is not divisible by {sizes}",
            "set sequence_parallel=false, or another seq_length",
        )
    if not hardware.on_gpu and layout.tensor > 1 and layout.expert > 1:
        yield Problem(
            rules.EXPERT_PARALLEL,
            f"TP={layout.tensor} with EP={layout.expert} needs a GPU, but hardware="
            f"{hardware.name}: gloo cannot gather different numbers of tokens from ranks",
            "set one of the two to 1, or set hardware to your GPU's profile",
        )
    trained, teacher = workload.trained, workload.teacher
    if teacher is not None:
        yield from _shape_problems(layout, "teacher", teacher, trains=trained is not None)
    # If the run trains the teacher itself, the shape was checked above.
    if trained is not None and trained != teacher:
        yield from _shape_problems(layout, "student", trained, trains=True)
        yield from _alignment_problems(layout, trained)


def _rank_problems(workload: Workload) -> Iterator[Problem]:
    layout, batch = workload.layout, workload.global_batch_size
    has_whole_replicas = layout.data > 0
    micro_batch_of_all_replicas = layout.data * layout.micro_batch_size
    if not has_whole_replicas:
        sizes = f"TP={layout.tensor} x PP={layout.pipeline}"
        sizes += f" x CP={layout.context}" if layout.context > 1 else ""
        yield Problem(
            rules.RANKS,
            f"{layout.ranks} rank(s) cannot be split into {sizes}",
            f"set resources.devices to a multiple of {layout.replica_ranks}",
        )
    elif batch % micro_batch_of_all_replicas:
        yield Problem(
            rules.BATCH,
            f"global_batch_size={batch} is not a multiple of DP={layout.data} x "
            f"micro_batch_size={layout.micro_batch_size}",
            f"use a multiple of {micro_batch_of_all_replicas}",
        )
    if has_whole_replicas and layout.tensor > layout.devices:
        yield Problem(
            rules.TENSOR_NODES,
            f"TP={layout.tensor} spans nodes, which have {layout.devices} device(s) each",
            f"set tensor_model_parallel_size to a divisor of {layout.devices}",
        )
    # Megatron splits the optimizer's state over data- and context-parallel ranks.
    dp_cp_ranks, instances = layout.data * layout.context, layout.optimizer_instances
    if instances > 1 and dp_cp_ranks % (instances * layout.expert):
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
    if layout.expert == 1:
        return
    experts, dp_cp_ranks = shape.num_moe_experts, layout.data * layout.context
    if not experts or experts % layout.expert:
        valid_size = f"a divisor of {experts}" if experts else "1"
        yield Problem(
            rules.EXPERT_PARALLEL,
            f"the {role}'s {experts} experts cannot be split over EP={layout.expert} ranks",
            f"set expert_model_parallel_size to {valid_size}",
        )
    elif dp_cp_ranks % layout.expert:
        yield Problem(
            rules.EXPERT_PARALLEL,
            f"experts are split over DP x CP = {dp_cp_ranks} ranks, not a multiple of "
            f"EP={layout.expert}",
            "lower expert_model_parallel_size",
        )


def _shape_problems(
    layout: Layout, role: str, shape: Architecture, trains: bool
) -> Iterator[Problem]:
    """Checks that a layout can split a model. ``role`` is "teacher" or "student".

    A stage that does not train the model has no setting for sequence parallelism.
    """
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
            f"experts at TP={tensor} need sequence parallelism",
            "set sequence_parallel=true" if trains else "set tensor_model_parallel_size=1",
        )
    yield from _expert_problems(layout, role, shape)


def _alignment_problems(layout: Layout, student: Architecture) -> Iterator[Problem]:
    """Checks that the dimensions of GEMMs on each rank are multiples of ``GEMM_MULTIPLE``."""
    feed_forward_axis = split_axes(student)[-1]
    # Each axis with the number of ranks over which it is split.
    for axis, ranks in (("hidden_size", 1), (feed_forward_axis, layout.tensor)):
        size = getattr(student, axis)
        # If the ranks do not divide the size, ``_shape_problems`` reports it.
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
    # A context-parallel rank holds two chunks of a sequence. Sequence parallelism splits each chunk
    # over the tensor-parallel ranks. The factor 2 also applies without context parallelism.
    if workload.seq_length % (2 * layout.tensor * layout.context):
        return False
    available = USABLE_MEMORY_FRACTION * hardware.memory_of_rank(layout.devices)
    return peak_memory(workload, hardware).total <= available


def workloads_on_all_layouts(
    workload: Workload, devices: int, node_size: int
) -> Iterator[Workload]:
    """Yields the workload on layouts of ``devices`` devices, with the smallest sizes first.

    A node has at most ``node_size`` devices.
    """
    per_node = min(devices, node_size)
    # A cache has the logits of whole sequences, so its training cannot use context parallelism.
    try_context = workload.seq_length >= LONG_SEQUENCE and not workload.teacher_is_cached
    context_sizes = PARALLEL_SIZES if try_context else (1,)
    is_moe = workload.trained is not None and workload.trained.num_moe_experts > 0
    expert_sizes = PARALLEL_SIZES if is_moe else (1,)
    tensor_sizes = [size for size in PARALLEL_SIZES if size <= per_node]
    pipeline_sizes: tuple[int, ...] = PARALLEL_SIZES
    # Granularity, and whether the feed-forward network is recomputed.
    recomputations = [("none", False), ("selective", True), ("full", False)]
    if workload.hidden_state_bytes:
        # A loss on hidden states forbids the last, full recomputation. The layers that this loss
        # compares were checked only for the configured pipeline size.
        pipeline_sizes, recomputations = (workload.layout.pipeline,), recomputations[:-1]
    micro_batch_sizes = PARALLEL_SIZES
    if workload.trained is None:
        # A teacher's forward pass can only have tensor parallelism, without sequence parallelism.
        pipeline_sizes, context_sizes, recomputations = (1,), (1,), recomputations[:1]
        # Of equally cheap layouts, the first is proposed: that with the largest micro batch.
        micro_batch_sizes = PARALLEL_SIZES[::-1]
    sizes = product(tensor_sizes, pipeline_sizes, context_sizes, expert_sizes, micro_batch_sizes)
    for (tensor, pipeline, context, expert, micro_batch), (granularity, feed_forward) in product(
        sizes, recomputations
    ):
        layout = Layout(
            nodes=devices // per_node,
            devices=per_node,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            expert=expert,
            optimizer_instances=workload.layout.optimizer_instances,
            micro_batch_size=micro_batch,
            sequence_parallel=tensor > 1 and workload.trained is not None,
            recompute_granularity=granularity,
            recompute_feed_forward=feed_forward,
        )
        yield replace(workload, layout=layout)


def cheapest_proposal(
    workload: Workload, hardware: Hardware, devices: int, node_size: int
) -> Proposal | None:
    """Returns the cheapest layout of ``devices`` devices that fits into memory.

    If several are equally cheap, returns the one that ``workloads_on_all_layouts`` yields first.
    Costs are equal if they round to the same 0.001 device-hours. Returns ``None`` if none fits.
    """
    fitting = [
        Proposal(candidate, training_cost(candidate, hardware))
        for candidate in workloads_on_all_layouts(workload, devices, node_size)
        if fits(candidate, hardware)
    ]
    # ``min`` returns the first of equal items.
    return min(fitting, key=lambda p: round(p.cost.device_hours, 3), default=None)


def proposals(workload: Workload, hardware: Hardware) -> list[Proposal]:
    """Returns the cheapest layout for each of several numbers of devices, the lowest price first.

    The numbers are a maximum and all powers of 2 below it, except those that use several nodes but
    not all devices of each. The maximum is the number of the workload's ranks or of a node's
    devices, whichever is larger. A node of a run on one node is assumed to have at least 8 devices.
    """
    layout = workload.layout
    node_size = layout.devices if layout.nodes > 1 else max(8, layout.devices)
    maximum = max(layout.ranks, node_size)
    powers_of_2 = (2**exponent for exponent in range(maximum.bit_length()))  # up to the maximum
    cheapest = [
        cheapest_proposal(workload, hardware, devices, node_size)
        for devices in sorted({maximum, *powers_of_2})
        if devices <= node_size or devices % node_size == 0
    ]
    return sorted((p for p in cheapest if p is not None), key=lambda p: p.cost.dollars)
