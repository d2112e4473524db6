"""Trackers get what a stage records, from a file that any run has; the real libraries, offline."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import lock, trackers
from launch.plan import Plan
from launch.progress import Follower
from launch.run import _follow
from launch.trackers import (
    IDS,
    TrackedRun,
    open_tracker,
    public_parameters,
    require_tracker,
    tracked_run,
)
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, MANIFEST
from recipes.core.metrics import METRICS, MetricsLog
from tests.support.results import STUDENT

SECRET = "hf_VerySecretToken"
STAGE = "distill"
Tracked = Callable[..., tuple[Plan, TrackedRun]]


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def first_steps(log: MetricsLog) -> None:
    log.progress(STAGE, 1, 2, loss=2.0, kd=1.5, lm=0.5)
    log.progress(STAGE, 2, 2, loss=None, kd=0.5, skipped=True, note="x")
    log.progress("validate", 2, 2, val_loss=1.25)
    log.log(message="not progress")


def follow(plan: Plan, run: TrackedRun, records: Callable[[MetricsLog], None]) -> None:
    stage = next(stage for stage in plan.stages if stage.name == STAGE)
    stage.directory.mkdir(parents=True, exist_ok=True)
    with (
        open_tracker(run) as tracker,
        Follower(stage, Console(quiet=True), tracker.stage(STAGE)) as follower,
    ):
        records(MetricsLog(stage.directory / METRICS))
        follower.update()
        tracker.finish(STAGE, stage.directory, stage.directory / MANIFEST)


@pytest.fixture
def tracked(
    plan: Callable[..., Plan], compose: Callable[..., Any], complete: Callable[..., None]
) -> Tracked:
    """A plan whose stages are complete, and what a tracker is told of it."""

    def made(tracker: str, *overrides: str) -> tuple[Plan, TrackedRun]:
        planned = plan(f"tracker={tracker}", *overrides)
        complete(planned)
        cfg = compose("recipe=llama_width_prune", f"tracker={tracker}", *overrides)
        return planned, tracked_run(cfg, planned.run_dir, "llama_width_prune")

    return made


def test_tensorboard_has_every_term_of_every_step(tracked: Tracked) -> None:
    planned, run = tracked("tensorboard")
    follow(planned, run, first_steps)
    board = EventAccumulator(str(planned.run_dir / "tensorboard" / STAGE)).Reload()
    found = {
        tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]
    }
    final = {tag: found.pop(tag) for tag in list(found) if tag.startswith("final/")}
    assert found == {
        "distill/loss": [(1, 2.0)],
        "distill/kd": [(1, 1.5), (2, 0.5)],
        "distill/lm": [(1, 0.5)],
        "distill/skipped": [(2, 1.0)],
        "validate/val_loss": [(2, 1.25)],
    }
    assert final["final/parameters"] == [(0, STUDENT.parameters())]
    assert not math.isnan(board.Scalars("distill/loss")[0].wall_time)


def test_no_tracker_leaves_nothing(tracked: Tracked) -> None:
    planned, run = tracked("null")
    before = {path.name for path in planned.run_dir.iterdir()}
    follow(planned, run, lambda log: log.progress(STAGE, 1, 2, loss=2.0))
    assert {path.name for path in planned.run_dir.iterdir()} == before


def wandb_records(run_dir: Path) -> list[list[Any]]:
    """What each offline run wrote: wandb's own messages in a LevelDB log, its file format."""
    return [whole(file) for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))]


def whole(file: Path) -> list[Any]:
    """Messages of a file up to its last one, which wandb's process may write a little later."""
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        records = [
            wandb_internal_pb2.Record.FromString(payload)
            for payload in leveldb_log(file.read_bytes())
        ]
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    pytest.fail(f"{file} does not end")


