"""Converts a NeMo checkpoint to a Hugging Face folder, and checks that the logits are equal.

Reads the checkpoint, and results of other stages for the model card. Writes the folder. For a
student, the folder has a new model card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_convert.results import ParityResult
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, StageConfig, metrics_log
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.inference_cost import InferenceCost, conversion_cost
from recipes.planning.rules import Problem
from recipes.report.settings import CARD_TEMPLATE
from recipes.stages.contract import Stage


@dataclass
class ExportConfig(StageConfig):
    """Settings of ``export_hf``."""

    teacher: str = field(default="", metadata={"path": True})
    """Path or hub id of the teacher, for the model card."""
    recipe: str = ""
    """Name of the recipe, for the model card."""


def check(cfg: ExportConfig, chain: Chain) -> Iterator[Problem]:
    """Checks that the measurements in the model card are of the exported model."""
    checkpoint = cfg.inputs.get("checkpoint")
    for role in ("evaluation", "tasks"):
        measurement = chain.stages.get(cfg.inputs.get(role, ""))
        # A measurement of another run is not checked.
        measured = measurement.inputs.get("distilled") if measurement else checkpoint
        if measured != checkpoint:
            yield Problem(
                rules.REPORT,
                f"{cfg.name} exports {checkpoint}, but its model card would have the measurements "
                f"of {measured}",
                f"set stages.{cfg.inputs[role]}.inputs.distilled={checkpoint}",
            )


def inference_cost(cfg: ExportConfig, chain: Chain) -> InferenceCost:
    """Estimates the cost of the conversion and of the comparison of logits."""
    return conversion_cost(chain.shape_of(cfg.inputs.get("checkpoint")), chain.hardware)


def run(cfg: ExportConfig, inputs: Inputs, out: Path) -> Outcome:
    """Converts the model, compares its logits before and after, and writes a student's card."""
    from nemo_convert import convert, hf, nemo, parity
    from recipes.report.model_card import write_card
    from recipes.report.upstream import upstream

    log = metrics_log(out)
    checkpoint = nemo.find_checkpoint(inputs["checkpoint"].artifact)
    log.progress("export", 0, 2)
    convert.to_hf(checkpoint, out)
    log.progress("export", 1, 2)
    comparison = parity.compare(out, checkpoint).require(f"{checkpoint.name} → {out}")
    if "evaluation" in inputs:  # only for a student; an exported teacher keeps its own card
        write_card(out, cfg.teacher, cfg.recipe, inputs, upstream(inputs))
    log.progress("export", 2, 2)
    result = ParityResult(comparison.max_logit_difference, comparison.tokens)
    outcome = Outcome.of(result, inputs["checkpoint"].manifest)
    return replace(outcome, tokenizer_sha256=hf.tokenizer_sha256(out))


STAGE = Stage(
    config=ExportConfig,
    kind="checkpoint_hf",
    run=run,
    check=check,
    single_rank_reason="a conversion is not split over ranks",
    inputs={"checkpoint": ("checkpoint_nemo",)},
    # For the model card, which has no speed, because ``measure_speed`` reads this stage's output.
    optional_inputs={
        "evaluation": ("eval_results",),
        "teacher": ("checkpoint_nemo",),
        "healed": ("checkpoint_nemo",),
        "data": ("dataset",),
        "tasks": ("task_results",),
    },
    external=lambda config: {"card": CARD_TEMPLATE},  # a file that the result depends on
    names_accepted_results=True,  # in the model card
    disk_bytes=lambda config, chain: 4 * chain.teacher.parameters(),  # upper bound: float32
    inference_cost=inference_cost,
)
