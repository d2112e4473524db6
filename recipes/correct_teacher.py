"""Teacher correction: fine-tunes the teacher on the distillation data first (arXiv:2408.11796).

A teacher that was trained on other text gives worse targets on this one; a few steps of next-token
prediction adapt it. The corrected teacher only teaches: quality is still measured against the
original.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.manifest import Outcome
from recipes.planner import Job
from recipes.preflight import Chain, Problem
from recipes.stage import Inputs, metrics_file, metrics_log, rank, stage_main
from recipes.training import (
    TrainingConfig,
    training_bytes,
    training_job,
    training_problems,
    training_progress,
    training_summary,
)

KIND = "checkpoint_nemo"
INPUTS = {"teacher": "checkpoint_nemo", "data": "dataset"}


@dataclass
class Config(TrainingConfig):
    """Settings of ``correct_teacher``."""


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """Finds settings that would fail once training has started."""
    yield from training_problems(cfg, chain)


def job(cfg: Config, chain: Chain) -> Job:
    """The training as a planner sees it."""
    return training_job(cfg, chain.teacher)


def disk_bytes(cfg: Config, chain: Chain) -> int:
    """The teacher and its checkpoints."""
    return training_bytes(cfg, chain.teacher.parameters())


progress = training_progress


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Trains, and saves the teacher as a checkpoint like the one it came from."""
    from nemo_convert import hf, nemo
    from recipes.kd_objective import Objective
    from recipes.nemo_trainer import train

    teacher = nemo.find_checkpoint(inputs["teacher"].artifact)
    train(
        cfg,
        teacher,
        Objective({"lm": 1.0}),
        inputs["data"],
        out / teacher.name,
        metrics_log(out),
    )
    arch = nemo.architecture_of(teacher)
    return Outcome(
        metrics=training_summary(cfg, metrics_file(out)) if rank() == 0 else {},
        architecture=arch.as_dict(),
        parameters=arch.parameters(),
        tokenizer_sha256=hf.tokenizer_sha256(nemo.side_files(teacher)),
    )


if __name__ == "__main__":
    stage_main(run, Config, KIND)
