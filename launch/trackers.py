"""Experiment trackers get a run's settings, every record of its stages, and their final results.

The launcher reads the records from each stage's ``metrics.jsonl``. Stages do not know the tracker,
so an error of a tracker affects neither them nor their records.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipes.core.errors import RecipeError, require_known
from recipes.core.files import read_json, write_json
from recipes.core.manifest import MANIFEST, read_manifest
from recipes.core.metrics import Record, flat
from recipes.core.versions import git_sha

IDS = "tracker.json"
"""File in the run directory with the run's id in each tracker, for the next start."""
SECRET = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|key)$", re.IGNORECASE)
USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
BOOKKEEPING = ("time", "task", "done", "total")
FINAL = "final"
"""Task name under which the results of a complete stage are logged."""
MLFLOW_BATCH = 100
"""Largest number of parameters in one request to MLflow."""
MLFLOW_CHARACTERS = 6000
"""Greatest length of a parameter in MLflow."""

Track = Callable[[Record], None]
Log = Callable[[str, str, Mapping[str, float], int, float], None]
"""Logs values; takes stage, task, values by name, step, and time in seconds since 1970."""
Store = Callable[[str, str, str], None]
"""Stores a file as an artifact; takes stage, file name and content."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker gets about a run when it starts."""

    run_dir: Path
    recipe: str
    settings: Mapping[str, Any]
    """The tracker's own settings, ``tracker.*``."""
    parameters: Mapping[str, Any]
    """The resolved config by dotted names, without secrets."""

    def read_ids(self) -> dict[str, str]:
        """Returns the ids that this run got from trackers at an earlier start."""
        file = self.run_dir / IDS
        return read_json(file) if file.exists() else {}

    def save_id(self, tracker: str, run_id: str) -> None:
        """Saves an id for the next start."""
        write_json(self.run_dir / IDS, {**self.read_ids(), tracker: run_id})

    def links(self) -> dict[str, str]:
        """Returns the addresses of the run and its report, and the repository's commit."""
        report = self.run_dir / "report" / "artifact" / "report.html"
        return {
            "run_dir": str(self.run_dir.resolve()),
            "report": report.resolve().as_uri(),
            "commit": git_sha() or "unknown",
        }


def tracked_run(cfg: DictConfig, run_dir: Path, recipe: str) -> TrackedRun:
    """Returns what the configured tracker gets about a run."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    settings = plain.pop("tracker", None) or {}
    return TrackedRun(run_dir, recipe, settings, dict(public_parameters(plain)))


def public_parameters(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields settings by dotted names, without secrets; of ``env`` only the variables' names."""
    for name, value in values.items():
        if name == "env":
            yield f"{prefix}env", ", ".join(sorted(value or ()))
        elif isinstance(value, dict):
            yield from public_parameters(value, f"{prefix}{name}.")
        elif SECRET.search(str(name)) and value is not None:
            yield f"{prefix}{name}", "(not shown)"
        else:
            yield f"{prefix}{name}", _without_user(value)


def _without_user(value: object) -> object:
    """Removes passwords from addresses: ``https://user:password@host``."""
    if isinstance(value, list):
        return [_without_user(item) for item in value]
    return USER_INFO.sub("", value) if isinstance(value, str) else value


def public_text(file: Path) -> str:
    """Returns the content of a file; of a manifest, which has settings, without secrets."""
    text = file.read_text(encoding="utf-8")
    if file.name != MANIFEST:
        return text
    manifest = json.loads(text)
    return json.dumps({**manifest, "config": dict(public_parameters(manifest["config"]))}, indent=1)


