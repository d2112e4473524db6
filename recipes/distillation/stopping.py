"""Early stopping of a distillation that has recovered enough of the KL added by pruning.

The KL to the teacher is measured on the same validation sequences before the first step and at
every validation. KL that healing recovered before the training counts as recovered. Only records up
to the given step are read, so all ranks, and a restarted training, decide alike. Torch-free.
"""

from __future__ import annotations

from pathlib import Path

from recipes.core.metrics import read_records, steps_of
from recipes.distillation.settings import DistillConfig

VALIDATE = "validate"
"""Task name of validations in a training's records."""
INITIAL_KL = "initial_kl_fraction"
"""Key of a record: the fraction of the KL added by pruning that remained after healing."""


def stop_reason(cfg: DistillConfig, file: Path, step: int) -> str:
    """Returns why the training that logs to ``file`` stops after ``step``, or "" if it goes on."""
    validations = [r for r in steps_of(file, VALIDATE) if r["done"] <= step and "val_kd" in r]
    if cfg.stop_at_recovered is None or len(validations) < 2 or step >= cfg.max_steps:
        return ""  # even if healing alone recovered enough: a training has at least one step
    first, last = validations[0], validations[-1]
    ratio = last["val_kd"] / first["val_kd"] if first["val_kd"] else 0.0
    recovered = 1 - initial_kl_fraction(file) * ratio
    if recovered < cfg.stop_at_recovered:
        return ""
    return (
        f"stopped at step {last['done']} of {cfg.max_steps}: recovered {recovered:.0%} of the KL "
        f"added by pruning (stop_at_recovered={cfg.stop_at_recovered:g})"
    )


def initial_kl_fraction(file: Path) -> float:
    """Reads the fraction of the pruned model's KL before training: 1 unless it was healed."""
    return next((float(r[INITIAL_KL]) for r in read_records(file) if INITIAL_KL in r), 1.0)
