"""Sends a stage's settings, progress records and results to an experiment tracker.

Rank 0 of the stage starts this module as a separate process, which reads the stage's
``metrics.jsonl``. A tracker that fails or waits for a network does not slow the stage. It may delay
the end of rank 0 by ``worker.TRACKER_SECONDS``, after the result is published.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import select
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError, require_known
from recipes.core.files import read_json, write_json
from recipes.core.manifest import ARTIFACT, MANIFEST, read_manifest
from recipes.core.metrics import METRICS, flatten, new_records
from recipes.core.run_state import TRACKER, Request, read_request

SECRET = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|key)$", re.IGNORECASE)
"""Matches the names of settings whose values are secrets, such as ``hf_token``."""
USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
"""Matches ``user:password@`` in a URL such as ``https://user:password@host``."""
BOOKKEEPING = ("time", "task", "done", "total")
"""Fields of a record that are not metrics."""
FINAL = "final"
"""Task name of a complete stage's results. Progress records have names such as ``evaluate``."""
REPORT = "report.html"
"""File in the artifact of the stage ``report``."""
MLFLOW_BATCH = 100
"""Maximum number of parameters in one request to MLflow."""
MLFLOW_CHARACTERS = 6000
"""Maximum length of a parameter in MLflow."""
MLFLOW_ID = "recipes_id"
"""Tag of an MLflow run with ``TrackedStage.id``. MLflow chooses its own ids."""
POLL_SECONDS = 1.0
"""Time between two reads of the metrics file."""
FINISHED = "FINISHED"
"""Status of a complete stage. The other statuses that the worker sends are FAILED and KILLED."""
STDIN = 0
"""File descriptor of the standard input stream."""


@dataclass(frozen=True)
class Tracker:
    """Functions of a tracker that has been started."""

    log: Callable[[str, Mapping[str, float], int, float], None]
    """Logs metrics. Takes the task, values by name, the step, and seconds since 1970."""
    close: Callable[[str], None]
    """Ends the connection. Takes the stage's status."""
    store: Callable[[str, str], None] = lambda name, content: None
    """Stores an artifact. Takes its file name and content."""


@dataclass(frozen=True)
class TrackedStage:
    """Everything that a tracker gets about a stage when the stage starts."""

    directory: Path
    request: Request
    run_id: str
    """Random id of the run directory, from ``tracker.json``."""
    recipe: str
    """Name of the run's recipe."""
    settings: Mapping[str, Any]
    """The tracker's own settings, ``tracker.*``."""

    @property
    def name(self) -> str:
        """The stage's name in the tracker."""
        return f"{self.directory.parent.name}/{self.request.name}"

    @property
    def id(self) -> str:
        """The stage's id in the tracker. A start that resumes the stage has the same id."""
        identity = (self.run_id, self.request.name, self.request.fingerprint)
        return hashlib.sha256(" ".join(identity).encode()).hexdigest()[:16]

    def parameters(self) -> dict[str, object]:
        """Returns the stage's settings by dotted name, without secrets."""
        return dict(public_parameters(self.request.config))

    def links(self) -> dict[str, str]:
        """Returns the paths of the run and its report, and the repository's commit."""
        run_dir = self.directory.parent.resolve()
        return {
            "run_dir": str(run_dir),
            "report": (run_dir / "report" / ARTIFACT / REPORT).as_uri(),
            "commit": self.request.git_sha or "unknown",
        }


def write_tracker(run_dir: Path, recipe: str, settings: Mapping[str, Any]) -> None:
    """Writes ``tracker.json``, which stages read when they start. Keeps an existing run id.

    ``settings`` is the config group ``tracker``, which is empty without a tracker.
    """
    file = run_dir / TRACKER
    old = read_json(file) if file.exists() else {}
    if settings or old:  # an old file must lose its settings if there is no tracker any more
        run_id = old.get("run_id") or uuid.uuid4().hex
        write_json(file, {"run_id": run_id, "recipe": recipe, "settings": dict(settings)})


