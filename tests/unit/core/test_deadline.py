"""Stopping by the clock, as far as it needs no training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from recipes.core.deadline import DEADLINE, STOPPED, deadline, time_is_up
from recipes.core.errors import RecipeError
from recipes.core.fingerprint import result_settings
from recipes.core.manifest import WORK
from recipes.core.stage import Resources, StageConfig
from recipes.core.worker import prepare_work

if TYPE_CHECKING:
    from pathlib import Path

    from launch.plan import Plan


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


def test_stage_that_goes_on_is_no_longer_stopped(plan: Callable[..., Plan], tmp_path: Path) -> None:
    stage = plan().stages[0]
    stage.directory.mkdir(parents=True)
    prepare_work(stage.directory, stage.request())
    stopped = stage.directory / WORK / STOPPED
    stopped.write_text("at step 1")
    prepare_work(stage.directory, stage.request())
    assert not stopped.exists()
