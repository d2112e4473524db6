"""Fixtures of the tests that need neither torch nor a network."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from launch.plan import Plan, make_plan
from launch.planned import PlannedStage
from launch.settings import settings_of
from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import read_architecture
from recipes.core import versions
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import ARTIFACT, stamp_files, write_manifest
from recipes.core.run_state import LastPlan, content_of
from recipes.planning.chain import Chain
from recipes.planning.rules import Problem
from tests.support.composing import compose_from_cache
from tests.support.folders import write_folder
from tests.support.launcher import fork_launcher
from tests.support.manifests import bare_manifest
from tests.support.results import RESULTS, STUDENT

ROOT = REPO_ROOT
RECIPE = "recipe=llama_width_prune"
LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
Compose = Callable[..., DictConfig]
MakePlan = Callable[..., Plan]
Complete = Callable[..., None]
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def versions_read_once() -> Iterator[None]:
    """Caches the versions of installed packages: reading them takes half of the planning time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "installed_version", cache(versions.installed_version))
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def teacher() -> Architecture:
    """A small Llama: 4 layers, 8 heads in 4 groups."""
    return read_architecture(LLAMA_CONFIG, "teacher")


@pytest.fixture
def chain(teacher: Architecture) -> Chain:
    """A chain for planning, with ``teacher`` and without stages."""
    return Chain("teacher", teacher, {})


SMALL_STUDENT = ("stages.prune.target_hidden_size=64", "stages.prune.target_ffn_hidden_size=128")
"""Overrides with the sizes of a student of the model in ``hf_folder``: half of its widths."""


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with the files that a plan reads; the weights file is sparse."""
    return write_folder(tmp_path / "hf_model", LLAMA_CONFIG)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of about 80,000 tokens: less than the recipe trains on, and more than a batch."""
    (tmp_path / "text.txt").write_text("A line of text that says little.\n\n" * 10_000)
    return tmp_path / "text.txt"


@pytest.fixture
def compose() -> Compose:
    """Composes a config from overrides, as the command line does."""
    return compose_from_cache


@pytest.fixture
def plan(compose: Compose, tmp_path: Path, large_disk: None, versions_read_once: None) -> MakePlan:
    """Plans a recipe, by default the width recipe, as if the disk were large."""

    def plan_recipe(*overrides: str, recipe: str = RECIPE) -> Plan:
        cfg = compose(*complete_overrides(recipe, overrides))
        return make_plan(cfg, settings_of(cfg), tmp_path / "run")

    return plan_recipe


def complete_overrides(recipe: str, overrides: tuple[str, ...]) -> list[str]:
    """Adds ``tasks=null engine=null`` for small recipes, unless ``overrides`` set these groups."""
    is_small = recipe.endswith(("_prune", "shrink"))
    if not is_small:  # searches do not have these groups, and large recipes need them
        return [recipe, *overrides]
    overridden_groups = {override.partition("=")[0] for override in overrides}
    nulls = [f"{group}=null" for group in ("tasks", "engine") if group not in overridden_groups]
    return [recipe, *nulls, *overrides]


def stage_named(plan: Plan, name: str) -> PlannedStage:
    """Returns the stage of a plan that has the name."""
    return next(stage for stage in plan.stages if stage.name == name)


def notes_of(plan: Plan, rule: str) -> list[Problem]:
    """Returns the warnings of a plan that belong to a rule."""
    return [note for note in plan.notes if note.rule.name == rule]


def write_complete(stage: PlannedStage, content: str = "result") -> None:
    """Writes the request, artifact and manifest of a complete stage.

    The artifact is one file. Its text starts with ``content``, so that a test can make two results
    of a stage differ.
    """
    stage.request().write(stage.directory)
    artifact = stage.directory / ARTIFACT
    artifact.mkdir(parents=True, exist_ok=True)
    (artifact / "data.bin").write_text(f"{content} of {stage.name}")
    kind = stage.definition.kind
    manifest = replace(
        bare_manifest(stage.config.stage, kind, RESULTS.get(stage.config.stage)),
        fingerprint=stage.fingerprint,
        config=dict(stage.request().config),
        code=stage.code,
        libraries=dict(stage.libraries),
        kept=dict(stage.kept),
        devices=stage.devices,
        inputs={name: ref.fingerprint for name, ref in stage.inputs.items()},
        files=stamp_files(artifact),
        parameters=STUDENT.parameters() if kind.startswith("checkpoint") else None,
        input_content=content_of(stage.inputs),
    )
    write_manifest(stage.directory, manifest)


def write_last_plan(plan: Plan) -> None:
    """Writes the files that the launcher writes for a plan before it starts a stage."""
    for stage in plan.stages:
        stage.request().write(stage.directory)
    stages = {stage.name: stage.fingerprint for stage in plan.stages}
    LastPlan("llama_width_prune", stages).write(plan.run_dir)


@pytest.fixture
def complete() -> Complete:
    """Writes complete results of all stages of a plan, or only of the stages in ``names``."""

    def complete_stages(plan: Plan, *names: str, content: str = "result") -> None:
        for stage in plan.stages:
            if not names or stage.name in names:
                write_complete(stage, content)

    return complete_stages


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Runs ``fork_launcher`` in a directory outside the checkout."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()

    def launch_in_cwd(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return fork_launcher(*args, cwd=cwd, **env)

    return launch_in_cwd
