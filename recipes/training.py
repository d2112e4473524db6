"""What every training stage is configured with, and can be checked for before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from recipes.architecture import Architecture
from recipes.metrics import steps_of
from recipes.parallelism import layout_problems
from recipes.planner import Job, Layout
from recipes.preflight import Chain, Problem, window_problems
from recipes.stage import StageConfig

if TYPE_CHECKING:
    import torch

PRECISIONS = ("bf16-mixed", "32")
RECOMPUTE = ("none", "selective", "full")
CHECKPOINTS = "checkpoints"
"""Directory in a stage's work that holds the checkpoints it can resume from."""
UNFINISHED = "-unfinished"
"""Suffix of the marker that NeMo keeps beside a checkpoint while it is being written."""
TERMS = ("kd", "hidden", "lm")
"""Parts of the loss, each logged on its own."""
RESOURCE = {"resource": True}


@dataclass
class TrainingConfig(StageConfig):
    """Settings of a training stage. Lengths in tokens, batches in sequences."""

    seq_length: int = 256
    micro_batch_size: int = field(default=4, metadata=RESOURCE)
    """Sequences that a rank holds at once. The loss is a mean over the tokens of the global batch,
    so this changes memory and speed, not the result."""
    global_batch_size: int = 4
    max_steps: int = 100
    warmup_steps: int = 10
    lr: float = 1e-4
    min_lr: float = 1e-5
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 1.0
    mask_document_ends: bool = True
    """Leaves out predictions of a document's first token from the document before it."""
    precision: str = "bf16-mixed"
    """``bf16-mixed`` (float32 main weights in the optimizer) or ``32``."""
    grad_reduce_in_fp32: bool = True
    """Accumulates gradients in float32; off saves two bytes a parameter."""
    max_nonfinite_steps: int = 0
    """Steps with a loss or gradient that is not finite to skip before the run stops."""
    seed: int = 1234
    tensor_model_parallel_size: int = field(default=1, metadata=RESOURCE)
    pipeline_model_parallel_size: int = field(default=1, metadata=RESOURCE)
    sequence_parallel: bool = field(default=False, metadata=RESOURCE)
    """Splits activations between tensor-parallel regions along the sequence; no effect at TP=1."""
    context_parallel_size: int = field(default=1, metadata=RESOURCE)
    """Splits each window over ranks, attention included; needs TransformerEngine, so GPUs."""
    expert_model_parallel_size: int = field(default=1, metadata=RESOURCE)
    """Splits the experts of a mixture over the replicas."""
    recompute: str = field(default="none", metadata=RESOURCE)
    """Computes activations again in the backward pass: ``none``, ``selective`` (attention's
    scores, which flash attention does not hold anyway) or ``full`` (keeps a layer's input only)."""
    val_check_interval: int = 100
    limit_val_batches: int = 4
    checkpoint_interval: int = 100
    """Steps between checkpoints, which a killed run resumes from."""
    keep_checkpoints: int = 2

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return dtype_of(self.precision)


def dtype_of(precision: str) -> torch.dtype:
    """Type of weights and activations."""
    import torch

    return torch.bfloat16 if precision == "bf16-mixed" else torch.float32


def training_problems(cfg: TrainingConfig, chain: Chain) -> Iterator[Problem]:
    """Finds settings that would fail once training has started."""
    if cfg.precision not in PRECISIONS:
        yield Problem("precision", f"precision={cfg.precision}", f"use {' or '.join(PRECISIONS)}")
    for name in ("max_steps", "lr", "clip_grad", "checkpoint_interval", "val_check_interval"):
        if getattr(cfg, name) <= 0:
            yield Problem("positive", f"{name}={getattr(cfg, name)} is not positive", "raise it")
    if cfg.warmup_steps >= cfg.max_steps:
        yield Problem(
            "warmup",
            f"warmup_steps={cfg.warmup_steps} leaves no step of max_steps={cfg.max_steps}",
            "set warmup_steps lower",
        )
    if cfg.recompute not in RECOMPUTE:
        yield Problem("recompute", f"recompute={cfg.recompute}", f"use {' or '.join(RECOMPUTE)}")
    yield from window_problems(cfg.seq_length, chain)
    yield from layout_problems(cfg, chain)


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
        sequence_parallel=cfg.sequence_parallel and cfg.tensor_model_parallel_size > 1,
        recompute=cfg.recompute,
    )


def training_job(
    cfg: TrainingConfig, trained: Architecture, teacher: Architecture | None = None, terms: int = 1
) -> Job:
    """The training as a planner sees it."""
    return Job(
        name=cfg.stage,
        trained=trained,
        teacher=teacher,
        layout=layout_of(cfg),
        seq_length=cfg.seq_length,
        global_batch_size=cfg.global_batch_size,
        steps=cfg.max_steps,
        bf16=cfg.precision == "bf16-mixed",
        gradient_bytes=4 if cfg.grad_reduce_in_fp32 else 2,
        terms=terms,
    )


def training_bytes(cfg: TrainingConfig, parameters: int) -> int:
    """The trained model and its checkpoints (14 bytes a parameter), one of them in flight."""
    return parameters * (4 + 14 * (cfg.keep_checkpoints + 1))


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


def training_summary(cfg: TrainingConfig, file: Path) -> dict[str, Any]:
    """The manifest's figures, from the records of all attempts.

    Not from memory: a run killed after its last step resumes with nothing left to train.
    """
    steps, validations = steps_of(file, cfg.stage), steps_of(file, "validate")
    last = steps[-1]
    return {
        **{f"final_{name}": last[name] for name in ("loss", *TERMS) if name in last},
        "val_loss": validations[-1]["val_loss"] if validations else None,
        "steps": last["done"],
        "skipped_steps": sum(bool(step.get("skipped")) for step in steps),
        "tokens": last["done"] * cfg.global_batch_size * cfg.seq_length,
        "tokens_per_second": median(step["tokens_per_second"] for step in steps),
    }
