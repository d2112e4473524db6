"""When a distillation stops before its last step, from logged validations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes.core.metrics import METRICS, MetricsLog
from recipes.distillation.settings import DistillConfig
from recipes.distillation.training import INITIAL_KL, stop_reason

STEPS = 300


def logged(folder: Path, validations: dict[int, float]) -> Path:
    """Logs validations by step, each with its KL."""
    log = MetricsLog(folder / METRICS)
    for done, kd in validations.items():
        log.progress("validate", done, STEPS, val_kd=kd)
    return folder / METRICS


@pytest.mark.parametrize(
    ("fields", "step", "expected"),
    [
        ({}, 200, ""),
        ({"stop_at_recovered": 0.8}, 0, ""),
        ({"stop_at_recovered": 0.8}, 100, ""),
        ({"stop_at_recovered": 0.7}, 199, "step 100 of 300: recovered 75%"),
        ({"stop_at_recovered": 0.8}, 200, "step 200 of 300: recovered 85%"),
        ({"stop_at_recovered": 0.8, "max_steps": 200}, 200, ""),  # it is complete
    ],
)
def test_training_stops_at_the_recovered_fraction(
    tmp_path: Path, fields: dict[str, Any], step: int, expected: str
) -> None:
    file = logged(tmp_path, {0: 0.8, 100: 0.2, 200: 0.12})
    cfg = DistillConfig(stage="distill", **{"max_steps": STEPS, **fields})
    reason = stop_reason(cfg, file, step)
    assert expected in reason
    assert bool(reason) == bool(expected)


@pytest.mark.parametrize(("fraction", "step", "stops"), [(0.7, 100, True), (0.8, 100, False),
                                                         (0.4, 0, False)])  # fmt: skip
def test_recovery_by_healing_counts(
    tmp_path: Path, fraction: float, step: int, stops: bool
) -> None:
    """Healing recovered half, and the first 100 steps half of the rest: 75%. No step is no stop."""
    file = logged(tmp_path, {0: 0.8, 100: 0.4})
    MetricsLog(file).progress("student", 1, 1, **{INITIAL_KL: 0.5})
    cfg = DistillConfig(stage="distill", max_steps=STEPS, stop_at_recovered=fraction)
    assert bool(stop_reason(cfg, file, step)) == stops
