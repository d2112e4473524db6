"""Experiment trackers: parameters, every record that a stage writes, and its final results.

The launcher feeds a tracker from each stage's ``metrics.jsonl``. A stage knows of no tracker, and
its own record stays whole whatever happens to one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import netrc
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
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf

from recipes.core.errors import RecipeError, require_known
from recipes.core.files import read_json, write_json
from recipes.core.manifest import MANIFEST, Manifest, read_manifest
from recipes.core.metrics import Record, flat
from recipes.core.versions import git_sha

IDS = "tracker.json"
"""In the run directory: the run's id with each tracker, so that a resumed run continues it."""
SECRET = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|key)$", re.IGNORECASE)
USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
BOOKKEEPING = ("time", "task", "done", "total")
FINAL = "final"
"""Task under which a complete stage's results are logged, by their dotted names."""
WANDB_HOST = "https://api.wandb.ai"
MLFLOW_PARAMETERS = 100
"""The most parameters that one request may hold."""
MLFLOW_LENGTH = 6000
"""The most characters of a parameter."""

Track = Callable[[Record], None]
Log = Callable[[str, str, Mapping[str, float], int, float], None]
"""Takes a stage, a task, its numbers at a step, the step, and the time (seconds since 1970)."""
Keep = Callable[[str, str, str], None]
"""Takes a stage, and a name and content of a file to store as an artifact of the run."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of a run when it starts."""

    run_dir: Path
    recipe: str
    settings: Mapping[str, Any]
    """The tracker's own settings, ``tracker.*``."""
    parameters: Mapping[str, Any]
    """The resolved config by dotted names, without secrets."""

    def known_id(self, tracker: str) -> str | None:
        """The id that an earlier start of this run was given."""
        return self._ids().get(tracker)

    def remember_id(self, tracker: str, run_id: str) -> None:
        """Stores the id for the next start."""
        write_json(self.run_dir / IDS, {**self._ids(), tracker: run_id})

    def _ids(self) -> dict[str, str]:
        file = self.run_dir / IDS
        return read_json(file) if file.exists() else {}


def tracked_run(cfg: DictConfig, run_dir: Path, recipe: str) -> TrackedRun:
    """Returns what the chosen tracker will know of a run."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    settings = plain.pop("tracker", None) or {}
    return TrackedRun(run_dir, recipe, settings, dict(public_parameters(plain)))


def public_parameters(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields settings by dotted names; of environments only names, and nothing that is secret."""
    for name, value in values.items():
        if name == "env":
            yield f"{prefix}env", ", ".join(sorted(value or ()))
        elif isinstance(value, dict):
            yield from public_parameters(value, f"{prefix}{name}.")
        elif SECRET.search(str(name)) and value is not None:
            yield f"{prefix}{name}", "(not shown)"
        else:
            yield f"{prefix}{name}", _without_user(value)


def public_text(file: Path) -> str:
    """Returns what others may see of a file; a manifest holds its stage's settings."""
    text = file.read_text(encoding="utf-8")
    if file.name != MANIFEST:
        return text
    manifest = json.loads(text)
    return json.dumps({**manifest, "config": dict(public_parameters(manifest["config"]))}, indent=1)


def _without_user(value: object) -> object:
    """Removes passwords from addresses: ``https://user:password@host``."""
    if isinstance(value, list):
        return [_without_user(one) for one in value]
    return USER_INFO.sub("", value) if isinstance(value, str) else value


def results_of(manifest: Manifest) -> dict[str, float]:
    """Returns every number of a manifest, by dotted name."""
    cost = {
        "seconds": manifest.seconds,
        "peak_rss_bytes": manifest.peak_rss_bytes,
        "bytes": manifest.total_bytes(),
        "parameters": manifest.parameters,
    }
    values = flat({**manifest.metrics, **cost})
    return {name: float(value) for name, value in values if isinstance(value, int | float)}


@dataclass
class Tracker:
    """A tracker that cannot stop a run: its first error is reported, and it gets nothing more."""

    name: str
    log: Log = lambda *_: None
    keep: Keep = lambda *_: None
    failed: bool = False

    def stage(self, stage: str) -> Track:
        """Returns what logs the records of a stage."""

        def track(record: Record) -> None:
            values = {
                name: float(value)
                for name, value in record.items()
                if name not in BOOKKEEPING and isinstance(value, float | int)
            }
            self._try(self.log, stage, record["task"], values, record["done"], record["time"])

        return track

    def finish(self, stage: str, directory: Path, file: Path | None = None) -> None:
        """Logs the results of a complete stage, and stores a file of it."""
        manifest = read_manifest(directory)
        if manifest is not None:
            self._try(self.log, stage, FINAL, results_of(manifest), 0, time.time())
            if file is not None:
                self._try(lambda: self.keep(stage, file.name, public_text(file)))

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
    """Scalars of each stage in ``<run>/tensorboard/<stage>``."""
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
    """Weights & Biases: offline in ``<run>/wandb`` unless ``WANDB_MODE`` or a login says otherwise.

    Facts about the machine are not sent: they include the command line, which may hold a secret.
    """
    import wandb as library

    run_id = run.known_id("wandb") or uuid.uuid4().hex[:8]
    started = library.init(
        project=run.settings["project"],
        entity=run.settings["entity"],
        name=run.run_dir.name,
        id=run_id,
        resume="allow",
        dir=str(run.run_dir),
        mode=wandb_mode(),
        tags=[run.recipe],
        config={**run.parameters, **_links(run)},
        settings=library.Settings(
            silent=True, console="off", x_disable_meta=True, disable_git=True, save_code=False
        ),
    )
    run.remember_id("wandb", run_id)
    seen: set[str] = set()

    def log(stage: str, task: str, values: Mapping[str, float], step: int, at: float) -> None:
        if task == FINAL:
            started.summary.update({f"{stage}.{name}": value for name, value in values.items()})
            return
        place = f"{stage}/{task}"
        if place not in seen:
            # Each task counts its own steps; wandb's step can only increase.
            seen.add(place)
            started.define_metric(f"{place}/step", hidden=True)
            started.define_metric(f"{place}/*", step_metric=f"{place}/step")
        if values:
            named = {f"{place}/{name}": value for name, value in values.items()}
            started.log({**named, f"{place}/step": step})

    def keep(stage: str, name: str, content: str) -> None:
        kept = library.Artifact(f"{stage}-{run_id}", name.partition(".")[0])
        with kept.new_file(name, encoding="utf-8") as file:
            file.write(content)
        started.log_artifact(kept)

    try:
        yield Tracker("wandb", log, keep)
    finally:
        started.finish()


