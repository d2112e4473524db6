"""Whether a distillation has come far enough, or never will, by what it has logged. Torch-free.

The share is of the divergence from the teacher that pruning left, on the validation text, the same
windows before the first step and now; what healing had brought back by then counts. Ranks that ask
at one step, or again after a restart, are told the same, since only records of steps up to then
count.
"""

from __future__ import annotations

from pathlib import Path

from recipes.core.metrics import steps_of
from recipes.distillation.forecast import left_of, share_after
from recipes.distillation.settings import DistillConfig

VALIDATE = "validate"
"""The task of validations in a training's records."""
HOPELESS_FROM = 0.5
"""Share of the steps before which nothing is given up: a falling learning rate still does much that
no curve before it shows."""


def stop_reason(cfg: DistillConfig, file: Path, step: int) -> str:
    """Why the training that logs to ``file`` ends after ``step``; empty where it goes on."""
    measured = [r for r in steps_of(file, VALIDATE) if r["done"] <= step and "val_kd" in r]
    if cfg.stop_at_recovered is None or len(measured) < 2 or step >= cfg.max_steps:
        return ""  # also where healing alone was enough: a training has a step to tell of
    first, last = measured[0], measured[-1]
    left = left_of(file)
    share = 1 - left * last["val_kd"] / first["val_kd"] if first["val_kd"] else 1.0
    wanted = f"{cfg.stop_at_recovered:.0%} was wanted"
    at = f"stopped at step {last['done']} of {cfg.max_steps}"
    if share >= cfg.stop_at_recovered:
        return f"{at}: {share:.0%} of the divergence from the teacher is back, {wanted}"
    if not cfg.stop_if_hopeless or last["done"] < HOPELESS_FROM * cfg.max_steps:
        return ""
    past = [s for s in steps_of(file, cfg.stage) if s["done"] <= last["done"]]
    tokens = cfg.global_batch_size * cfg.seq_length
    end = share_after(past, tokens, cfg.max_steps * tokens, left)
    if end is None or end.high >= cfg.stop_at_recovered:
        return ""
    likely = f"{end.value:.0%} ({end.low:.0%} to {end.high:.0%})"
    return f"{at}: all steps would bring back {likely} of the divergence, {wanted}"
