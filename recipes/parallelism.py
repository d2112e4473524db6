"""Arithmetic of Megatron's parallel sizes and batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from recipes.architecture import Architecture
from recipes.preflight import Chain, Problem
from recipes.stage import Resources


class ParallelConfig(Protocol):
    """What a config of a parallel training stage has."""

    inputs: dict[str, str]
    resources: Resources
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    micro_batch_size: int
    global_batch_size: int


def data_parallel_size(cfg: ParallelConfig) -> int:
    """Ranks left for data parallelism; 0 if the sizes do not divide the ranks."""
    ranks = cfg.resources.nodes * cfg.resources.devices
    model = cfg.tensor_model_parallel_size * cfg.pipeline_model_parallel_size
    return ranks // model if ranks % model == 0 else 0


def layout_problems(cfg: ParallelConfig, chain: Chain) -> Iterator[Problem]:
    """Checks ranks against TP and PP, and the batch against what is left for DP."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    zero = [n for n in (*sizes, "micro_batch_size", "global_batch_size") if getattr(cfg, n) < 1]
    if zero:
        yield Problem("positive", f"{', '.join(zero)} is not positive", "use 1 or more")
        return
    yield from _rank_problems(cfg)
    yield from _shape_problems(cfg, "teacher", chain.teacher)
    student = chain.shape_of(cfg.inputs.get("student"))
    if student != chain.teacher:
        yield from _shape_problems(cfg, "student", student)


def _rank_problems(cfg: ParallelConfig) -> Iterator[Problem]:
    tensor, pipeline = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    ranks, data = cfg.resources.nodes * cfg.resources.devices, data_parallel_size(cfg)
    if data == 0:
        yield Problem(
            "ranks",
            f"{ranks} rank(s) cannot be split into TP={tensor} x PP={pipeline}",
            f"set resources.devices to a multiple of {tensor * pipeline}",
        )
    elif cfg.global_batch_size % (data * cfg.micro_batch_size):
        step = data * cfg.micro_batch_size
        yield Problem(
            "batch",
            f"global_batch_size={cfg.global_batch_size} is not a multiple of DP={data} x "
            f"micro_batch_size={cfg.micro_batch_size}",
            f"use a multiple of {step}",
        )


def _shape_problems(cfg: ParallelConfig, role: str, shape: Architecture) -> Iterator[Problem]:
    tensor, pipeline = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    for axis in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        size = getattr(shape, axis)
        if size % tensor:
            yield Problem(
                "tensor-parallel",
                f"the {role}'s {axis}={size} is not divisible by TP={tensor}",
                "lower tensor_model_parallel_size",
            )
    if shape.num_layers % pipeline:
        yield Problem(
            "pipeline-parallel",
            f"the {role}'s {shape.num_layers} layers are not divisible by PP={pipeline}",
            "choose another pipeline_model_parallel_size",
        )