def wandb_mode() -> Any:
    """Returns the user's ``WANDB_MODE``, or else online with a login and offline without.

    ``wandb.login`` would ask the server, and fail without a network.
    """
    if chosen := os.environ.get("WANDB_MODE"):
        return chosen
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_HOST)).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(os.environ.get("NETRC") or None).authenticators(host):
            return "online"
    return "offline"


@contextmanager
def mlflow(run: TrackedRun) -> Iterator[Tracker]:
    """MLflow: ``MLFLOW_TRACKING_URI`` or ``tracker.uri``, else ``<run>/mlflow.db``."""
    import mlflow as library

    local = f"sqlite:///{run.run_dir.resolve() / 'mlflow.db'}"
    library.set_tracking_uri(run.settings["uri"] or os.environ.get("MLFLOW_TRACKING_URI") or local)
    started = _mlflow_run(run)
    run.remember_id("mlflow", started.info.run_id)
    _mlflow_parameters(started.data.params, run)
    ended = "FAILED"

    def log(stage: str, task: str, values: Mapping[str, float], step: int, at: float) -> None:
        named = {_mlflow_name(f"{stage}/{task}/{name}"): value for name, value in values.items()}
        library.log_metrics(named, step, timestamp=int(at * 1000))

    def keep(stage: str, name: str, content: str) -> None:
        library.log_text(content, f"{stage}/{name}")

    try:
        yield Tracker("mlflow", log, keep)
        ended = "FINISHED"
    except KeyboardInterrupt:
        ended = "KILLED"
        raise
    finally:
        with contextlib.suppress(library.MlflowException):  # the result does not hang on a server
            library.end_run(ended)


def _mlflow_run(run: TrackedRun) -> Any:
    """Continues the run of an earlier start if this store has it, or else creates one."""
    import mlflow as library

    if known := run.known_id("mlflow"):
        with contextlib.suppress(library.MlflowException):  # another store than the last time
            return library.start_run(run_id=known)
    name = run.settings["experiment"]
    if library.get_experiment_by_name(name) is None:
        library.create_experiment(name, (run.run_dir / "mlflow").resolve().as_uri())
    library.set_experiment(name)
    return library.start_run(run_name=run.run_dir.name)


def _mlflow_parameters(before: Mapping[str, str], run: TrackedRun) -> None:
    """Logs parameters; those that changed since an earlier start, which are fixed, become tags."""
    import mlflow as library

    wanted = {_mlflow_name(n): str(v)[:MLFLOW_LENGTH] for n, v in run.parameters.items()}
    new = [(name, value) for name, value in wanted.items() if name not in before]
    for start in range(0, len(new), MLFLOW_PARAMETERS):
        library.log_params(dict(new[start : start + MLFLOW_PARAMETERS]))
    changed = {f"now.{n}": v for n, v in wanted.items() if before.get(n, v) != v}
    library.set_tags({**_links(run), "recipe": run.recipe, **changed})


def _mlflow_name(name: str) -> str:
    """Replaces characters that MLflow does not allow in names."""
    return "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)


def _links(run: TrackedRun) -> dict[str, str]:
    """Returns where the run and its report are, and the commit that it ran."""
    report = run.run_dir / "report" / "artifact" / "report.html"
    return {
        "run_dir": str(run.run_dir.resolve()),
        "report": report.resolve().as_uri(),
        "commit": git_sha() or "unknown",
    }


Open = Callable[[TrackedRun], AbstractContextManager[Tracker]]
TRACKERS: Mapping[str, tuple[Open, tuple[str, ...]]] = {
    "tensorboard": (tensorboard, ("tensorboard",)),
    "wandb": (wandb, ("wandb",)),
    "mlflow": (mlflow, ("mlflow", "sqlalchemy", "alembic")),
}
"""By name, with the modules that each needs."""


@contextmanager
def open_tracker(run: TrackedRun) -> Iterator[Tracker]:
    """Opens the tracker that the settings name, for the whole run; refuses if it does not start."""
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
    """Raises ``RecipeError`` for an unknown tracker, or one whose package is not installed."""
    if name is None:
        return
    require_known(name, TRACKERS, f"tracker.name={name} is not known")
    _, needed = TRACKERS[name]
    missing = [module for module in needed if importlib.util.find_spec(module) is None]
    if missing:
        raise RecipeError(
            f"tracker={name} needs {', '.join(missing)}, which is not installed here.",
            f"pip install '.[{name}]' in this environment, or tracker=null",
        )
