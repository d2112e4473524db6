"""Tests that trackers get the records of a stage. Uses the real libraries, offline."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.planned import PlannedStage
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT, read_json
from recipes.core.manifest import ARTIFACT, MANIFEST
from recipes.core.metrics import METRICS, MetricsLog
from recipes.core.run_state import TRACKER, Request
from recipes.core.stage import DEADLINE
from recipes.core.stage_process import start_command
from recipes.core.trackers import (
    FINISHED,
    follow,
    public_parameters,
    require_tracker,
    write_tracker,
)
from tests.support.results import STUDENT
from tests.unit.conftest import Launch, stage_named

SECRET = "hf_VerySecretToken"
KEY = "0123456789" * 4  # as long as an API key of wandb
STAGE = "distill"
SETTINGS: dict[str, dict[str, str | None]] = {
    "tensorboard": {"name": "tensorboard"},
    "wandb": {"name": "wandb", "project": "p", "entity": None},
    "mlflow": {"name": "mlflow", "uri": None, "experiment": "nemo-recipes"},
}
"""Settings of each tracker, as in the config group ``tracker``."""
WriteRecords = Callable[[MetricsLog], None]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hides this machine's logins and servers, and gives this process a secret."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # the file with wandb's logins
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(sys, "argv", ["run.py", f"cluster.env.HF_TOKEN={SECRET}"])


@pytest.fixture
def stage(plan: Callable[..., Any], complete: Callable[..., None]) -> PlannedStage:
    """A complete distillation stage. Its request has a secret."""
    planned = plan("+cluster.env.HF_TOKEN=x", f"+stages.distill.resources.env.API={SECRET}")
    complete(planned)
    distill = stage_named(planned, STAGE)
    distill.request().write(distill.directory)
    return distill


def first_steps(log: MetricsLog) -> None:
    """Writes records. Trackers get ``True`` as 1, and do not get values of ``None`` or text."""
    log.progress(STAGE, 1, 2, loss=2.0, kd=1.5, lm=0.5)
    log.progress(STAGE, 2, 2, loss=None, kd=0.5, skipped=True, note="x")
    log.progress("validate", 2, 2, val_loss=1.25)
    log.log(message="not progress")


def third_step(log: MetricsLog) -> None:
    log.progress(STAGE, 3, 3, loss=1.0)


def track(
    stage: PlannedStage, tracker: str, write_records: WriteRecords, last_status: str = FINISHED
) -> int:
    """Runs a tracker for one start of a stage, and checks that it writes no secrets.

    The start ends with ``last_status``. Returns the number of files that were written.
    """
    folder = stage.directory.parent.parent
    old_times = modification_times(folder)
    write_tracker(stage.directory.parent, "llama_width_prune", SETTINGS[tracker])
    # ``follow`` calls ``wait`` until it returns a status; the first call writes the records.
    statuses: Iterator[str | None] = iter([None, last_status])

    def wait() -> str | None:
        status = next(statuses)
        if status is None:
            write_records(MetricsLog(stage.directory / METRICS))
        return status

    started = time.time()
    # Times of records are rounded to milliseconds. No new record may seem older than ``started``.
    time.sleep(0.002)
    follow(stage.directory, started, wait)
    written = dict(modification_times(folder).items() - old_times.items())
    require_no_secrets(written)
    return len(written)


def modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def require_no_secrets(files: Iterable[Path]) -> None:
    for file in files:
        content = file.read_bytes()
        assert SECRET.encode() not in content, file
        assert KEY.encode() not in content, file


def test_tensorboard_has_every_number_of_every_record(stage: PlannedStage) -> None:
    # The tracker's settings, and at least one other file.
    assert track(stage, "tensorboard", first_steps) > 1
    [folder] = (stage.directory.parent / "tensorboard" / STAGE).iterdir()
    board = EventAccumulator(str(folder)).Reload()
    tags = board.Tags()["scalars"]
    scalars = {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}
    # Moves the stage's results, which have the task "final", to their own dict.
    final = {tag: scalars.pop(tag) for tag in tags if tag.startswith("final/")}
    assert scalars == {
        "distill/loss": [(1, 2.0)],
        "distill/kd": [(1, 1.5), (2, 0.5)],
        "distill/lm": [(1, 0.5)],
        "distill/skipped": [(2, 1.0)],
        "validate/val_loss": [(2, 1.25)],
    }
    assert final["final/parameters"] == [(0, STUDENT.parameters())]


def test_tensorboard_has_a_curve_for_each_training_run(stage: PlannedStage) -> None:
    """A resumed run continues its curve. A run with another fingerprint has its own curve."""
    for fingerprint in ("first", "first", "second"):
        replace(stage.request(), fingerprint=fingerprint).write(stage.directory)
        track(stage, "tensorboard", third_step)
    folders = [*(stage.directory.parent / "tensorboard" / STAGE).iterdir()]
    # Each start writes one file to the folder of its curve.
    assert sorted(len([*folder.iterdir()]) for folder in folders) == [1, 2]


def test_wandb_resumes_offline_runs(stage: PlannedStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wraps the runs of the real library to record their calls."""
    import wandb

    wandb_runs, init = [], wandb.init

    def init_and_record(**settings: Any) -> mock.Mock:
        wandb_runs.append(mock.Mock(wraps=init(**settings), settings=settings))
        return wandb_runs[-1]

    monkeypatch.setattr(wandb, "init", init_and_record)
    assert track(stage, "wandb", first_steps, "KILLED") > 1
    track(stage, "wandb", third_step)
    run_dir = stage.directory.parent
    assert len([*run_dir.glob("wandb/offline-run-*/*.wandb")]) == 2
    first, second = wandb_runs
    assert [call.args[0] for call in first.log.call_args_list] == [
        {"distill/loss": 2.0, "distill/kd": 1.5, "distill/lm": 0.5, "distill/step": 1},
        {"distill/kd": 0.5, "distill/skipped": 1.0, "distill/step": 2},
        {"validate/val_loss": 1.25, "validate/step": 2},
    ]
    second.log.assert_called_once_with({"distill/loss": 1.0, "distill/step": 3})
    first.define_metric.assert_any_call("validate/*", step_metric="validate/step")
    assert first.settings["id"] == second.settings["id"]
    assert first.settings["config"]["lr"] == 3e-4
    assert first.settings["config"]["run_dir"] == str(run_dir)
    assert first.settings["job_type"] == STAGE
    first.finish.assert_called_once_with(1)  # an exit code: the first start was killed
    second.finish.assert_called_once_with(0)
    assert not first.log_artifact.called
    assert second.summary.update.call_args.args[0]["final/parameters"] == STUDENT.parameters()
    artifact = second.log_artifact.call_args.args[0]
    assert [*artifact.manifest.entries] == [MANIFEST]


