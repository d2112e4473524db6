"""Tests a stage of two ranks, which torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import (
    ARTIFACT,
    WORK,
    Outcome,
    read_manifest,
    stamp_files,
    write_manifest,
)
from recipes.core.run_state import InputRef, Request, Status, stage_state
from recipes.core.stage import NEEDS_GPU, StageConfig
from recipes.core.stage_process import start_command
from recipes.core.versions import installed_versions
from recipes.core.worker import run_stage
from tests.support.manifests import bare_manifest

HASH_SECONDS, TIMEOUT_SECONDS = 12, 10
"""Duration of each hashing on rank 0, and the shorter timeout of collectives. The timeout is not
much shorter, because a rank may not run for seconds on a busy machine."""
STAGE = f"""
import os
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import torch

from recipes.core.manifest import Outcome
from recipes.core.stage import StageConfig, rank


def slow_and_only_on_rank_0(hash_files):
    def sleep_and_hash(*args, **kwargs):
        assert rank() == 0, "only rank 0 reads the files"
        time.sleep({HASH_SECONDS})
        return hash_files(*args, **kwargs)

    return sleep_and_hash


def run(cfg, inputs, out):
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    timeout = timedelta(seconds={TIMEOUT_SECONDS})
    torch.distributed.init_process_group("gloo", timeout=timeout)
    (out / f"rank-{{rank()}}").write_text(str(len(inputs)))
    return Outcome()


worker = sys.modules["__main__"]
worker.check_artifact = slow_and_only_on_rank_0(worker.check_artifact)
worker.stamp_files = slow_and_only_on_rank_0(worker.stamp_files)
STAGE = SimpleNamespace(run=run, config=StageConfig, kind="dataset")
"""


def run_on_two_ranks(request: Request, stage: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the module ``a_stage`` beside a stage's directory with torchrun."""
    return subprocess.run(
        start_command("a_stage", request.write(stage), 2, sys.executable),
        env={**os.environ, **env, "PYTHONPATH": f"{REPO_ROOT}{os.pathsep}{stage.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_ranks_wait_for_hashing_beyond_the_collective_timeout(tmp_path: Path) -> None:
    """The ranks are real processes. Only the duration of hashing is simulated."""
    source, stage = tmp_path / "source", tmp_path / "stage"
    for folder in (source / ARTIFACT, stage):
        folder.mkdir(parents=True)
    (source / ARTIFACT / "text").write_text("text")
    manifest = bare_manifest("source", "dataset", None)
    manifest.files = stamp_files(source / ARTIFACT)
    # Not the installed version, so the stage warns about its input.
    manifest.versions = installed_versions() | {"transformers": "4.0"}
    write_manifest(source, manifest)
    (tmp_path / "a_stage.py").write_text(STAGE)
    request = Request(
        name="stage",
        fingerprint="f",
        code="c",
        inputs={"data": InputRef.of(source)},
        config={"stage": "a"},
    )
    # The worker must disable TensorFloat-32 even if the environment enables it.
    done = run_on_two_ranks(request, stage, NVIDIA_TF32_OVERRIDE="1")
    assert done.returncode == 0, done.stderr
    result = read_manifest(stage)
    assert result is not None
    assert sorted(result.files) == ["rank-0", "rank-1"]  # each rank wrote its file
    assert done.stdout.count("(transformers 4.0 → ") == 1  # only rank 0 warns
    assert result.seconds >= 2 * HASH_SECONDS  # of the input, and of the result


STOPPING_STAGE = """
import time
from types import SimpleNamespace

from recipes.core.stage import StageConfig, StoppedByDeadlineError, rank


def run(cfg, inputs, out):
    if rank() == 0:
        time.sleep(5)
        (out.parent / "saved").touch()
    raise StoppedByDeadlineError("stopped at the deadline.", "")


STAGE = SimpleNamespace(run=run, config=StageConfig, kind="search_results")
"""
"""A stage without process groups, like a search. Rank 0 needs 5 s longer to save its work."""


def test_ranks_without_process_groups_wait_until_all_have_saved(tmp_path: Path) -> None:
    """If rank 1 ended at once, torchrun would kill rank 0."""
    stage = tmp_path / "stage"
    stage.mkdir()
    (tmp_path / "a_stage.py").write_text(STOPPING_STAGE)
    request = Request(name="stage", fingerprint="f", code="c", inputs={}, config={"stage": "a"})
    assert run_on_two_ranks(request, stage).returncode != 0
    assert (stage / WORK / "saved").exists()
    assert stage_state(stage).status is Status.STOPPED


def test_a_stage_with_more_ranks_than_gpus_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NEEDS_GPU, "h100")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(RecipeError, match=r"8 ranks, but PyTorch finds 4 GPU\(s\)"):
        run_stage(lambda *_: Outcome(), StageConfig, "dataset", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_a_stage_that_needs_a_gpu_does_not_run_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NEEDS_GPU, "h100")
    with pytest.raises(RecipeError, match="hardware=h100, but PyTorch finds no GPU"):
        run_stage(lambda *_: Outcome(), StageConfig, "dataset", tmp_path)