@dataclass
class Tracker:
    """Passes records to a tracker. Its first error is shown as a warning and ends the tracking."""

    name: str
    log: Log = lambda *_: None
    store: Store = lambda *_: None
    failed: bool = False

    def stage(self, stage: str) -> Track:
        """Returns a function that logs a record of a stage."""

        def track(record: Record) -> None:
            values = {
                name: float(value)
                for name, value in record.items()
                if name not in BOOKKEEPING and isinstance(value, float | int)
            }
            self._try(self.log, stage, record["task"], values, record["done"], record["time"])

        return track

    def finish(self, stage: str, directory: Path, file: Path | None = None) -> None:
        """Logs all numbers in the manifest of a complete stage, and stores one of its files."""
        manifest = read_manifest(directory)
        if manifest is None:
            return
        cost = {
            "seconds": manifest.seconds,
            "peak_rss_bytes": manifest.peak_rss_bytes,
            "bytes": manifest.total_bytes(),
            "parameters": manifest.parameters,
        }
        results = flat({**manifest.metrics, **cost})
        values = {name: float(value) for name, value in results if isinstance(value, int | float)}
        self._try(self.log, stage, FINAL, values, 0, time.time())
        if file is not None:
            self._try(lambda: self.store(stage, file.name, public_text(file)))

    def _try(self, act: Callable[..., None], *arguments: Any) -> None:
        if self.failed:
            return
        try:
            act(*arguments)
        except Exception as error:
            self.failed = True
            warnings.warn(
                f"tracker {self.name} failed ({type(error).__name__}: {error}); the run continues "
                "without it",
                stacklevel=2,
            )


