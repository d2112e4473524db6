"""Sets random settings to unusual values. Each must be valid, or refused with a fix."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch import schema
from launch.executors import executor_of
from launch.hydra_errors import explain
from launch.plan import make_plan
from launch.settings import settings_of
from recipes.core.errors import RecipeError
from recipes.core.trackers import require_tracker
from tests.support.launcher import fork_launcher
from tests.unit.conftest import Compose

UNUSUAL_VALUES = (
    *(None, True, "", "nope", "a b\nc", "../../etc", "-1"),
    *(0, -1, -5, 0.5, 1e-300, 10**20, float("nan"), float("inf"), float("-inf")),
    *([], [-1], [[]], ["x", None], {}, {"a": 1}),
)
FIX = re.compile(r"\n  fix: |Did you mean '|: must ")
"""Matches a message that has a fix, a proposal, or the allowed values."""
SLURM = "recipe=llama_depth_prune cluster=slurm hardware=h100 tracker=mlflow teacher=cached"
BASE_OVERRIDES = [*((f"recipe={name}",) for name in schema.recipes()), tuple(SLURM.split())]
NAMES: dict[tuple[str, ...], list[str]] = {}
"""Sorted names of the settings of a config, by its overrides. A cache."""


def setting_names(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all settings."""
    for key in node:
        name, inner = f"{prefix}{key}", node._get_node(key)
        if name == "hydra":
            continue
        yield name
        if isinstance(inner, DictConfig) and not inner._is_none() and not inner._is_interpolation():
            yield from setting_names(inner, f"{name}.")


@pytest.fixture
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the hub unreachable, so that plans read bundled configs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("recipes.planning.chain.is_config_available", lambda _: False)


@pytest.mark.usefixtures("_no_hub", "versions_read_once")
@settings(
    max_examples=500,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    overrides=st.sampled_from(BASE_OVERRIDES), data=st.data(), value=st.sampled_from(UNUSUAL_VALUES)
)
def test_an_unusual_value_is_valid_or_refused_with_a_fix(
    compose: Compose, tmp_path: Path, overrides: tuple[str, ...], data: st.DataObject, value: Any
) -> None:
    """Runs all checks that the launcher makes before it writes or starts anything.

    Any exception that is not caught here fails the test.
    """
    cfg = compose(*overrides)
    if overrides not in NAMES:
        NAMES[overrides] = sorted(setting_names(cfg))
    name = data.draw(st.sampled_from(NAMES[overrides]))
    message = ""
    try:
        OmegaConf.update(cfg, name, value, merge=False)
        settings = settings_of(cfg)
        require_tracker(settings.tracker)
        executor, cluster = executor_of(cfg.cluster)
        executor.prepare(make_plan(cfg, settings, tmp_path / "run"), cluster)
    except (RecipeError, OmegaConfBaseException, HydraException) as error:
        message = explain(error)
    assert not message or FIX.search(message)
    assert not list(tmp_path.iterdir()), "a check wrote a file"


def test_the_command_ends_with_a_plan_or_one_message(compose: Compose, tmp_path: Path) -> None:
    """Unlike the test above, the command uses Hydra's parser of overrides."""
    rng = random.Random(0)
    names = sorted(setting_names(compose("recipe=llama_depth_prune")))
    values = ["null", "true", "", "nope", "-1", "0", "1e400", "nan", "[]", "[[]]", "{a: 1}", "{"]
    overrides = [f"{rng.choice(names)}={rng.choice(values)}" for _ in range(40)]
    for number, override in enumerate(overrides):
        run_dir = tmp_path / str(number)
        arguments = ("recipe=llama_depth_prune", "dry_run=true", f"run_dir={run_dir}", override)
        process = fork_launcher(*arguments, cwd=tmp_path)
        assert "Traceback" not in process.stdout + process.stderr, override
        if process.returncode != 0:  # the value is refused
            assert "error: " in process.stderr, override
            assert FIX.search(process.stderr), override
            assert not run_dir.exists(), override
