"""Experiment trackers: parameters, every record a stage writes, and its final figures.

The launcher feeds them from each stage's ``metrics.jsonl``, so a stage knows of none of them, and
its own record stays whole whatever happens to a tracker: one that fails is reported once and left.
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipes.core.files import write_text_atomically
from recipes.core.manifest import MANIFEST, Manifest, read_manifest
from recipes.core.metrics import Record, flat

Track = Callable[[Record], None]
IDS = "tracker.json"
"""In the run directory: the run's id with each tracker, so that a resumed run continues it."""
SECRET = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|key)$", re.IGNORECASE)
USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
BOOKKEEPING = ("time", "task", "done", "total")
FINAL = "final"
"""The task that a complete stage's figures are of, by their dotted names in its manifest."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker has to know of a run before it begins."""

    run_dir: Path
    recipe: str
    settings: Mapping[str, Any]
    """The tracker's own settings, ``tracker.*``; empty without a tracker."""
    parameters: Mapping[str, Any]
    """The resolved config by dotted names, without secrets."""

    def known_id(self, tracker: str) -> str | None:
        """The id that an earlier start of this run was given."""
        return self._ids().get(tracker)

    def remember_id(self, tracker: str, run_id: str) -> None:
        """Keeps the id for the next start."""
        ids = {**self._ids(), tracker: run_id}
        write_text_atomically(self.run_dir / IDS, json.dumps(ids) + "\n")

    def _ids(self) -> dict[str, str]:
        file = self.run_dir / IDS
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


Log = Callable[[str, str, Mapping[str, float], int, float], None]
"""Takes a stage, a task, its numbers at a step, the step, and the time (seconds since 1970)."""


@dataclass(frozen=True)
class Tracker:
    """What a tracker does with a run."""

    log: Log = lambda *_: None
    keep: Callable[[str, str, str], None] = lambda *_: None
    """Stores a file of a stage, of this name and content, as an artifact of the run."""


def tracked_run(cfg: DictConfig, run_dir: Path, recipe: str) -> TrackedRun:
    """What the chosen tracker will know of a run."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    settings = plain.pop("tracker", None) or {}
    return TrackedRun(run_dir, recipe, settings, dict(public_parameters(plain)))


def public_parameters(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Settings by dotted names; of environments only the names, and nothing that may be secret."""
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
    """What others may see of a file; a manifest has its stage's settings."""
    text = file.read_text(encoding="utf-8")
    if file.name != MANIFEST:
        return text
    manifest = json.loads(text)
    return json.dumps({**manifest, "config": dict(public_parameters(manifest["config"]))}, indent=1)


def _without_user(value: object) -> object:
    """An address may carry a password: ``https://user:password@host``."""
    if isinstance(value, list):
        return [_without_user(one) for one in value]
    return USER_INFO.sub("", value) if isinstance(value, str) else value


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record, without those that place it."""
    return {
        name: float(value)
        for name, value in record.items()
        if name not in BOOKKEEPING and isinstance(value, float | int)
    }


def figures_of(manifest: Manifest) -> dict[str, float]:
    """Every number of a manifest, by dotted name."""
    cost = {
        "seconds": manifest.seconds,
        "peak_rss_bytes": manifest.peak_rss_bytes,
        "bytes": manifest.total_bytes(),
        "parameters": manifest.parameters,
    }
    every = flat({**manifest.metrics, **cost})
    return {name: float(value) for name, value in every if isinstance(value, int | float)}


class SafeTracker:
    """A tracker that cannot stop a run: its first error is reported, and it gets nothing more."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker, self._failed = name, tracker, False

    def stage(self, stage: str) -> Track:
        """Where a stage's records go."""
        return lambda record: self._try(
            self._tracker.log,
            stage,
            record["task"],
            scalars(record),
            record["done"],
            record["time"],
        )

    def finish(self, stage: str, directory: Path, kept: Path | None = None) -> None:
        """Hands over the final figures of a stage that is complete, and a file of it."""
        manifest = read_manifest(directory)
        if manifest is not None:
            self._try(self._tracker.log, stage, FINAL, figures_of(manifest), 0, time.time())
            if kept is not None:
                self._try(lambda: self._tracker.keep(stage, kept.name, public_text(kept)))

    def _try(self, act: Callable[..., None], *given: Any) -> None:
        if self._failed:
            return
        try:
            act(*given)
        except Exception as error:
            self._failed = True
            warnings.warn(
                f"tracker {self._name} failed ({type(error).__name__}: {error}); the run goes on "
                "without it",
                stacklevel=2,
            )
