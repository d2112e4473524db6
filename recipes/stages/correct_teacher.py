"""Fine-tunes the teacher on the distillation data (teacher correction, arXiv:2408.11796).

A teacher that was trained on other data is a worse target for distillation. So a few steps of
next-token training adapt it. Evaluation still compares models with the original teacher.

Reads the teacher and the prepared text. Writes the corrected teacher as a NeMo checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nemo_convert.architecture import Architecture
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_file, metrics_log, rank
from recipes.distillation.results import KeptLayers
from recipes.distillation.settings import CorrectTeacherConfig
from recipes.distillation.training import (
    resolve_from_chain,
    trained_sources,
    training_bytes,
    training_problems,
    training_progress,
    training_result,
    training_workload,
)
from recipes.planning.chain import Chain
from recipes.stages.contract import Stage, checkpoint_outcome


def run(cfg: CorrectTeacherConfig, inputs: Inputs, out: Path) -> Outcome:
    """Trains the teacher and saves it as a NeMo checkpoint."""
    from nemo_convert import nemo
    from recipes.distillation.objective import Objective
    from recipes.distillation.trainer import train

    teacher = nemo.find_checkpoint(inputs["teacher"].artifact)
    next_token_loss = Objective({"lm": 1.0})  # with weight 1, the only term
    train(cfg, teacher, next_token_loss, inputs["data"], out / teacher.name, metrics_log(out))
    result = None
    if rank() == 0:  # only rank 0 writes metrics
        training = training_result(cfg, metrics_file(out))
        result = replace(
            training,
            sources=trained_sources(cfg, training, inputs),
            kept_layers=inputs["teacher"].manifest.result(KeptLayers).kept_layers,
        )
    return checkpoint_outcome(result, teacher)


def _teacher(cfg: CorrectTeacherConfig, chain: Chain) -> Architecture:
    """Returns the shape of the model to fine-tune, which may be of another run."""
    return chain.shape_of(cfg.inputs.get("teacher"))


STAGE = Stage(
    config=CorrectTeacherConfig,
    kind="checkpoint_nemo",
    run=run,
    check=lambda cfg, chain: training_problems(cfg, chain, [_teacher(cfg, chain)]),
    inputs={"teacher": ("checkpoint_nemo",), "data": ("dataset",)},
    resolve_from_chain=resolve_from_chain,
    disk_bytes=lambda cfg, chain: training_bytes(cfg, _teacher(cfg, chain).parameters()),
    workload=lambda cfg, chain: training_workload(cfg, _teacher(cfg, chain)),
    progress=training_progress,
)
