"""Knowledge distillation of the pruned student, teacher in the loop, with NeMo's trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from recipes.errors import RecipeError
from recipes.manifest import Outcome
from recipes.metrics import steps_of
from recipes.parallelism import layout_problems
from recipes.preflight import Chain, Problem, window_problems
from recipes.stage import Inputs, StageConfig, metrics_file, metrics_log, rank, stage_main

if TYPE_CHECKING:
    import torch

KIND = "checkpoint_nemo"
INPUTS = {"teacher": "checkpoint_nemo", "student": "checkpoint_nemo", "data": "dataset"}
PRECISIONS = ("bf16-mixed", "32")


@dataclass
class Config(StageConfig):
    """Settings of ``distill``. Lengths in tokens, batches in sequences."""

    temperature: float = 1.0
    kd_weight: float = 1.0
    lm_weight: float = 0.0
    """Weight of the next-token loss beside the distillation loss; 0 leaves it out."""
    seq_length: int = 256
    micro_batch_size: int = 4
    global_batch_size: int = 4
    max_steps: int = 100
    warmup_steps: int = 10
    lr: float = 1e-4
    min_lr: float = 1e-5
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 1.0
    precision: str = "bf16-mixed"
    """``bf16-mixed`` (float32 main weights in the optimizer) or ``32``."""
    seed: int = 1234
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    val_check_interval: int = 100
    limit_val_batches: int = 4
    checkpoint_interval: int = 100
    """Steps between checkpoints, which a killed run resumes from."""
    keep_checkpoints: int = 2

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        import torch

        return torch.bfloat16 if self.precision == "bf16-mixed" else torch.float32


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """Finds settings that would fail once training has started."""
    if cfg.precision not in PRECISIONS:
        yield Problem("precision", f"precision={cfg.precision}", f"use {' or '.join(PRECISIONS)}")
    for name in ("max_steps", "temperature", "lr", "checkpoint_interval", "val_check_interval"):
        if getattr(cfg, name) <= 0:
            yield Problem("positive", f"{name}={getattr(cfg, name)} is not positive", "raise it")
    if cfg.warmup_steps >= cfg.max_steps:
        yield Problem(
            "warmup",
            f"warmup_steps={cfg.warmup_steps} leaves no step of max_steps={cfg.max_steps}",
            "set warmup_steps lower",
        )
    yield from window_problems(cfg.seq_length, chain)
    yield from layout_problems(cfg, chain)


def disk_bytes(cfg: Config, chain: Chain) -> int:
    """The student, and checkpoints with optimizer state (14 bytes a parameter), one in flight."""
    return chain.shape_of(cfg.inputs["student"]).parameters() * (
        4 + 14 * (cfg.keep_checkpoints + 1)
    )


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Trains, and saves the student as a checkpoint like the one it came from."""
    from nemo_convert import hf, nemo
    from recipes.kd_trainer import distill_checkpoint

    student = nemo.find_checkpoint(inputs["student"].artifact)
    teacher = nemo.find_checkpoint(inputs["teacher"].artifact)
    _require_same_tokenizer(inputs)
    checkpoint = out / student.name
    distill_checkpoint(cfg, student, teacher, inputs["data"], checkpoint, metrics_log(out))
    arch = nemo.architecture_of(student)
    return Outcome(
        metrics=summary(cfg, metrics_file(out)) if rank() == 0 else {},
        architecture=arch.as_dict(),
        parameters=arch.parameters(),
        tokenizer_sha256=hf.tokenizer_sha256(nemo.side_files(student)),
    )


def summary(cfg: Config, file: Path) -> dict[str, Any]:
    """The manifest's figures, from the records of all attempts.

    Not from memory: a run killed after its last step resumes with nothing left to train.
    """
    steps, validations = steps_of(file, "distill"), steps_of(file, "validate")
    last = steps[-1]
    return {
        **{f"final_{name}": last[name] for name in ("loss", "kd", "lm")},
        "teacher_loss": steps[0]["teacher_loss"],
        "val_loss": validations[-1]["val_loss"] if validations else None,
        "steps": last["done"],
        "tokens": last["done"] * cfg.global_batch_size * cfg.seq_length,
        "tokens_per_second": median(step["tokens_per_second"] for step in steps),
    }


def _require_same_tokenizer(inputs: Inputs) -> None:
    hashes = {name: item.manifest.tokenizer_sha256 for name, item in inputs.items()}
    if len(set(hashes.values())) > 1:
        raise RecipeError(
            f"teacher, student and data were not made with one tokenizer: {hashes}.",
            "distil between models of one vocabulary, on data tokenized with it",
        )


if __name__ == "__main__":
    stage_main(run, Config, KIND)
