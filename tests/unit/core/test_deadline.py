"""Stopping by the clock, as far as it needs no training."""

from __future__ import annotations

import time

import pytest

from recipes.core.deadline import DEADLINE, deadline, time_is_up
from recipes.core.errors import RecipeError
from recipes.core.fingerprint import result_settings
from recipes.core.stage import Resources, StageConfig


def test_time_is_up_once_the_deadline_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DEADLINE, raising=False)
    assert deadline() is None
    assert not time_is_up()
    monkeypatch.setenv(DEADLINE, str(int(time.time()) + 3600))
    assert not time_is_up()
    monkeypatch.setenv(DEADLINE, str(int(time.time()) - 1))
    assert time_is_up()


def test_deadline_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEADLINE, "tomorrow")
    with pytest.raises(RecipeError, match="STAGE_DEADLINE=tomorrow is not a time"):
        deadline()


def test_limits_change_no_fingerprint() -> None:
    limited = StageConfig(stage="s", resources=Resources(time="01:00:00", sbatch=["--mem=0"]))
    assert result_settings(limited) == result_settings(StageConfig(stage="s"))
