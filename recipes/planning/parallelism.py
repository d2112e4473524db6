"""Arithmetic of Megatron's parallel sizes, pipeline stages and batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from nemo_convert.architecture import Architecture
from recipes.core.stage import Resources
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.problems import Problem

POSITIVE = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "micro_batch_size",
    "global_batch_size",
)
ALIGNMENT = 16
"""What FP8 matrix products of cuBLASLt want every dimension to be a multiple of; bf16 wants 8."""


class ParallelConfig(Protocol):
    """What a config of a parallel training stage has."""

    inputs: dict[str, str]
    resources: Resources
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    expert_model_parallel_size: int
    sequence_parallel: bool
    seq_length: int
    micro_batch_size: int
    global_batch_size: int


def data_parallel_size(cfg: ParallelConfig) -> int:
    """Ranks left for data parallelism; 0 if the sizes do not divide the ranks."""
    ranks = cfg.resources.nodes * cfg.resources.devices
    model = _model_parallel_size(cfg)
    return ranks // model if ranks % model == 0 else 0


def _model_parallel_size(cfg: ParallelConfig) -> int:
    tensor, pipeline = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    return tensor * pipeline * cfg.context_parallel_size


def layout_problems(cfg: ParallelConfig, chain: Chain) -> Iterator[Problem]:
    """Checks ranks, models and windows against TP and PP, and the batch against what is left."""
    zero = [name for name in POSITIVE if getattr(cfg, name) < 1]
    if zero:
        yield Problem(rules.POSITIVE, f"{', '.join(zero)} is not positive", "use 1 or more")
        return
    yield from _rank_problems(cfg)
    yield from _context_problems(cfg, chain)
    tensor = cfg.tensor_model_parallel_size
    if cfg.sequence_parallel and cfg.seq_length % tensor:
        yield Problem(
            rules.SEQUENCE_PARALLEL,
            f"seq_length={cfg.seq_length} is not divisible by TP={tensor}",
            "set sequence_parallel=false, or another seq_length",
        )
    if chain.teacher.num_moe_experts and tensor > 1 and not cfg.sequence_parallel:
        yield Problem(
            rules.SEQUENCE_PARALLEL,
            f"Megatron does not train experts at TP={tensor} without sequence parallelism",
            "set sequence_parallel=true",
        )
    yield from _shape_problems(cfg, "teacher", chain.teacher)
    student = chain.shape_of(cfg.inputs.get("student"))
    if student != chain.teacher:
        yield from _shape_problems(cfg, "student", student)
        yield from _alignment_problems(cfg, student)


def _rank_problems(cfg: ParallelConfig) -> Iterator[Problem]:
    tensor, pipeline = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    ranks, data = cfg.resources.nodes * cfg.resources.devices, data_parallel_size(cfg)
    if data == 0:
        yield Problem(
            rules.RANKS,
            f"{ranks} rank(s) cannot be split into TP={tensor} x PP={pipeline}{_context(cfg)}",
            f"set resources.devices to a multiple of {_model_parallel_size(cfg)}",
        )
    elif cfg.global_batch_size % (data * cfg.micro_batch_size):
        step = data * cfg.micro_batch_size
        yield Problem(
            rules.BATCH,
            f"global_batch_size={cfg.global_batch_size} is not a multiple of DP={data} x "
            f"micro_batch_size={cfg.micro_batch_size}",
            f"use a multiple of {step}",
        )


def _context(cfg: ParallelConfig) -> str:
    return f" x CP={cfg.context_parallel_size}" if cfg.context_parallel_size > 1 else ""


def _context_problems(cfg: ParallelConfig, chain: Chain) -> Iterator[Problem]:
    context = cfg.context_parallel_size
    if context == 1:
        return
    if not chain.hardware.on_gpu:
        yield Problem(
            rules.CONTEXT_PARALLEL,
            f"context_parallel_size={context} with hardware={chain.hardware.name}: attention over "
            "several ranks is TransformerEngine's, which needs a GPU",
            "set context_parallel_size=1, or hardware to the GPU that this runs on",
        )
    if cfg.seq_length % (2 * context):
        yield Problem(
            rules.CONTEXT_PARALLEL,
            f"seq_length={cfg.seq_length} cannot be split into two chunks for each of "
            f"CP={context} ranks",
            f"use a multiple of {2 * context}",
        )


def _expert_problems(cfg: ParallelConfig, role: str, shape: Architecture) -> Iterator[Problem]:
    expert, experts = cfg.expert_model_parallel_size, shape.num_moe_experts
    replicas = data_parallel_size(cfg) * cfg.context_parallel_size
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


def _shape_problems(cfg: ParallelConfig, role: str, shape: Architecture) -> Iterator[Problem]:
    tensor, pipeline = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    feed_forward = "moe_ffn_hidden_size" if shape.num_moe_experts else "ffn_hidden_size"
    for axis in ("num_attention_heads", "num_query_groups", feed_forward):
        size = getattr(shape, axis)
        if size % tensor:
            yield Problem(
                rules.TENSOR_PARALLEL,
                f"the {role}'s {axis}={size} is not divisible by TP={tensor}",
                "lower tensor_model_parallel_size",
            )
    if shape.vocab_size % tensor:
        yield Problem(
            rules.VOCABULARY,
            f"the {role}'s vocab_size={shape.vocab_size} is not divisible by TP={tensor}, and "
            "a padded vocabulary is not supported",
            "lower tensor_model_parallel_size, or resize the embeddings before the import",
        )
    if shape.num_layers < pipeline:
        yield Problem(
            rules.PIPELINE_PARALLEL,
            f"the {role} has {shape.num_layers} layers, fewer than PP={pipeline}",
            f"set pipeline_model_parallel_size to at most {shape.num_layers}",
        )
    yield from _expert_problems(cfg, role, shape)


def _alignment_problems(cfg: ParallelConfig, student: Architecture) -> Iterator[Problem]:
    """Sizes that a kernel sees: of a rank, for what tensor parallelism splits."""
    tensor = cfg.tensor_model_parallel_size
    for axis, share in (("hidden_size", 1), ("ffn_hidden_size", tensor)):
        size = getattr(student, axis)
        if size % share == 0 and size // share % ALIGNMENT:
            where = f", {size // share} on each of TP={share} ranks," if share > 1 else ""
            yield Problem(
                rules.SLOW_SIZES,
                f"the student's {axis}={size}{where} is not a multiple of {ALIGNMENT}",
                f"prune to a multiple of {ALIGNMENT * share}",
            )
