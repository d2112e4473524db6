"""Tests the process that runs a stage, with the minimal stage ``STAGE``, and tests deadlines."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from recipes.core.errors import RecipeError
from recipes.core.files import MIN_FREE_BYTES, REPO_ROOT, storage_problem
from recipes.core.manifest import (
    ARTIFACT,
    MANIFEST,
    WORK,
    Outcome,
    check_artifact,
    read_manifest,
    stamp_files,
    write_manifest,
)
from recipes.core.metrics import METRICS, read_records
from recipes.core.run_state import InputRef, Request, Status, last_end, stage_state
from recipes.core.stage import DEADLINE, StageConfig, deadline, metrics_log, time_is_up
from recipes.core.stage_process import failure, start_command
from recipes.core.worker import _summary, run_stage
from tests.support.disks import small_disk
from tests.support.manifests import bare_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STAGE = """
import multiprocessing
import os
import time
from dataclasses import dataclass
from types import SimpleNamespace
from recipes.core.errors import RecipeError
from recipes.core.manifest import Outcome
from recipes.core.stage import StageConfig, metrics_log

@dataclass
class Result:
    input_files: dict[str, list[str]]  # names in each input's artifact folder, by input

@dataclass
class Config(StageConfig):
    text: str = "hello"
    fail: str = ""  # what goes wrong in ``run``; "large" fails only on a small disk

def run(cfg, inputs, out):
    metrics_log(out).progress("write", 1, 1)
    (out.parent / "state").write_text("step 1")  # outside the artifact, like a checkpoint
    (out / "sub").mkdir()
    (out / "sub" / "a.txt").write_text(cfg.text)
    if cfg.fail == "user":
        raise RecipeError("the text is bad", "write better")
    if cfg.fail == "bug":
        raise ValueError("a bug")
    if cfg.fail == "writer":
        raise CheckpointException("results_queue should not be empty")
    if cfg.fail == "large":
        (out / "large").write_bytes(bytes(300_000))
    if cfg.fail == "hang":
        start = time.monotonic()
        while time.monotonic() - start < 1.2 * cfg.resources.hang_timeout:
            time.sleep(0.1)
            metrics_log(out).log(step=1)
        wait_for_nothing()
    if cfg.fail == "kill":
        receiver, sender = multiprocessing.Pipe()
        run_child = lambda: (sender.send("started"), time.sleep(900))
        multiprocessing.get_context("fork").Process(target=run_child).start()
        receiver.recv()  # waits until the child runs
        os.kill(os.getpid(), 9)
    input_files = {name: sorted(os.listdir(item.artifact)) for name, item in inputs.items()}
    return Outcome(Result(input_files), parameters=5, tokenizer_sha256="t")

class CheckpointException(BaseException):
    pass  # has the name and base class of torch.distributed.checkpoint's exception

def wait_for_nothing():
    time.sleep(900)

STAGE = SimpleNamespace(run=run, config=Config, kind="dataset")
"""
"""Source of the module ``small_stage``."""
CHECKPOINT_ERROR = "a checkpoint was not written"


@pytest.fixture(autouse=True)
def importable_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets processes import the module ``small_stage``."""
    (tmp_path / "small_stage.py").write_text(STAGE)
    monkeypatch.setenv("PYTHONPATH", f"{REPO_ROOT}{os.pathsep}{tmp_path}")


def start_stage(
    directory: Path, inputs: dict[str, InputRef] | None = None, **config: Any
) -> subprocess.CompletedProcess[str]:
    """Runs ``small_stage`` as the launcher does. ``config`` sets fields of its ``Config``."""
    settings = {"stage": "small", **config}
    request = Request(directory.name, "fingerprint", "c", inputs or {}, settings)
    command = start_command("small_stage", request.write(directory), 1, sys.executable)
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def write_source_manifest(directory: Path) -> None:
    files = stamp_files(directory / ARTIFACT)
    write_manifest(directory, replace(bare_manifest("source", "dataset", None), files=files))


@pytest.fixture
def source(tmp_path: Path) -> InputRef:
    """A complete stage with one file, as an input of another stage."""
    directory = tmp_path / "source"
    (directory / ARTIFACT).mkdir(parents=True)
    (directory / ARTIFACT / "a.txt").write_text("hello")
    write_source_manifest(directory)
    return InputRef.of(directory)