@contextmanager
def tensorboard(run: TrackedRun) -> Iterator[Tracker]:
    """Writes scalars of each stage to ``<run>/tensorboard/<stage>``."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def log(stage: str, task: str, values: Mapping[str, float], step: int, at: float) -> None:
        if values:
            if stage not in writers:
                folder = run.run_dir / "tensorboard" / stage
                writers[stage] = stack.enter_context(closing(EventFileWriter(str(folder))))
            tagged = [Summary.Value(tag=f"{task}/{n}", simple_value=v) for n, v in values.items()]
            writers[stage].add_event(Event(wall_time=at, step=step, summary=Summary(value=tagged)))

    writers: dict[str, Any] = {}
    with ExitStack() as stack:
        yield Tracker("tensorboard", log)


@contextmanager
def wandb(run: TrackedRun) -> Iterator[Tracker]:
    """Weights & Biases: offline in ``<run>/wandb`` unless ``WANDB_MODE`` is set or a login exists.

    Facts about the machine are not sent: they include the command line, which may have a secret.
    """
    import wandb as library

    login = bool(os.environ.get("WANDB_MODE")) or library.login(prompt=False, verify=False)
    run_id = run.read_ids().get("wandb") or uuid.uuid4().hex[:8]
    wandb_run = library.init(
        project=run.settings["project"],
        entity=run.settings["entity"],
        name=run.run_dir.name,
        id=run_id,
        resume="allow",
        dir=str(run.run_dir),
        mode=None if login else "offline",  # without a mode, WANDB_MODE or else online
        tags=[run.recipe],
        config={**run.parameters, **run.links()},
        settings=library.Settings(
            silent=True, console="off", x_disable_meta=True, disable_git=True, save_code=False
        ),
    )
    run.save_id("wandb", run_id)
    tasks: set[str] = set()

    def log(stage: str, task: str, values: Mapping[str, float], step: int, at: float) -> None:
        if task == FINAL:
            wandb_run.summary.update({f"{stage}.{name}": value for name, value in values.items()})
            return
        prefix = f"{stage}/{task}"
        if prefix not in tasks:
            # Each task counts its own steps, but the step of wandb itself can only increase.
            tasks.add(prefix)
            wandb_run.define_metric(f"{prefix}/step", hidden=True)
            wandb_run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
        if values:
            named = {f"{prefix}/{name}": value for name, value in values.items()}
            wandb_run.log({**named, f"{prefix}/step": step})

    def store(stage: str, name: str, content: str) -> None:
        artifact = library.Artifact(f"{stage}-{run_id}", name.partition(".")[0])
        with artifact.new_file(name, encoding="utf-8") as file:
            file.write(content)
        wandb_run.log_artifact(artifact)

    try:
        yield Tracker("wandb", log, store)
    finally:
        wandb_run.finish()


@contextmanager
def mlflow(run: TrackedRun) -> Iterator[Tracker]:
    """MLflow: at ``tracker.uri`` or ``MLFLOW_TRACKING_URI``, else in ``<run>/mlflow.db``."""
    import mlflow as library

    local = f"sqlite:///{run.run_dir.resolve() / 'mlflow.db'}"
    library.set_tracking_uri(run.settings["uri"] or os.environ.get("MLFLOW_TRACKING_URI") or local)
    mlflow_run = _start_mlflow_run(run)
    run.save_id("mlflow", mlflow_run.info.run_id)
    _log_mlflow_parameters(run, mlflow_run.data.params)
    status = "FAILED"

    def log(stage: str, task: str, values: Mapping[str, float], step: int, at: float) -> None:
        named = {_mlflow_name(f"{stage}/{task}/{name}"): value for name, value in values.items()}
        library.log_metrics(named, step, timestamp=int(at * 1000))

    def store(stage: str, name: str, content: str) -> None:
        library.log_text(content, f"{stage}/{name}")

    try:
        yield Tracker("mlflow", log, store)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with contextlib.suppress(library.MlflowException):  # a lost server must not fail the run
            library.end_run(status)


def _start_mlflow_run(run: TrackedRun) -> Any:
    """Resumes the run of an earlier start if this server has it, or else creates a run."""
    import mlflow as library

    if run_id := run.read_ids().get("mlflow"):
        with contextlib.suppress(library.MlflowException):  # the earlier server was another one
            return library.start_run(run_id=run_id)
    name = run.settings["experiment"]
    if library.get_experiment_by_name(name) is None:
        library.create_experiment(name, (run.run_dir / "mlflow").resolve().as_uri())
    library.set_experiment(name)
    return library.start_run(run_name=run.run_dir.name)


def _log_mlflow_parameters(run: TrackedRun, before: Mapping[str, str]) -> None:
    """Logs parameters. MLflow cannot change those of an earlier start: changes become tags."""
    import mlflow as library

    values = {_mlflow_name(n): str(v)[:MLFLOW_CHARACTERS] for n, v in run.parameters.items()}
    new = [(name, value) for name, value in values.items() if name not in before]
    for start in range(0, len(new), MLFLOW_BATCH):
        library.log_params(dict(new[start : start + MLFLOW_BATCH]))
    changed = {f"now.{n}": v for n, v in values.items() if before.get(n, v) != v}
    library.set_tags({**run.links(), "recipe": run.recipe, **changed})


def _mlflow_name(name: str) -> str:
    """Replaces characters that MLflow does not allow in names."""
    return re.sub(r"[^\w\-. /:]", "_", name)


Open = Callable[[TrackedRun], AbstractContextManager[Tracker]]
TRACKERS: Mapping[str, tuple[Open, tuple[str, ...]]] = {
    "tensorboard": (tensorboard, ("tensorboard",)),
    "wandb": (wandb, ("wandb",)),
    "mlflow": (mlflow, ("mlflow", "sqlalchemy", "alembic")),
}
"""Trackers by name, with the modules that each needs."""


@contextmanager
def open_tracker(run: TrackedRun) -> Iterator[Tracker]:
    """Opens the configured tracker for the whole run; raises ``RecipeError`` if it cannot start."""
    name = run.settings.get("name")
    if name is None:
        yield Tracker("")
        return
    with ExitStack() as stack:
        try:
            tracker = stack.enter_context(TRACKERS[name][0](run))
        except Exception as error:
            raise RecipeError(
                f"tracker={name} did not start ({type(error).__name__}: {error}).",
                "check its settings, or tracker=null",
            ) from error
        yield tracker


def require_tracker(name: str | None) -> None:
    """Raises ``RecipeError`` for an unknown tracker, or one whose packages are not installed."""
    if name is None:
        return
    require_known(name, TRACKERS, f"tracker.name={name} is not known")
    _, modules = TRACKERS[name]
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise RecipeError(
            f"tracker={name} needs {', '.join(missing)}, which is not installed here.",
            f"pip install '.[{name}]' in this environment, or tracker=null",
        )
