"""When a distillation ends before its last step, by records of known curves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from recipes.core.metrics import METRICS, MetricsLog
from recipes.distillation.forecast import LEFT, share_after
from recipes.distillation.settings import DistillConfig
from recipes.distillation.stopping import stop_reason
from tests.unit.distillation.test_forecast import TOKENS, steps

STEPS = 300


def logged(folder: Path, floor: float, validations: dict[int, float]) -> Path:
    """A training whose training loss falls to a floor, from 0.7 above it."""
    log = MetricsLog(folder / METRICS)
    for step in steps(STEPS, floor=floor, noise=0.005):
        log.progress("distill", total=STEPS, **step)
    for done, kd in validations.items():
        log.progress("validate", done, STEPS, val_kd=kd)
    return folder / METRICS


@pytest.mark.parametrize(
    ("fields", "step", "said"),
    [
        ({}, 200, ""),
        ({"stop_at_recovered": 0.8}, 0, ""),
        ({"stop_at_recovered": 0.8}, 100, ""),
        ({"stop_at_recovered": 0.7}, 199, "step 100 of 300: 75% of the divergence"),
        ({"stop_at_recovered": 0.8}, 200, "step 200 of 300: 85% of the divergence"),
        ({"stop_at_recovered": 0.8, "max_steps": 200}, 200, ""),  # it is through
    ],
)
def test_it_stops_at_the_share_that_was_wanted(
    tmp_path: Path, fields: dict[str, float], step: int, said: str
) -> None:
    file = logged(tmp_path, 0.0, {0: 0.8, 100: 0.2, 200: 0.12})
    cfg = DistillConfig(stage="distill", **{"max_steps": STEPS, **fields})  # type: ignore[arg-type]
    found = stop_reason(cfg, file, step)
    assert said in found
    assert bool(found) == bool(said)


def test_what_healing_brought_back_counts(tmp_path: Path) -> None:
    """Half of what pruning lost is back before the first step, half of the rest by the 100th."""
    file = logged(tmp_path, 0.0, {0: 0.8, 100: 0.4})
    MetricsLog(file).progress("student", 1, 1, **{LEFT: 0.5})
    cfg = DistillConfig(stage="distill", max_steps=STEPS, stop_at_recovered=0.7)
    assert "step 100 of 300: 75% of the divergence" in stop_reason(cfg, file, 100)
    assert stop_reason(replace(cfg, stop_at_recovered=0.4), file, 0) == ""  # no step yet


@pytest.mark.parametrize(
    ("floor", "step", "hopeless", "stops"),
    [
        (0.5, 100, True, False),  # too early to give up
        (0.5, 200, True, True),  # it comes to half
        (0.5, 200, False, False),
        (0.0, 200, True, False),  # it gets there
    ],
)
def test_it_gives_up_what_all_its_steps_would_not_reach(
    tmp_path: Path, floor: float, step: int, hopeless: bool, stops: bool
) -> None:
    file = logged(tmp_path, floor, {0: 1.0, 100: 0.7, 200: 0.6})
    cfg = DistillConfig(
        stage="distill",
        max_steps=STEPS,
        global_batch_size=1,
        seq_length=TOKENS,
        stop_at_recovered=0.8,
        stop_if_hopeless=hopeless,
    )
    found = stop_reason(cfg, file, step)
    assert bool(found) == stops
    if stops:
        assert found.startswith("stopped at step 200 of 300: all steps would bring back 5")


def test_a_curve_within_its_noise_gives_nothing_up(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / METRICS)
    for done in range(1, 61):
        log.progress("distill", done, 60, kd=0.5 + 0.1 * (done % 2))
    for done, kd in ((0, 0.5), (40, 0.5)):
        log.progress("validate", done, 60, val_kd=kd)
    cfg = DistillConfig(stage="distill", max_steps=60, stop_at_recovered=0.9, stop_if_hopeless=True)
    assert stop_reason(cfg, tmp_path / METRICS, 40) == ""


def test_what_may_still_come_is_not_given_up(tmp_path: Path) -> None:
    """A share is wanted that is within the interval, and one that is beyond it."""
    records, file = steps(200, floor=0.5, noise=0.05), tmp_path / METRICS
    log = MetricsLog(file)
    for step in records:
        log.progress("distill", total=STEPS, **step)
    for done in (0, 200):
        log.progress("validate", done, STEPS, val_kd=1.0)
    end = share_after(records, TOKENS, STEPS * TOKENS)
    assert end is not None
    for wanted, stops in (((end.value + end.high) / 2, False), (end.high + 0.01, True)):
        cfg = DistillConfig("distill", max_steps=STEPS, global_batch_size=1, seq_length=TOKENS)
        cfg = replace(cfg, stop_at_recovered=wanted, stop_if_hopeless=True)
        assert bool(stop_reason(cfg, file, 200)) == stops