def test_a_complete_stage_has_a_manifest_and_no_work(tmp_path: Path, source: InputRef) -> None:
    stage = tmp_path / "stage"
    done = start_stage(stage, {"data": source}, text="some words")
    assert done.returncode == 0, done.stderr
    manifest = check_artifact(stage, "dataset")
    assert list(manifest.files) == ["sub/a.txt"]
    assert manifest.stage == "small"
    assert manifest.fingerprint == "fingerprint"
    assert manifest.config == {"stage": "small", "text": "some words"}
    assert manifest.inputs == {"data": source.fingerprint}
    assert manifest.metrics == {"input_files": {"data": ["a.txt"]}}
    assert (manifest.code, manifest.parameters, manifest.tokenizer_sha256) == ("c", 5, "t")
    assert manifest.peak_rss_bytes > 1 << 20
    assert manifest.versions["python"] == sys.version.split()[0]
    assert not (stage / WORK).exists()
    assert [r["task"] for r in read_records(stage / METRICS)] == ["write"]


@pytest.mark.parametrize(
    ("fail", "summary", "output"),
    [
        ("user", "the text is bad\n  fix: write better", "the text is bad"),
        ("bug", "ValueError: a bug", "Traceback"),
        ("writer", CHECKPOINT_ERROR, "results_queue should not be empty"),
    ],
)
def test_a_failed_stage_says_why_and_keeps_the_old_result(
    source: InputRef, fail: str, summary: str, output: str
) -> None:
    stage = source.directory
    before = read_manifest(stage)
    done = start_stage(stage, fail=fail)
    assert done.returncode == 1
    assert output in done.stderr
    status, reason = last_end(stage) or (None, "")
    assert status is Status.FAILED
    assert reason.startswith(summary)
    assert check_artifact(stage) == before