def leveldb_log(data: bytes, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    """Records of a log: chunks of (checksum, length, whole or first, middle, last) in blocks."""
    assert data.startswith(b":W&B")
    position, parts = header, b""
    while position + header <= len(data):
        if block - position % block < header:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb_history(records: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]


def wandb_items(records: list[Any], kind: str, inner: Callable[[Any], Any]) -> dict[str, Any]:
    return {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == kind
        for item in inner(record)
    }


def test_wandb_offline_and_resumed(tracked: Tracked) -> None:
    planned, run = tracked("wandb")
    follow(planned, run, first_steps)
    follow(planned, run, lambda log: log.progress(STAGE, 3, 3, loss=1.0))
    first, second = wandb_records(planned.run_dir)
    assert wandb_history(first) == [
        {"distill/distill/loss": 2.0, "distill/distill/kd": 1.5, "distill/distill/lm": 0.5,
         "distill/distill/step": 1},
        {"distill/distill/kd": 0.5, "distill/distill/skipped": 1.0, "distill/distill/step": 2},
        {"distill/validate/val_loss": 1.25, "distill/validate/step": 2},
    ]  # fmt: skip
    assert wandb_history(second) == [{"distill/distill/loss": 1.0, "distill/distill/step": 3}]
    ids = {r.run.run_id for records in (first, second) for r in records if r.HasField("run")}
    assert ids == {json.loads((planned.run_dir / IDS).read_text())["wandb"]}
    summary = wandb_items(first, "summary", lambda r: r.summary.update)
    assert summary["distill.parameters"] == STUDENT.parameters()
    [artifact] = [r.artifact for r in first if r.WhichOneof("record_type") == "artifact"]
    assert artifact.name == f"{STAGE}-{ids.pop()}"
    assert [entry.path for entry in artifact.manifest.contents] == [MANIFEST]
    config = wandb_items(first, "run", lambda r: r.run.config.update)
    assert config["stages.prune.target_hidden_size"] == 0.875
    assert config["run_dir"] == str(planned.run_dir)


def test_mlflow_in_a_file_and_resumed(tracked: Tracked) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install '.[mlflow]'")
    pytest.importorskip("alembic", reason="mlflow's SQL storage: pip install '.[mlflow]'")
    from mlflow.tracking import MlflowClient

    planned, run = tracked("mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{planned.run_dir / 'mlflow.db'}")
    with pytest.raises(ValueError, match="stage"), open_tracker(run):
        raise ValueError("stage failed")
    known = json.loads((planned.run_dir / IDS).read_text())["mlflow"]
    assert client.get_run(known).info.status == "FAILED"
    follow(planned, run, first_steps)
    changed = replace(run, parameters={**run.parameters, "stages.distill.lr": 0.5})
    follow(planned, changed, lambda log: log.progress(STAGE, 3, 3, loss=1.0))
    experiment = client.get_experiment_by_name("nemo-recipes")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.status) == (known, "FINISHED")

    def history(name: str) -> list[tuple[int, float]]:
        key = f"distill/{name}"
        return [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, key)]

    assert history("distill/loss") == [(1, 2.0), (3, 1.0)]
    assert history("distill/kd") == [(1, 1.5), (2, 0.5)]
    assert history("validate/val_loss") == [(2, 1.25)]
    assert found.data.metrics["distill/final/parameters"] == STUDENT.parameters()
    with lock.acquire(planned.run_dir) as set_stage, open_tracker(run) as tracker:
        for stage in planned.stages:
            (stage.directory / ARTIFACT / "report.html").write_text("<p>a page")
            with _follow(tracker, set_stage, planned, stage):
                pass
    assert sorted(file.path for file in client.list_artifacts(known)) == [
        STAGE,
        "export_hf",
        "report",
    ]
    [page] = client.list_artifacts(known, "report")
    assert page.path == "report/report.html"
    [artifact] = client.list_artifacts(known, STAGE)
    kept = json.loads(Path(client.download_artifacts(known, artifact.path)).read_text())
    manifest = json.loads((planned.run_dir / STAGE / MANIFEST).read_text())
    assert {**kept, "config": {}} == {**manifest, "config": {}}
    assert kept["config"]["lr"] == manifest["config"]["lr"]
    assert found.data.params["stages.prune.target_hidden_size"] == "0.875"
    assert found.data.params["stages.distill.lr"] == "0.0003"
    assert found.data.tags["now.stages.distill.lr"] == "0.5"
    assert found.data.tags["report"].endswith("/report/artifact/report.html")


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "tensorboard"])
def test_secrets_stay_out(tracked: Tracked, monkeypatch: pytest.MonkeyPatch, tracker: str) -> None:
    if tracker == "mlflow":
        pytest.importorskip("mlflow", reason="mlflow is not installed: pip install '.[mlflow]'")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(sys, "argv", ["run.py", f"cluster.env.HF_TOKEN={SECRET}"])
    planned, run = tracked(
        tracker,
        f"+cluster.env.HF_TOKEN={SECRET}",
        f"+stages.distill.resources.env.API={SECRET}",
    )
    assert "HF_TOKEN" in run.parameters["cluster.env"].split(", ")
    known = {path for path in planned.run_dir.rglob("*") if path.is_file()}
    follow(planned, run, first_steps)
    written = [p for p in planned.run_dir.rglob("*") if p.is_file() and p not in known]
    assert len(written) > 1
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["hf_token", "password", "api_key", "TOKEN", "client_secret"])
def test_secret_names(name: str) -> None:
    assert dict(public_parameters({"a": {name: "x"}})) == {f"a.{name}": "(not shown)"}


