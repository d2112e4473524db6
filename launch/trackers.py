"""The trackers themselves, one context manager each, by its name in ``tracker.name``."""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

from launch.tracking import FINAL, SafeTracker, TrackedRun, Tracker
from recipes.core.errors import RecipeError, require_known
from recipes.core.versions import git_sha

WANDB_HOST = "https://api.wandb.ai"
MLFLOW_PARAMETERS = 100
"""The most that one request may hold."""
MLFLOW_LENGTH = 6000
"""Characters of a parameter."""


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
        yield Tracker(log)


@contextmanager
def wandb(run: TrackedRun) -> Iterator[Tracker]:
    """Weights & Biases: offline in ``<run>/wandb`` unless ``WANDB_MODE`` or a login says other.

    Machine facts are not sent: they hold the command line, and that may hold a secret.
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
            # Each task counts its own steps; the tracker's own would only go up.
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
        yield Tracker(log, keep)
    finally:
        started.finish()


def wandb_mode() -> Any:
    """The user's ``WANDB_MODE``; else online where there is a login, and offline elsewhere.

    Not ``wandb.login``, which asks the server and so fails without a network.
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
        yield Tracker(log, keep)
        ended = "FINISHED"
    except KeyboardInterrupt:
        ended = "KILLED"
        raise
    finally:
        with contextlib.suppress(library.MlflowException):  # the result does not hang on a server
            library.end_run(ended)


def _mlflow_run(run: TrackedRun) -> Any:
    """The run begun before, if this store has it, or a new one."""
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
    """Logs parameters; of a resumed run, one that changed becomes a tag, as it cannot be reset."""
    import mlflow as library

    wanted = {_mlflow_name(n): str(v)[:MLFLOW_LENGTH] for n, v in run.parameters.items()}
    new = [(name, value) for name, value in wanted.items() if name not in before]
    for start in range(0, len(new), MLFLOW_PARAMETERS):
        library.log_params(dict(new[start : start + MLFLOW_PARAMETERS]))
    changed = {f"now.{n}": v for n, v in wanted.items() if before.get(n, v) != v}
    library.set_tags({**_links(run), "recipe": run.recipe, **changed})


def _mlflow_name(name: str) -> str:
    """Names may hold letters, digits and a few signs."""
    return "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)


def _links(run: TrackedRun) -> dict[str, str]:
    """Where the run and its report are, and which code it ran."""
    report = run.run_dir / "report" / "artifact" / "report.html"
    return {
        "run_dir": str(run.run_dir.resolve()),
        "report": report.resolve().as_uri(),
        "commit": git_sha() or "unknown",
    }


TRACKERS: Mapping[
    str, tuple[Callable[[TrackedRun], AbstractContextManager[Tracker]], tuple[str, ...]]
] = {
    "tensorboard": (tensorboard, ("tensorboard",)),
    "wandb": (wandb, ("wandb",)),
    "mlflow": (mlflow, ("mlflow", "sqlalchemy", "alembic")),
}
"""Each with the modules that it needs."""


@contextmanager
def open_tracker(run: TrackedRun) -> Iterator[SafeTracker]:
    """Opens the tracker that the settings name, for the whole run; refuses if it does not start."""
    name = run.settings.get("name")
    if name is None:
        yield SafeTracker("", Tracker())
        return
    with ExitStack() as stack:
        try:
            tracker = stack.enter_context(TRACKERS[name][0](run))
        except Exception as error:
            raise RecipeError(
                f"tracker={name} did not begin ({type(error).__name__}: {error}).",
                "check its settings, or tracker=null",
            ) from error
        yield SafeTracker(name, tracker)


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