def test_mlflow_resumes_a_run_in_a_file(stage: PlannedStage) -> None:
    from mlflow.tracking import MlflowClient

    (stage.directory / ARTIFACT / "report.html").write_text("<p>a page")
    assert track(stage, "mlflow", first_steps, "FAILED") > 1
    client = MlflowClient(tracking_uri=f"sqlite:///{stage.directory.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("nemo-recipes")
    assert experiment is not None
    [first] = client.search_runs([experiment.experiment_id])
    assert first.info.status == "FAILED"
    track(stage, "mlflow", third_step)
    [resumed] = client.search_runs([experiment.experiment_id])
    run_id = resumed.info.run_id
    assert (run_id, resumed.info.status) == (first.info.run_id, "FINISHED")

    def history(name: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]

    assert history("distill/loss") == [(1, 2.0), (3, 1.0)]
    assert history("distill/kd") == [(1, 1.5), (2, 0.5)]
    assert history("validate/val_loss") == [(2, 1.25)]
    assert resumed.data.metrics["final/parameters"] == STUDENT.parameters()
    assert resumed.data.params["lr"] == "0.0003"
    assert resumed.data.tags["report"].endswith("/report/artifact/report.html")
    assert {file.path for file in client.list_artifacts(run_id)} == {MANIFEST, "report.html"}
    stored = json.loads(Path(client.download_artifacts(run_id, MANIFEST)).read_text())
    manifest = (stage.directory / MANIFEST).read_text()
    # Only the settings differ. ``track`` checks that the stored copy has no secrets.
    assert SECRET in manifest
    assert {**stored, "config": {}} == {**json.loads(manifest), "config": {}}


MLFLOW_START = """
import sys
from pathlib import Path
from recipes.core.run_state import Request
from recipes.core.trackers import TrackedStage, mlflow
import mlflow as library
directory, request = Path(sys.argv[1]), Request("stage", "f", "c", {}, {})
library.tracking.MlflowClient  # imports the client before any tracker starts
print("ready", flush=True)
sys.stdin.read()  # waits until the test closes the pipe, so that all processes continue at once
stage = TrackedStage(directory, request, "id", "recipe", {"uri": None, "experiment": "e"})
mlflow(stage).close("FINISHED")
"""


def test_stages_that_start_together_share_one_mlflow_database(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    processes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", MLFLOW_START, str(tmp_path / name)]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(
                command, cwd=REPO_ROOT, stdin=read_end, stdout=pipe, stderr=pipe, text=True
            )
        )
    os.close(read_end)
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    os.close(write_end)
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


