"""Trackers get the records of stages; these are the real libraries, offline."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
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
    Tracker,
    open_tracker,
    public_parameters,
    require_tracker,
    tracked_run,
)
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, MANIFEST
from recipes.core.metrics import METRICS, MetricsLog
from tests.support.results import STUDENT
from tests.unit.conftest import Launch, stage_named

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


def follow(plan: Plan, run: TrackedRun, records: Callable[[MetricsLog], None]) -> Tracker:
    stage = stage_named(plan, STAGE)
    with (
        open_tracker(run) as tracker,
        Follower(stage, Console(quiet=True), tracker.stage(STAGE)) as follower,
    ):
        records(MetricsLog(stage.directory / METRICS))
        follower.update()
        tracker.finish(STAGE, stage.directory, stage.directory / MANIFEST)
    return tracker


def third_step(log: MetricsLog) -> None:
    log.progress(STAGE, 3, 3, loss=1.0)


@pytest.fixture
def tracked(
    plan: Callable[..., Plan], compose: Callable[..., Any], complete: Callable[..., None]
) -> Tracked:
    """Makes a plan whose stages are complete, and what a tracker gets about it."""

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
    tags = board.Tags()["scalars"]
    scalars = {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}
    final = {tag: scalars.pop(tag) for tag in tags if tag.startswith("final/")}
    assert scalars == {
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


def test_wandb_offline_and_resumed(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library; its runs are wrapped, so that their calls are recorded."""
    import wandb

    wandb_runs, init = [], wandb.init

    def wrapped(**settings: Any) -> mock.Mock:
        wandb_runs.append(mock.Mock(wraps=init(**settings), settings=settings))
        return wandb_runs[-1]

    monkeypatch.setattr(wandb, "init", wrapped)
    planned, run = tracked("wandb")
    assert not follow(planned, run, first_steps).failed
    assert not follow(planned, run, third_step).failed
    assert len([*planned.run_dir.glob("wandb/offline-run-*/*.wandb")]) == 2
    first, second = wandb_runs
    assert [call.args[0] for call in first.log.call_args_list] == [
        {"distill/distill/loss": 2.0, "distill/distill/kd": 1.5, "distill/distill/lm": 0.5,
         "distill/distill/step": 1},
        {"distill/distill/kd": 0.5, "distill/distill/skipped": 1.0, "distill/distill/step": 2},
        {"distill/validate/val_loss": 1.25, "distill/validate/step": 2},
    ]  # fmt: skip
    second.log.assert_called_once_with({"distill/distill/loss": 1.0, "distill/distill/step": 3})
    first.define_metric.assert_any_call("distill/validate/*", step_metric="distill/validate/step")
    assert first.settings["id"] == second.settings["id"] == run.read_ids()["wandb"]
    assert first.settings["config"]["stages.prune.target_hidden_size"] == 0.875
    assert first.settings["config"]["run_dir"] == str(planned.run_dir)
    assert first.summary.update.call_args.args[0]["distill.parameters"] == STUDENT.parameters()
    artifact = first.log_artifact.call_args.args[0]
    assert [*artifact.manifest.entries] == [MANIFEST]


