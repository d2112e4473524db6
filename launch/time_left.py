"""How long a stage will still take, by its last records, and a run, by its plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from launch.plan import Plan
from launch.planned import PlannedStage
from launch.staleness import SKIP
from recipes.core.manifest import read_manifest
from recipes.core.metrics import Record
from recipes.planning.results import PlanResult

RECENT = 50
"""Records that a speed is taken from."""
BESIDE = 10.0
"""Seconds of a stage beside the arithmetic that is planned: imports, files; an assumption."""


def seconds_left(records: Sequence[Record]) -> int | None:
    """Seconds that the task of the last record will still take; ``None`` where no speed is known.

    By a mean over the last units of work that followed each other.
    """
    last = records[-1]
    recent = list(_since_restart([r for r in records if r["task"] == last["task"]]))[-RECENT:]
    if len(recent) < 2:
        return None
    spent, done = (recent[-1][key] - recent[0][key] for key in ("time", "done"))
    left: int = round(spent / done * (last["total"] - last["done"]))
    return left


def _since_restart(records: Sequence[Record]) -> Iterator[Record]:
    """Records since work was last taken up again: the time in between was not spent on it."""
    start = 0
    for place, (before, after) in enumerate(pairwise(records), start=1):
        if after["done"] <= before["done"]:
            start = place
    yield from records[start:]


@dataclass(frozen=True)
class Expected:
    """What stages will take, by the plan and by the pace of those that have ended."""

    planned: Mapping[str, float]
    """Seconds of arithmetic of each stage that has some."""
    spent: Mapping[str, float]
    """Seconds of each that has ended."""

    def seconds(self, stages: Iterable[str]) -> float:
        """Of some stages, one after the other."""
        thought = sum(map(self._thought, self.spent))
        pace = sum(self.spent.values()) / thought if self.spent else 1.0
        return pace * sum(map(self._thought, stages))

    def _thought(self, stage: str) -> float:
        return BESIDE + self.planned.get(stage, 0.0)


def planned_seconds(run_dir: Path) -> Mapping[str, float]:
    """What a run's plan says of each stage that computes; nothing without such a plan."""
    manifest = read_manifest(run_dir / "plan")
    found = manifest.result_if("plan", PlanResult) if manifest else None
    return found.seconds if found else {}


def of_run(plan: Plan, stage: PlannedStage) -> Callable[[float], float | None]:
    """Gives the seconds that a run will still take for those of its stage that begins.

    ``None`` where no plan says what its stages take.
    """
    planned = planned_seconds(plan.run_dir)
    if not planned:
        return lambda left: None
    place = [one.name for one in plan.stages].index(stage.name)
    ahead = [one.name for one in plan.stages[place + 1 :] if one.action != SKIP]
    ended = ((one.name, one.made) for one in plan.stages if one.name not in (stage.name, *ahead))
    expected = Expected(planned, {name: made.seconds for name, made in ended if made})
    rest = expected.seconds(ahead)
    return lambda left: left + rest


def in_words(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
