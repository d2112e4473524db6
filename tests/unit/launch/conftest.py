"""Fixtures and overrides for tests of executors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import machine
from launch.executors import executor_of
from launch.plan import Plan
from tests.support.launcher import write_program
from tests.unit.conftest import RECIPE, Compose, MakePlan, complete_overrides

SLURM = ("cluster=slurm", "hardware=h100")
DOCKER = ("cluster=docker", "hardware=h100")
ENGINE_IMAGE = "cluster.images.tensorrt_llm=engine:1"
GENERATIVE_TASK = "stages.evaluate_served.tasks=[gsm8k_cot]"
"""A benchmark of generated answers: TensorRT-LLM's server gives no log-likelihoods of prompts."""
Prepare = Callable[..., tuple[Plan, Any]]
"""Takes overrides; returns the plan, as the executor prepared it, and the cluster's settings."""


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes this machine's folders from the environment, because job scripts contain paths."""
    for folder in ("home", "cache"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "home")
    for name in ("NEMO_RECIPES_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    for name in (*machine.HUB_FOLDERS, "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    write_program(tmp_path / "bin" / "docker", "exit 0")  # as if it had every image
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)


@pytest.fixture
def prepare(compose: Compose, plan: MakePlan, own_folders: None) -> Prepare:
    """Plans a run, lets its executor prepare the plan, and makes the stage directories."""

    def prepare(*overrides: str) -> tuple[Plan, Any]:
        executor, cluster = executor_of(compose(*complete_overrides(RECIPE, overrides)).cluster)
        prepared = executor.prepare(plan(*overrides), cluster)
        for stage in prepared.stages:
            stage.directory.mkdir(parents=True, exist_ok=True)
        return prepared, cluster

    return prepare