def test_mlflow_in_a_file_and_resumed(tracked: Tracked) -> None:
    from mlflow.tracking import MlflowClient

    planned, run = tracked("mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{planned.run_dir / 'mlflow.db'}")
    with pytest.raises(ValueError, match="stage"), open_tracker(run):
        raise ValueError("stage failed")
    run_id = json.loads((planned.run_dir / IDS).read_text())["mlflow"]
    assert client.get_run(run_id).info.status == "FAILED"
    follow(planned, run, first_steps)
    changed = replace(run, parameters={**run.parameters, "stages.distill.lr": 0.5})
    follow(planned, changed, third_step)
    experiment = client.get_experiment_by_name("nemo-recipes")
    assert experiment is not None
    [found] = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.status) == (run_id, "FINISHED")

    def history(name: str) -> list[tuple[int, float]]:
        metrics = client.get_metric_history(run_id, f"distill/{name}")
        return [(metric.step, metric.value) for metric in metrics]

    assert history("distill/loss") == [(1, 2.0), (3, 1.0)]
    assert history("distill/kd") == [(1, 1.5), (2, 0.5)]
    assert history("validate/val_loss") == [(2, 1.25)]
    assert found.data.metrics["distill/final/parameters"] == STUDENT.parameters()
    assert found.data.params["stages.prune.target_hidden_size"] == "0.875"
    assert found.data.params["stages.distill.lr"] == "0.0003"
    assert found.data.tags["now.stages.distill.lr"] == "0.5"
    assert found.data.tags["report"].endswith("/report/artifact/report.html")


def test_mlflow_gets_the_report_and_public_manifests(tracked: Tracked) -> None:
    from mlflow.tracking import MlflowClient

    planned, run = tracked("mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{planned.run_dir / 'mlflow.db'}")
    with lock.acquire(planned.run_dir) as set_stage, open_tracker(run) as tracker:
        for stage in planned.stages:
            (stage.directory / ARTIFACT / "report.html").write_text("<p>a page")
            with _follow(tracker, set_stage, planned, stage):
                pass
    run_id = run.read_ids()["mlflow"]
    assert [file.path for file in client.list_artifacts(run_id)] == ["export_hf", "report"]
    [page] = client.list_artifacts(run_id, "report")
    assert page.path == "report/report.html"
    stored = json.loads(
        Path(client.download_artifacts(run_id, f"export_hf/{MANIFEST}")).read_text()
    )
    manifest = json.loads((planned.run_dir / "export_hf" / MANIFEST).read_text())
    assert {**stored, "config": {}} == {**manifest, "config": {}}
    assert stored["config"]["recipe"] == manifest["config"]["recipe"]


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "tensorboard"])
def test_secrets_stay_out(tracked: Tracked, monkeypatch: pytest.MonkeyPatch, tracker: str) -> None:
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


def test_secret_values_are_replaced() -> None:
    names = ("hf_token", "password", "api_key", "TOKEN", "client_secret")
    secrets = public_parameters({"a": dict.fromkeys(names, "x")})
    assert dict(secrets) == {f"a.{name}": "(not shown)" for name in names}
    harmless = {"prompt_tokens": 3, "tokenizer": "t", "keep": True, "max_steps": 3}
    assert dict(public_parameters(harmless)) == harmless
    addresses = ["https://me:x@example.com/a.txt", "hf://a/b@en:train", "pypi://a==1:b"]
    shown = dict(public_parameters({"sources": addresses}))["sources"]
    assert shown == ["https://example.com/a.txt", *addresses[1:]]


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


def test_a_tracker_that_cannot_start_is_one_message(tracked: Tracked) -> None:
    _, run = tracked("mlflow", "tracker.uri=nonsense://x")
    message = r"(?s)mlflow did not start.*fix: .*tracker=null"
    with pytest.raises(RecipeError, match=message), open_tracker(run):
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


def test_unknown_and_missing_trackers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'tensorboard'"):
        require_tracker("tensorbord")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(RecipeError, match=r"needs wandb.*\n  fix: pip install '.\[wandb\]'"):
        require_tracker("wandb")
    require_tracker(None)


def test_tracker_needs_a_launcher_that_waits(launch: Launch) -> None:
    slurm = ("recipe=llama_width_prune", "cluster=slurm", "hardware=h100", "dry_run=true")
    refused = launch(*slurm, "tracker=tensorboard")
    assert refused.returncode == 1
    assert "add cluster.follow=true" in refused.stderr
    assert launch(*slurm, "tracker=tensorboard", "cluster.follow=true").returncode == 0


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
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=True)
    assert list((tmp_path / "tensorboard" / "s").iterdir())