def test_a_killed_stage_is_incomplete_and_keeps_its_work(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    # ``start`` returns only if the stage's child process dies, too: it holds the output pipe open.
    assert start_stage(stage, fail="kill").returncode == -9
    assert not (stage / MANIFEST).exists()
    assert not (stage / ARTIFACT).exists()
    assert (stage / WORK / "state").read_text() == "step 1"
    state = stage_state(stage)
    assert state.status is Status.INTERRUPTED
    assert state.begun is not None
    assert state.begun.fingerprint == "fingerprint"
    assert state.begun.config == {"stage": "small", "fail": "kill"}
    assert [record["task"] for record in state.progress()] == ["write"]


def test_a_hanging_stage_ends_and_says_where_it_hangs(tmp_path: Path) -> None:
    """The stage first records progress for longer than the timeout. This must not end the stage."""
    stage = tmp_path / "stage"
    done = start_stage(stage, fail="hang", resources={"hang_timeout": 4})
    assert done.returncode == 1
    assert stage_state(stage).status is Status.HUNG
    message = failure(stage, None)
    assert "it made no progress for resources.hang_timeout seconds" in message
    assert re.search(r"rank 0: .*small_stage\.py, line \d+, in wait_for_nothing\n", message)
    assert (stage / WORK / "state").read_text() == "step 1"
    assert start_stage(stage).returncode == 0
    assert not (stage / WORK).exists()


def test_a_full_disk_is_explained_and_a_larger_disk_completes_the_stage(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small") as disk:
        stage = disk.folder / "stage"
        assert start_stage(stage, fail="bug").returncode == 1
        disk.leave_free(65536)  # enough for a log and metrics, but not for the 300 kB of "large"
        assert start_stage(stage, fail="large").returncode == 1
        for text in (str(stage), "No space left on device", "free some space"):
            assert text in failure(stage, None)
        assert not (stage / MANIFEST).exists()
        disk.remount("size=2m")
        assert start_stage(stage, fail="large").returncode == 0


@pytest.mark.parametrize("write", [np.ndarray.tofile, lambda a, file: save_file({"a": a}, file)])
def test_errors_of_a_disk_that_is_too_small_are_explained(
    tmp_path: Path, write: Callable[[np.ndarray, Path], None]
) -> None:
    """After the error, the disk has free space, so the reason must come from the error itself.

    NumPy and safetensors check the space before they write, or delete the file that did not fit.
    """
    with small_disk(tmp_path / "small") as disk:
        with pytest.raises(Exception, match="space") as caught:
            write(np.zeros(32 << 20, np.uint8), disk.folder / "array")  # 32 MiB, the disk has 2
        assert shutil.disk_usage(disk.folder).free > MIN_FREE_BYTES
        message = str(storage_problem(caught.value, disk.folder))
    assert message.startswith(f"{disk.folder}: No space left on device.")


@pytest.fixture
def without_privileges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes inaccessible files in ``tmp_path``, the working directory. Replaces root by nobody."""
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # only root may enter the parent folders
    user = os.geteuid()
    for name in ("folder/read", "closed/read"):
        file = tmp_path / name
        file.parent.mkdir()
        file.touch(0o200)  # not readable
        file.parent.chmod(0o200 if "closed" in name else 0o555)  # 0o555: not writable
    os.seteuid(user or 65534)  # root (0) may access any file; 65534 is nobody
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.usefixtures("without_privileges")
@pytest.mark.parametrize(
    ("file", "mode", "fix"),
    [
        ("folder/read", "r", "readable"),
        ("closed/read", "r", "readable"),  # the folder may not be entered
        ("folder/new", "w", "writable"),
    ],
)
def test_a_permission_error_is_explained(file: str, mode: str, fix: str) -> None:
    with pytest.raises(PermissionError) as caught:
        Path(file).open(mode).close()
    message = str(storage_problem(caught.value, Path()))
    assert message.startswith(f"{file}: Permission denied.")
    assert f"make it {fix}" in message


@pytest.mark.parametrize(
    ("ranks", "summary"), [("2", "rank 1 lost its connection"), ("1", "RuntimeError")]
)
def test_a_lost_connection_points_to_another_rank_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: str, summary: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("RANK", "1")
    error = RuntimeError("gloo/transport/tcp/pair.cc:537 Read error: Connection reset by peer")
    assert _summary(error, tmp_path).startswith(summary)
    assert str(error) in _summary(error, tmp_path)


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    Request("stage", "f", "c", {}, {"stage": "small", "typo": 1}).write(tmp_path)
    with pytest.raises(RecipeError, match="stage has unknown settings: typo"):
        run_stage(lambda *_: Outcome(), StageConfig, "dataset", tmp_path)


def start_until_interrupted(directory: Path, source: InputRef) -> None:
    """Starts a stage with the input ``source`` in this process. Its work is interrupted."""

    def interrupt(*_: object) -> Outcome:
        raise KeyboardInterrupt

    Request("stage", "f", "c", {"data": source}, {"stage": "small"}).write(directory)
    with pytest.raises(KeyboardInterrupt):
        run_stage(interrupt, StageConfig, "dataset", directory)


def write_with_old_time(file: Path, text: str) -> None:
    """Changes a file, but neither its modification time nor, with 5 characters, its size."""
    stat = file.stat()
    file.write_text(text)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_inputs_are_hashed_until_a_start_accepts_them(tmp_path: Path, source: InputRef) -> None:
    write_with_old_time(source.directory / ARTIFACT / "a.txt", "jello")
    for _ in range(2):
        with pytest.raises(RecipeError, match=r"a\.txt \(changed\)"):
            start_until_interrupted(tmp_path / "stage", source)


def test_a_resumed_stage_does_not_hash_its_inputs_again(tmp_path: Path, source: InputRef) -> None:
    file = source.directory / ARTIFACT / "a.txt"
    start_until_interrupted(tmp_path / "stage", source)
    write_with_old_time(file, "jello")
    start_until_interrupted(tmp_path / "stage", source)  # without a hash, the change is not noticed
    file.write_text("a changed size")
    with pytest.raises(RecipeError, match=r"a\.txt \(changed\)"):
        start_until_interrupted(tmp_path / "stage", source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "report"}, "contains a dataset, but the input must be a report"),
        ({"fingerprint": "other"}, "changed after this stage was planned"),
    ],
)
def test_input_of_another_type_or_fingerprint_is_refused(
    tmp_path: Path, source: InputRef, change: dict[str, str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        start_until_interrupted(tmp_path / "stage", replace(source, **change))


def test_work_is_discarded_if_an_input_was_computed_again_with_other_content(
    tmp_path: Path, source: InputRef, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = tmp_path / "stage"
    checkpoint = stage / WORK / "checkpoint"
    start_until_interrupted(stage, source)
    checkpoint.touch()
    start_until_interrupted(stage, source)
    assert checkpoint.exists()
    assert capsys.readouterr().out == ""
    (source.directory / ARTIFACT / "b.txt").touch()
    write_source_manifest(source.directory)
    assert InputRef.of(source.directory) == source, "the fingerprint stays"
    start_until_interrupted(stage, source)
    assert not checkpoint.exists()
    assert "input data was replaced" in capsys.readouterr().out


def test_only_rank_0_writes_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    metrics_log(tmp_path / WORK / ARTIFACT).log(loss=1.0)
    assert not (tmp_path / METRICS).exists()


def test_time_is_up_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DEADLINE, raising=False)
    assert deadline() is None
    assert not time_is_up()
    monkeypatch.setenv(DEADLINE, str(int(time.time()) + 3600))
    assert not time_is_up()
    monkeypatch.setenv(DEADLINE, str(int(time.time()) - 1))
    assert time_is_up()


def test_an_invalid_deadline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEADLINE, "tomorrow")
    with pytest.raises(RecipeError, match="invalid STAGE_DEADLINE=tomorrow"):
        deadline()
