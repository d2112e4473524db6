"""What every training stage is configured with, and can be checked for before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from nemo_convert.architecture import Architecture
from recipes.core.metrics import steps_of
from recipes.distillation.results import TrainingResult
from recipes.distillation.settings import RECOMPUTE_GRANULARITIES, TrainingConfig
from recipes.planning import rules
from recipes.planning.chain import Chain, precision_problems, window_problems
from recipes.planning.problems import Problem
from recipes.planning.workload import CHECKPOINT_BYTES, Layout, Workload

CHECKPOINTS = "checkpoints"
"""Directory in a stage's work that holds the checkpoints it can resume from."""
UNFINISHED = "-unfinished"
"""Suffix of the marker that NeMo keeps beside a checkpoint while it is being written."""


def training_problems(cfg: TrainingConfig, chain: Chain) -> Iterator[Problem]:
    """Finds settings that would fail once training has started."""
    yield from precision_problems(cfg.precision)
    for name in ("max_steps", "lr", "clip_grad", "checkpoint_interval", "val_check_interval"):
        if getattr(cfg, name) <= 0:
            yield Problem(
                rules.POSITIVE, f"{name}={getattr(cfg, name)} is not positive", "raise it"
            )
    if cfg.warmup_steps >= cfg.max_steps:
        yield Problem(
            rules.WARMUP,
            f"warmup_steps={cfg.warmup_steps} leaves no step of max_steps={cfg.max_steps}",
            "set warmup_steps lower",
        )
    if cfg.recompute_granularity not in RECOMPUTE_GRANULARITIES:
        yield Problem(
            rules.RECOMPUTE,
            f"recompute_granularity={cfg.recompute_granularity}",
            f"use {' or '.join(RECOMPUTE_GRANULARITIES)}",
        )
    yield from window_problems(cfg.seq_length, chain)


def layout_of(cfg: TrainingConfig) -> Layout:
    """The layout in a planner's terms."""
    return Layout(
        nodes=cfg.resources.nodes,
        devices=cfg.resources.devices,
        tensor=cfg.tensor_model_parallel_size,
        pipeline=cfg.pipeline_model_parallel_size,
        context=cfg.context_parallel_size,
        expert=cfg.expert_model_parallel_size,
        micro_batch_size=cfg.micro_batch_size,
        sequence_parallel=cfg.splits_sequence,
        recompute_granularity=cfg.recompute_granularity,
    )


def training_workload(
    cfg: TrainingConfig, trained: Architecture, teacher: Architecture | None = None, terms: int = 1
) -> Workload:
    """The training as a planner sees it."""
    return Workload(
        name=cfg.stage,
        trained=trained,
        teacher=teacher,
        layout=layout_of(cfg),
        seq_length=cfg.seq_length,
        global_batch_size=cfg.global_batch_size,
        steps=cfg.max_steps,
        bf16=cfg.precision == "bf16-mixed",
        gradient_bytes=4 if cfg.grad_reduce_in_fp32 else 2,
        validation_batches=cfg.limit_val_batches,
        terms=terms,
    )


def training_bytes(cfg: TrainingConfig, parameters: int) -> int:
    """The trained model and its checkpoints, one of them in flight."""
    return parameters * (4 + CHECKPOINT_BYTES * (cfg.keep_checkpoints + 1))


def training_progress(work: Path) -> str | None:
    """How far an unfinished training is: what would be lost by starting over."""
    steps = [steps_in(path) for path in whole_checkpoints(work / CHECKPOINTS)]
    return f"step {max(steps)}" if steps else None


def whole_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints that are not being written, or were when the run was killed."""
    unfinished = {p.name.removesuffix(UNFINISHED) for p in directory.glob(f"*{UNFINISHED}")}
    return [p for p in directory.glob("step=*") if p.is_dir() and p.name not in unfinished]


def steps_in(checkpoint: Path) -> int:
    """Steps done in a checkpoint, which NeMo names ``step=N`` or ``step=N-last``, from 0."""
    return int(checkpoint.name.rpartition("=")[2].split("-")[0]) + 1


def training_result(cfg: TrainingConfig, file: Path) -> TrainingResult:
    """What a training came to, from the records of all attempts.

    Not from memory: a run killed after its last step resumes with nothing left to train.
    """
    steps, validations = steps_of(file, cfg.stage), steps_of(file, "validate")
    last = steps[-1]
    return TrainingResult(
        final_loss=last["loss"],
        final_kd=last.get("kd"),
        final_hidden=last.get("hidden"),
        final_lm=last.get("lm"),
        val_loss=validations[-1]["val_loss"] if validations else None,
        steps=last["done"],
        skipped_steps=sum(bool(step.get("skipped")) for step in steps),
        tokens=last["done"] * cfg.global_batch_size * cfg.seq_length,
        tokens_per_second=median(step["tokens_per_second"] for step in steps),
    )
