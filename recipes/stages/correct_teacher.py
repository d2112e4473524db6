"""Teacher correction: fine-tunes the teacher on the distillation data first (arXiv:2408.11796).

A teacher that was trained on other text gives worse targets on this one; a few steps of next-token
prediction adapt it. The corrected teacher only teaches: quality is still measured against the
original.
"""

from __future__ import annotations

from pathlib import Path

from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_file, metrics_log, rank
from recipes.distillation.settings import CorrectTeacherConfig
from recipes.distillation.training import (
    resolve_from_chain,
    training_bytes,
    training_problems,
    training_progress,
    training_result,
    training_workload,
)
from recipes.stages.contract import Stage


def run(cfg: CorrectTeacherConfig, inputs: Inputs, out: Path) -> Outcome:
    """Trains, and saves the teacher as a checkpoint like the one it came from."""
    from nemo_convert import hf, nemo
    from recipes.distillation.objective import Objective
    from recipes.distillation.trainer import train

    teacher = nemo.find_checkpoint(inputs["teacher"].artifact)
    objective, log = Objective({"lm": 1.0}), metrics_log(out)
    train(cfg, teacher, objective, inputs["data"], out / teacher.name, log)
    arch = nemo.architecture_of(teacher)
    return Outcome(
        training_result(cfg, metrics_file(out)) if rank() == 0 else None,
        architecture=arch.as_dict(),
        parameters=arch.parameters(),
        tokenizer_sha256=hf.tokenizer_sha256(nemo.side_files(teacher)),
    )


STAGE = Stage(
    config=CorrectTeacherConfig,
    kind="checkpoint_nemo",
    run=run,
    check=training_problems,
    inputs={"teacher": ("checkpoint_nemo",), "data": ("dataset",)},
    resolve_from_chain=resolve_from_chain,
    disk_bytes=lambda config, chain: training_bytes(config, chain.teacher.parameters()),
    workload=lambda config, chain: training_workload(config, chain.teacher),
    progress=training_progress,
)

if __name__ == "__main__":
    STAGE.main()
