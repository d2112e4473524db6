"""Fixtures of the tests that need neither torch nor a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from launch import schema
from launch.plan import Plan, make_plan
from launch.planned import PlannedStage
from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import read_architecture
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import ARTIFACT, Manifest, read_manifest, stamp_files, write_manifest
from recipes.planning.chain import Chain

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
}
PERPLEXITIES = {"teacher": 10.0, "pruned": 30.0, "distilled": 15.0}
METRICS: dict[str, dict[str, Any]] = {
    "dataset": {"tokens": {"train": 1_000_000, "heldout": 200}},
    "eval_results": {
        "recovered": 0.75,
        **{role: {"perplexity": value} for role, value in PERPLEXITIES.items()},
    },
    "plan": {"figures": {"device-hours": 2, "hardware": "cpu", "dollars": 1}, "tables": []},
    "task_results": {
        "tasks": {
            "sciq": {
                "teacher": {"value": 0.8},
                "pruned": {"value": 0.5},
                "distilled": {"value": 0.7},
                "differences": {"distilled": {"value": -0.1, "low": -0.15, "high": -0.05}},
                "recovered": 0.6667,
            }
        }
    },
    "engine": {"backend": "openvino", "precision": "fp32"},
    "benchmark_results": {
        "speedups": [
            {"prefill": 1.25, "decode": 1.2, "backend": "openvino", "batch_size": 1},
        ],
    },
    "report": {"file": "report.html"},
}

COMPOSED: dict[tuple[str, ...], DictConfig] = {}
"""Composed configs, which nothing changes; composing one takes longer than a plan."""

Compose = Callable[..., DictConfig]
MakePlan = Callable[..., Plan]
Complete = Callable[..., None]
Launch = Callable[..., subprocess.CompletedProcess[str]]


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
    """A chain of that teacher, without stages."""
    return Chain("teacher", teacher, {})


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A Hugging Face folder as far as a plan looks into it."""
    folder = tmp_path / "hf_model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def compose() -> Iterator[Compose]:
    """Composes a config as the command line does."""
    schema.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf"), job_name="test"):

        def composed(*overrides: str) -> DictConfig:
            if overrides not in COMPOSED:
                COMPOSED[overrides] = hydra_compose(
                    "config", overrides=list(overrides), return_hydra_config=True
                )
            HydraConfig.instance().set_config(COMPOSED[overrides])
            return COMPOSED[overrides]

        yield composed


@pytest.fixture
def plan(compose: Compose, tmp_path: Path) -> MakePlan:
    """Plans a run of the width recipe, by default without benchmarks and engines."""

    def planned(*overrides: str, recipe: str = RECIPE) -> Plan:
        given = {override.partition("=")[0] for override in overrides}
        if recipe.endswith("_search"):
            given |= {"tasks", "engine"}  # which a search never has
        absent = [f"{group}=none" for group in ("tasks", "engine") if group not in given]
        return make_plan(compose(recipe, *absent, *overrides), tmp_path / "run")

    return planned


def write_complete(stage: PlannedStage, content: str = "result") -> None:
    """Writes what a stage leaves behind when it is complete."""
    artifact = stage.directory / ARTIFACT
    artifact.mkdir(parents=True, exist_ok=True)
    (artifact / "data.bin").write_text(f"{content} of {stage.name}")
    request = stage.request()
    kind = stage.stage.kind
    manifest = Manifest(
        stage=stage.config.stage,
        kind=kind,
        fingerprint=stage.fingerprint,
        config=request["config"],
        code=stage.code,
        inputs={name: ref.fingerprint for name, ref in stage.inputs.items()},
        files=stamp_files(artifact),
        metrics=METRICS.get(kind, {}),
        architecture=None,
        parameters=1_500_000 if kind.startswith("checkpoint") else None,
        tokenizer_sha256="t",
        versions={},
        git_sha=None,
        started_at="2025-01-01T00:00:00+00:00",
        seconds=1.0,
        peak_rss_bytes=10**9,
        input_content={
            name: found.content()
            for name, ref in stage.inputs.items()
            if (found := read_manifest(ref.directory))
        },
    )
    write_manifest(stage.directory, manifest)


@pytest.fixture
def complete() -> Complete:
    """Marks stages of a plan as complete: all, or those named."""

    def completed(plan: Plan, *names: str, content: str = "result") -> None:
        for stage in plan.stages:
            if not names or stage.name in names:
                write_complete(stage, content)

    return completed


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Runs the launcher as a user does, from another directory than the checkout."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()

    def launched(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "launch" / "run.py"), *args],
            cwd=cwd,
            env={**os.environ, "COLUMNS": "200", **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return launched
