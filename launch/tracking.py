"""Experiment trackers: they get every record that a stage writes to its ``metrics.jsonl``.

The launcher feeds them from that file, so a stage knows of none of them, and its own record stays
whole whatever happens to a tracker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from recipes.errors import RecipeError, did_you_mean

Track = Callable[[Mapping[str, Any]], None]
Tracker = Callable[[Path, str], AbstractContextManager[Track]]


@contextmanager
def _none(run_dir: Path, stage: str) -> Iterator[Track]:
    yield lambda record: None


@contextmanager
def _tensorboard(run_dir: Path, stage: str) -> Iterator[Track]:
    """Scalars of a stage in ``<run>/tensorboard/<stage>``."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(run_dir / "tensorboard" / stage))

    def track(record: Mapping[str, Any]) -> None:
        values = [
            Summary.Value(tag=f"{record['task']}/{name}", simple_value=value)
            for name, value in record.items()
            if name not in ("time", "done", "total") and isinstance(value, float | int)
        ]
        if values:
            event = Event(wall_time=record["time"], step=record["done"])
            event.summary.CopyFrom(Summary(value=values))
            writer.add_event(event)

    try:
        yield track
    finally:
        writer.close()


TRACKERS: Mapping[str, Tracker] = {"none": _none, "tensorboard": _tensorboard}


def require_known(name: str) -> None:
    """Raises ``RecipeError`` for a tracker that there is not."""
    if name not in TRACKERS:
        raise RecipeError(
            f"tracker.name={name} is not known.{did_you_mean(name, TRACKERS)}",
            f"use one of: {', '.join(TRACKERS)}",
        )
