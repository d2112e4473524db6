"""NeMo checkpoint to Hugging Face folder, with a model card and proof that nothing changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_convert.results import ParityResult
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, StageConfig, metrics_log
from recipes.planning.chain import Chain
from recipes.planning.inference_cost import InferenceCost, conversion_cost
from recipes.report.settings import CARD_TEMPLATE
from recipes.stages.contract import Stage


@dataclass
class ExportConfig(StageConfig):
    """Settings of ``export_hf``."""

    teacher: str = ""
    """Model that the student came from, for the card."""
    recipe: str = ""
    """What was done, for the card."""


def disk_bytes(cfg: ExportConfig, chain: Chain) -> int:
    """Size of the folder, the teacher's at most."""
    return 4 * chain.teacher.parameters()


def inference_cost(cfg: ExportConfig, chain: Chain) -> InferenceCost:
    """Costs the conversion and its verification."""
    return conversion_cost(chain.shape_of(cfg.inputs.get("checkpoint")), chain.hardware)


def run(cfg: ExportConfig, inputs: Inputs, out: Path) -> Outcome:
    """Converts, compares with the checkpoint, and writes a card with what was measured."""
    from nemo_convert import convert, hf, nemo, parity
    from recipes.report.model_card import write_card

    parity.multiply_in_float32()
    log = metrics_log(out)
    checkpoint = nemo.find_checkpoint(inputs["checkpoint"].artifact)
    log.progress("export", 0, 2)
    convert.to_hf(checkpoint, out)
    log.progress("export", 1, 2)
    gate = parity.compare(out, checkpoint).require(f"{checkpoint.name} → {out}")
    manifest = inputs["checkpoint"].manifest
    if "evaluation" in inputs:  # a model that nothing was done to keeps the card that came along
        write_card(
            out, cfg.teacher, cfg.recipe, {name: item.manifest for name, item in inputs.items()}
        )
    log.progress("export", 2, 2)
    return Outcome(
        ParityResult(gate.max_logit_difference, gate.tokens),
        architecture=manifest.architecture,
        parameters=manifest.parameters,
        tokenizer_sha256=hf.tokenizer_sha256(out),
    )


STAGE = Stage(
    config=ExportConfig,
    kind="checkpoint_hf",
    run=run,
    one_rank="a conversion is one process's work",
    inputs={"checkpoint": ("checkpoint_nemo",)},
    # For the card alone. A benchmark cannot be one: it measures what this stage makes.
    optional_inputs={
        "evaluation": ("eval_results",),
        "teacher": ("checkpoint_nemo",),
        "pruned": ("checkpoint_nemo",),
        "healed": ("checkpoint_nemo",),
        "data": ("dataset",),
        "tasks": ("task_results",),
    },
    external=lambda config: {"card": CARD_TEMPLATE},
    disk_bytes=disk_bytes,
    inference_cost=inference_cost,
)

if __name__ == "__main__":
    STAGE.main()
