"""How long a stage will still take, by its records of progress, and a run, by its plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
"""Number of records that a speed is measured over."""
BESIDE = 10.0
"""Seconds of a stage besides its planned arithmetic, for imports and files; an assumption."""


def seconds_left(records: Sequence[Record]) -> int | None:
    """Seconds that the task of the last record will still take; ``None`` without a speed."""
    last = records[-1]
    recent = list(_since_restart([r for r in records if r["task"] == last["task"]]))[-RECENT:]
    if len(recent) < 2:
        return None
    spent, done = (recent[-1][key] - recent[0][key] for key in ("time", "done"))
    left: int = round(spent / done * (last["total"] - last["done"]))
    return left


def _since_restart(records: Sequence[Record]) -> Iterator[Record]:
    """Yields the records since the last restart: the time before it was not spent on the work."""
    start = 0
    for place, (before, after) in enumerate(pairwise(records), start=1):
        if after["done"] <= before["done"]:
            start = place
    yield from records[start:]


def planned_seconds(run_dir: Path) -> Mapping[str, float]:
    """Seconds of arithmetic of each stage, by the run's plan; empty without one."""
    manifest = read_manifest(run_dir / "plan")
    result = manifest.result_if("plan", PlanResult) if manifest else None
    return result.seconds if result else {}


def run_left(
    planned: Mapping[str, float], spent: Mapping[str, float], ahead: Mapping[str, float | None]
) -> float | None:
    """Seconds that a run will still take; ``None`` if it is complete or has no plan.

    Args:
        planned: Seconds by ``planned_seconds``.
        spent: Seconds of each stage that is complete; they tell how fast this machine is.
        ahead: Seconds of each other stage by its own records, ``None`` if it has none.
    """
    if not planned or not ahead:
        return None

    def expected(stage: str) -> float:
        return BESIDE + planned.get(stage, 0.0)

    pace = sum(spent.values()) / sum(map(expected, spent)) if spent else 1.0
    return sum(pace * expected(name) if own is None else own for name, own in ahead.items())


def of_run(plan: Plan, stage: PlannedStage) -> Callable[[float], float | None]:
    """Returns what a run will still take, given the seconds left of a stage that starts."""
    planned = planned_seconds(plan.run_dir)
    place = [one.name for one in plan.stages].index(stage.name)
    later = [one.name for one in plan.stages[place + 1 :] if one.action != SKIP]
    others = [one for one in plan.stages if one.name not in (stage.name, *later)]
    spent = {one.name: made.seconds for one in others if (made := one.made)}
    return lambda left: run_left(planned, spent, {stage.name: left, **dict.fromkeys(later)})


def in_words(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