def test_values_of_secret_settings_and_users_in_urls_are_removed() -> None:
    names = ("hf_token", "password", "api_key", "TOKEN", "client_secret")
    secrets = public_parameters({"a": dict.fromkeys(names, "x")})
    assert dict(secrets) == {f"a.{name}": "(not shown)" for name in names}
    harmless = {"prompt_tokens": 3, "tokenizer": "t", "keep": True, "max_steps": 3}
    assert dict(public_parameters(harmless)) == harmless
    sources = ["https://me:x@example.com/a.txt", "hf://a/b@en:train", "pypi://a==1:b"]
    public = dict(public_parameters({"sources": sources}))["sources"]
    assert public == ["https://example.com/a.txt", *sources[1:]]


def test_many_errors_of_a_tracker_give_one_warning(
    stage: PlannedStage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raise_error(*_: Any) -> None:
        raise OSError("no space left")

    writer = "tensorboard.summary.writer.event_file_writer.EventFileWriter.add_event"
    monkeypatch.setattr(writer, raise_error)
    track(stage, "tensorboard", first_steps)
    assert capsys.readouterr().err.count("tensorboard failed (OSError: no space left)") == 1


def test_wandb_is_offline_without_a_login(
    stage: PlannedStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``mode=None``, wandb reads ``WANDB_MODE``."""
    import wandb

    init = mock.Mock()
    monkeypatch.setattr(wandb, "init", init)
    for logged_in, variable, mode in (
        (False, None, "offline"),
        (True, None, None),
        (False, "disabled", None),  # last, because the variable stays set
    ):
        monkeypatch.setattr(wandb, "login", mock.Mock(return_value=logged_in))
        if variable:
            monkeypatch.setenv("WANDB_MODE", variable)
        track(stage, "wandb", third_step)
        assert init.call_args.kwargs["mode"] == mode


def test_unusable_trackers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'tensorboard'"):
        require_tracker({"name": "tensorbord"})
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_PASSWORD"):
        require_tracker({**SETTINGS["mlflow"], "uri": "https://me:x@example.com"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(RecipeError, match=r"needs wandb.*\n  fix: pip install '.\[wandb\]'"):
        require_tracker({"name": "wandb"})
    require_tracker({"name": "wandb"}, own_python=False)  # packages in an image cannot be checked
    require_tracker({})


WORKER_STAGE = f"""
import sys
from types import SimpleNamespace

from recipes.core.manifest import Outcome
from recipes.core.stage import StageConfig, StoppedByDeadlineError, metrics_log, time_is_up


def run(cfg, inputs, out):
    # The worker, which is the main module, kills a tracker that does not end within this time.
    sys.modules["__main__"].TRACKER_SECONDS = 20
    stopped = time_is_up()
    metrics_log(out).progress("{STAGE}", 1 if stopped else 2, 2, loss=1.0)
    if stopped:
        raise StoppedByDeadlineError("stopped", "run again")
    return Outcome()


STAGE = SimpleNamespace(run=run, config=StageConfig, kind="dataset")
"""


def run_worker(tmp_path: Path, settings: dict[str, str | None], **env: str) -> str:
    """Runs the stage of ``WORKER_STAGE`` with a tracker, and returns its standard error."""
    stage = tmp_path / "run" / "stage"
    (tmp_path / "a_stage.py").write_text(WORKER_STAGE)
    file = Request("stage", "f", "c", {}, {"stage": "a"}).write(stage)
    write_tracker(stage.parent, "r", settings)
    python_path = f"{REPO_ROOT}{os.pathsep}{tmp_path}"
    command = start_command("a_stage", file, 1, sys.executable)
    environment = {**os.environ, "PYTHONPATH": python_path, **env}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    # A stage that stops at its deadline exits with status 1.
    assert done.returncode == bool(env.get(DEADLINE)), done.stderr
    return done.stderr


def test_a_requeued_job_continues_its_wandb_run(tmp_path: Path) -> None:
    """The first job stops at its deadline, and the second job completes the stage.

    Both know the API key of wandb, which may be in no file.
    """
    login = {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}
    for env in ({DEADLINE: "1"}, {}):  # a deadline in 1970 has passed
        log = run_worker(tmp_path, SETTINGS["wandb"], **login, **env)
        assert "warning: tracker" not in log
    require_no_secrets(modification_times(tmp_path))
    folders = [file.parent.name for file in tmp_path.glob("run/wandb/offline-run-*/*.wandb")]
    assert len(folders) == 2
    run_ids = {folder.rpartition("-")[2] for folder in folders}  # offline-run-TIME-ID
    assert len(run_ids) == 1


def test_a_tracker_without_network_does_not_stop_the_stage(tmp_path: Path) -> None:
    uri = "http://127.0.0.1:9"  # refuses connections
    settings = {**SETTINGS["mlflow"], "uri": uri}
    log = run_worker(tmp_path, settings, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert log.count("warning: tracker mlflow failed") == 1
    assert (tmp_path / "run" / "stage" / MANIFEST).exists()


def test_a_tracker_that_does_not_answer_does_not_stop_the_stage(tmp_path: Path) -> None:
    """The server accepts connections, but never answers. The worker kills the tracker."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        run_worker(tmp_path, {**SETTINGS["mlflow"], "uri": uri})
    assert (tmp_path / "run" / "stage" / MANIFEST).exists()


def test_the_launcher_writes_which_tracker_the_jobs_use(launch: Launch, tmp_path: Path) -> None:
    slurm = ("recipe=llama_width_prune", "cluster=slurm", "hardware=h100", "dry_run=true")
    file = tmp_path / "cwd" / "runs" / "llama_width_prune" / TRACKER
    for overrides, settings in ((["tracker=tensorboard"], SETTINGS["tensorboard"]), ([], {})):
        assert launch(*slurm, *overrides).returncode == 0
        assert read_json(file)["settings"] == settings


def test_a_run_keeps_its_id_when_its_tracker_changes(tmp_path: Path) -> None:
    write_tracker(tmp_path, "r", {})
    assert not (tmp_path / TRACKER).exists()
    run_ids = set()
    for name in ("tensorboard", "wandb"):
        write_tracker(tmp_path, "r", SETTINGS[name])
        run_ids.add(read_json(tmp_path / TRACKER)["run_id"])
    assert len(run_ids) == 1


def test_trackers_do_not_import_torch() -> None:
    code = "import sys, recipes.core.trackers\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, check=True)
