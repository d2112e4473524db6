"""Checks of Megatron's parallel sizes, pipeline stages and batches."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_convert.architecture import Architecture
from recipes.planning import rules
from recipes.planning.hardware import Hardware
from recipes.planning.problems import Problem
from recipes.planning.workload import Layout, Workload, split_axes

FAST_MULTIPLE = 16
"""cuBLASLt's FP8 GEMMs need every dimension to be a multiple of 16; bfloat16 needs 8."""


def layout_problems(job: Workload, hardware: Hardware) -> Iterator[Problem]:
    """Checks a layout against the ranks, the models, the sequences and the batch."""
    layout = job.layout
    yield from _rank_problems(job)
    yield from _context_problems(job, hardware)
    if layout.sequence_parallel and job.seq_length % layout.tensor:
        yield Problem(
            rules.SEQUENCE_PARALLEL,
            f"seq_length={job.seq_length} is not divisible by TP={layout.tensor}",
            "set sequence_parallel=false, or another seq_length",
        )
    models = {"teacher": job.teacher, "student": job.trained}
    if job.trained == job.teacher:
        del models["student"]
    for role, arch in models.items():
        if arch is not None:
            yield from _shape_problems(layout, role, arch)
    if "student" in models and job.trained is not None:
        yield from _alignment_problems(layout, job.trained)


def _rank_problems(job: Workload) -> Iterator[Problem]:
    layout, batch = job.layout, job.global_batch_size
    if layout.data == 0:
        sizes = f"TP={layout.tensor} x PP={layout.pipeline}"
        sizes += f" x CP={layout.context}" if layout.context > 1 else ""
        yield Problem(
            rules.RANKS,
            f"{layout.ranks} rank(s) cannot be split into {sizes}",
            f"set resources.devices to a multiple of {layout.model}",
        )
    elif batch % (step := layout.data * layout.micro_batch_size):
        yield Problem(
            rules.BATCH,
            f"global_batch_size={batch} is not a multiple of DP={layout.data} x "
            f"micro_batch_size={layout.micro_batch_size}",
            f"use a multiple of {step}",
        )
    replicas, copies = layout.data * layout.context, layout.optimizer_instances
    if replicas % (copies * layout.expert) and copies > 1:
        experts = f", of EP={layout.expert}," if layout.expert > 1 else ""
        most = max(1, replicas // layout.expert)
        yield Problem(
            rules.OPTIMIZER_INSTANCES,
            f"{replicas} replica(s){experts} cannot be split into {copies} equal parts",
            f"set num_distributed_optimizer_instances to a divisor of {most}",
        )


def _context_problems(job: Workload, hardware: Hardware) -> Iterator[Problem]:
    context = job.layout.context
    if context == 1:
        return
    if not hardware.on_gpu:
        yield Problem(
            rules.CONTEXT_PARALLEL,
            f"context_parallel_size={context} with hardware={hardware.name}: TransformerEngine's "
            "attention over several ranks needs a GPU",
            "set context_parallel_size=1, or hardware to the GPU that this runs on",
        )
    if job.seq_length % (2 * context):
        yield Problem(
            rules.CONTEXT_PARALLEL,
            f"seq_length={job.seq_length} cannot be split into two chunks for each of "
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
            "set expert_model_parallel_size to a divisor" if experts else "set it to 1",
        )
    elif replicas % expert:
        yield Problem(
            rules.EXPERT_PARALLEL,
            f"EP={expert} does not divide the {replicas} replicas, over which experts are split",
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
    """Checks the sizes on a rank, which are those of its GEMMs."""
    for axis, ranks in (("hidden_size", 1), (split_axes(student)[-1], layout.tensor)):
        size = getattr(student, axis)
        if size % ranks == 0 and size // ranks % FAST_MULTIPLE:
            where = f", {size // ranks} on each of TP={ranks} ranks," if ranks > 1 else ""
            yield Problem(
                rules.SLOW_SIZES,
                f"the student's {axis}={size}{where} is not a multiple of {FAST_MULTIPLE}",
                f"prune to a multiple of {FAST_MULTIPLE * ranks}",
            )