def test_addresses_lose_their_passwords() -> None:
    given = {"sources": ["https://me:x@example.com/a.txt", "hf://a/b@en:train", "pypi://a==1:b"]}
    shown = dict(public_parameters(given))["sources"]
    assert shown == ["https://example.com/a.txt", *given["sources"][1:]]


@pytest.mark.parametrize("name", ["prompt_tokens", "tokenizer", "keep", "max_steps"])
def test_names_that_hold_no_secret(name: str) -> None:
    assert dict(public_parameters({name: 3})) == {name: 3}


def test_a_tracker_that_fails_does_not_stop_the_run(
    tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no space left")

    writer = "tensorboard.summary.writer.event_file_writer.EventFileWriter.add_event"
    monkeypatch.setattr(writer, fails)
    planned, run = tracked("tensorboard")
    with pytest.warns(UserWarning, match="tensorboard failed .OSError: no space left") as caught:
        follow(planned, run, first_steps)
    assert sum("tracker" in str(w.message) for w in caught if w.category is UserWarning) == 1


def test_a_tracker_that_does_not_begin_is_one_message(tracked: Tracked) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install '.[mlflow]'")
    _, run = tracked("mlflow", "tracker.uri=nonsense://x")
    with (
        pytest.raises(RecipeError, match=r"(?s)mlflow did not start.*fix: .*tracker=null"),
        open_tracker(run),
    ):
        pass


@pytest.mark.parametrize(
    ("env", "login", "mode"),
    [({}, False, "offline"), ({}, True, None), ({"WANDB_MODE": "disabled"}, False, None)],
)
def test_wandb_is_offline_without_a_login(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str],
    login: bool,
    mode: str | None,
) -> None:
    """Without a mode, wandb itself reads ``WANDB_MODE``."""
    import wandb

    init = mock.Mock()
    monkeypatch.setattr(wandb, "login", lambda **_: login)
    monkeypatch.setattr(wandb, "init", init)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    settings = {"name": "wandb", "project": "p", "entity": None}
    with open_tracker(TrackedRun(tmp_path, "r", settings, {})):
        pass
    assert init.call_args.kwargs["mode"] == mode


def test_an_unknown_tracker_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'tensorboard'"):
        require_tracker("tensorbord")


def test_a_missing_package_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(RecipeError, match=r"needs wandb.*\n  fix: pip install '.\[wandb\]'"):
        require_tracker("wandb")
    require_tracker(None)


def test_trackers_need_no_torch(tmp_path: Path, root: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from launch.trackers import TrackedRun, open_tracker\n"
        "run = TrackedRun(pathlib.Path(sys.argv[1]), 'r', {'name': 'tensorboard'}, {})\n"
        "with open_tracker(run) as tracker:\n"
        "    tracker.stage('s')({'task': 't', 'done': 1, 'total': 1, 'time': 0.0, 'x': 1.0})\n"
        "import launch.run, wandb\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tensorboard" / "s").iterdir())