def public_parameters(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields dotted names and values of settings, without secrets."""
    for name, value in values.items():
        if name == "env":  # yields only the names of environment variables
            yield f"{prefix}env", ", ".join(sorted(value or ()))
        elif isinstance(value, dict):
            yield from public_parameters(value, f"{prefix}{name}.")
        elif SECRET.search(str(name)) and value is not None:
            yield f"{prefix}{name}", "(not shown)"
        else:
            yield f"{prefix}{name}", _without_user(value)


def _without_user(value: object) -> object:
    """Removes user and password from URLs."""
    if isinstance(value, list):
        return [_without_user(item) for item in value]
    return USER_INFO.sub("", value) if isinstance(value, str) else value


def public_text(file: Path) -> str:
    """Returns a file's content. Removes secrets from the settings in a manifest."""
    text = file.read_text(encoding="utf-8")
    if file.name != MANIFEST:
        return text
    manifest = json.loads(text)
    return json.dumps({**manifest, "config": dict(public_parameters(manifest["config"]))}, indent=1)


def tensorboard(stage: TrackedStage) -> Tracker:
    """Starts TensorBoard logging to ``<run>/tensorboard/<stage>/<id>``."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder = stage.directory.parent / "tensorboard" / stage.request.name / stage.id
    writer = EventFileWriter(str(folder), flush_secs=10)

    def log(task: str, values: Mapping[str, float], step: int, seconds: float) -> None:
        scalars = [Summary.Value(tag=f"{task}/{n}", simple_value=v) for n, v in values.items()]
        writer.add_event(Event(wall_time=seconds, step=step, summary=Summary(value=scalars)))

    return Tracker(log, lambda status: writer.close())


def wandb(stage: TrackedStage) -> Tracker:
    """Starts logging to Weights & Biases.

    Without a login and without ``WANDB_MODE``, logs only to ``<run>/wandb``. Does not send data
    about the machine: these include the command line, which may contain secrets.
    """
    import wandb as library

    may_send = bool(os.environ.get("WANDB_MODE")) or library.login(prompt=False, verify=False)
    wandb_run = library.init(
        project=stage.settings["project"],
        entity=stage.settings["entity"],
        group=f"{stage.directory.parent.name}-{stage.run_id[:8]}",
        job_type=stage.request.name,
        name=stage.name,
        id=stage.id,
        resume="allow",
        dir=str(stage.directory.parent),
        mode=None if may_send else "offline",  # None: as in WANDB_MODE, by default "online"
        tags=[stage.recipe],
        config={**stage.parameters(), **stage.links()},
        settings=library.Settings(
            silent=True, console="off", x_disable_meta=True, disable_git=True, save_code=False
        ),
    )
    defined_tasks: set[str] = set()

    def log(task: str, values: Mapping[str, float], step: int, seconds: float) -> None:
        metrics = {f"{task}/{name}": value for name, value in values.items()}
        if task == FINAL:
            wandb_run.summary.update(metrics)
            return
        if task not in defined_tasks:
            # Each task has its own step metric, because wandb's global step must never decrease.
            defined_tasks.add(task)
            wandb_run.define_metric(f"{task}/step", hidden=True)
            wandb_run.define_metric(f"{task}/*", step_metric=f"{task}/step")
        wandb_run.log({**metrics, f"{task}/step": step})

    def store(name: str, content: str) -> None:
        artifact_type = name.partition(".")[0]  # "manifest" or "report"
        artifact = library.Artifact(f"{stage.request.name}-{stage.id}", artifact_type)
        with artifact.new_file(name, encoding="utf-8") as file:
            file.write(content)
        wandb_run.log_artifact(artifact)

    return Tracker(log, lambda status: wandb_run.finish(int(status != FINISHED)), store)


def mlflow(stage: TrackedStage) -> Tracker:
    """Starts logging to MLflow.

    The server is ``tracker.uri``, or by default ``MLFLOW_TRACKING_URI``. Without a server, logs to
    ``<run>/mlflow.db``.
    """
    import mlflow as library

    run_dir = stage.directory.parent.resolve()
    server = stage.settings["uri"] or os.environ.get("MLFLOW_TRACKING_URI")
    library.set_tracking_uri(server or f"sqlite:///{run_dir / 'mlflow.db'}")
    experiment_name = str(stage.settings["experiment"])
    if not server:
        # Stages may start at the same time, and MLflow creates the tables without a lock. The file
        # system supports this type of lock, because SQLite uses it, too.
        with (run_dir / "mlflow.lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if library.get_experiment_by_name(experiment_name) is None:
                library.create_experiment(experiment_name, (run_dir / "mlflow").as_uri())
    experiment = library.set_experiment(experiment_name).experiment_id
    # A stage that resumes continues the MLflow run of its earlier start.
    id_filter = f"tags.{MLFLOW_ID} = '{stage.id}'"
    old_runs = library.search_runs([experiment], id_filter, max_results=1, output_format="list")
    old_run_id = old_runs[0].info.run_id if old_runs else None
    mlflow_run = library.start_run(old_run_id, run_name=stage.name)
    library.set_tags(
        {MLFLOW_ID: stage.id, "run_id": stage.run_id, "recipe": stage.recipe, **stage.links()}
    )
    # MLflow cannot change parameters that an earlier start has logged.
    unlogged = [
        (_mlflow_name(name), str(value)[:MLFLOW_CHARACTERS])
        for name, value in stage.parameters().items()
        if _mlflow_name(name) not in mlflow_run.data.params
    ]
    for start in range(0, len(unlogged), MLFLOW_BATCH):
        library.log_params(dict(unlogged[start : start + MLFLOW_BATCH]))

    def log(task: str, values: Mapping[str, float], step: int, seconds: float) -> None:
        metrics = {_mlflow_name(f"{task}/{name}"): value for name, value in values.items()}
        library.log_metrics(metrics, step, timestamp=int(seconds * 1000))

    return Tracker(log, library.end_run, lambda name, content: library.log_text(content, name))


def _mlflow_name(name: str) -> str:
    """Replaces characters that MLflow does not allow in names."""
    return re.sub(r"[^\w\-. /:]", "_", name)


TRACKERS: Mapping[str, tuple[Callable[[TrackedStage], Tracker], tuple[str, ...]]] = {
    "tensorboard": (tensorboard, ("tensorboard",)),
    "wandb": (wandb, ("wandb",)),
    "mlflow": (mlflow, ("mlflow", "sqlalchemy", "alembic")),
}
"""For each tracker: the function that starts it, and the Python modules that it needs."""


def require_tracker(settings: Mapping[str, str | None], own_python: bool = True) -> None:
    """Checks the settings of the tracker.

    Args:
        settings: The config group ``tracker``; empty without a tracker.
        own_python: Whether stages run with this interpreter. If not, packages are not checked.

    Raises:
        RecipeError: The tracker is unknown or needs missing packages, or ``uri`` has a password.
    """
    name = settings.get("name")
    if name is None:  # no tracker
        return
    require_known(name, TRACKERS, f"tracker.name={name} is not known")
    _, modules = TRACKERS[name]
    missing_modules = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing_modules and own_python:
        raise RecipeError(
            f"tracker={name} needs {', '.join(missing_modules)}, which is not installed here.",
            f"pip install '.[{name}]' in this environment, or tracker=null",
        )
    if USER_INFO.search(settings.get("uri") or ""):
        raise RecipeError(
            "tracker.uri has a user name or password, which would be written to disk.",
            "leave it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )


def follow(stage_dir: Path, started: float, wait: Callable[[], str | None]) -> None:
    """Sends the records of a stage to the run's tracker until the stage ends.

    Args:
        stage_dir: The stage's directory.
        started: Time of this start, in seconds since 1970. Earlier starts have sent older records.
        wait: Waits for up to ``POLL_SECONDS``. Returns the status of a stage that has ended,
            otherwise ``None``.
    """
    run = read_json(stage_dir.parent / TRACKER)
    if (name := run["settings"].get("name")) is None:  # no tracker
        return
    # The keys of ``run`` are run_id, recipe and settings.
    stage = TrackedStage(stage_dir, read_request(stage_dir), **run)
    attempt = _error_catcher(name)
    start_tracker, _ = TRACKERS[name]
    tracker: Tracker | None = attempt(start_tracker, stage)
    if tracker is None:  # ``start_tracker`` failed
        return
    status, position = None, 0  # position in the metrics file
    while status is None:
        status = wait()
        records, position = new_records(stage_dir / METRICS, position)
        for record in records:
            values = _numbers(record, BOOKKEEPING)
            if values and record["time"] >= started:
                attempt(tracker.log, record["task"], values, record["done"], record["time"])
    if status == FINISHED:
        attempt(_finish, stage_dir, tracker)
    attempt(tracker.close, status)


def _error_catcher(name: str) -> Callable[..., Any]:
    """Returns a function ``attempt(function, *arguments)``, which calls ``function``.

    If the call raises an error, ``attempt`` returns ``None``. It prints only the first error, with
    the tracker's name.
    """
    errors: list[Exception] = []

    def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            errors.append(error)
            if len(errors) == 1:
                warning = f"warning: tracker {name} failed ({type(error).__name__}: {error})"
                print(f"{warning}; {METRICS} has all records", file=sys.stderr, flush=True)

    return attempt


def _numbers(values: Mapping[str, object], excluded: tuple[str, ...] = ()) -> dict[str, float]:
    """Returns the values that are numbers or booleans, as floats, without the excluded names."""
    items = values.items()
    return {k: float(v) for k, v in items if k not in excluded and isinstance(v, float | int)}


def _finish(stage_dir: Path, tracker: Tracker) -> None:
    """Sends a complete stage's results, time, memory and sizes, its manifest and any report."""
    manifest = read_manifest(stage_dir)
    if manifest is None:
        return
    resource_metrics = {
        "seconds": manifest.seconds,
        "peak_rss_bytes": manifest.peak_rss_bytes,
        "bytes": manifest.total_bytes(),
        "parameters": manifest.parameters,
    }
    results = dict(flatten({**manifest.metrics, **resource_metrics}))
    tracker.log(FINAL, _numbers(results), 0, time.time())
    for file in (stage_dir / MANIFEST, stage_dir / ARTIFACT / REPORT):
        if file.exists():
            tracker.store(file.name, public_text(file))


def main() -> None:
    """Sends records until the stage's worker writes a status to standard input, or dies."""
    stage_dir, started, timeout = sys.argv[1:]
    for stop_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop_signal, signal.SIG_IGN)  # this process ends only after the worker

    def wait() -> str | None:
        readable, _, _ = select.select([STDIN], [], [], POLL_SECONDS)
        if not readable:
            return None
        signal.alarm(int(timeout))  # kills this process if the tracker does not answer in time
        # If the worker died, standard input is closed and the status is empty.
        return os.read(STDIN, 100).decode() or "KILLED"

    follow(Path(stage_dir), float(started), wait)


if __name__ == "__main__":
    main()
