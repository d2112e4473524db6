"""``python launch/run.py runs [DIR]`` lists runs, ``runs clean RUN`` deletes what nothing needs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from launch import lock
from launch.console import headline
from launch.executors.slurm_queue import active_jobs
from launch.run_status import StageStatus, read_statuses
from recipes.core.errors import RecipeError
from recipes.core.manifest import MANIFEST
from recipes.core.run_state import REQUEST, RUN_FILE, Status, read_request
from recipes.core.screen import plain_table
from recipes.report.runs import RunRecord, find_runs, read_run

ROOT = Path("runs")
PLACES = ("*", "sweeps/*/*")
"""Patterns of runs below it."""
YES = "--yes"
AGES = (("days", 86400), ("h", 3600), ("min", 60))
NOT_COMPLETE = (
    *(Status.RUNNING, Status.FAILED, Status.HUNG),
    *(Status.STOPPED, Status.INTERRUPTED, Status.PENDING),
)
"""Statuses of a stage that a run is reported to be at, the most important first."""


def runs(words: Sequence[str], console: Console) -> int:
    """Lists the runs of a directory, or deletes those that are named after ``clean``."""
    if list(words[:1]) == ["clean"]:
        _clean([word for word in words[1:] if word != YES], YES in words, console)
        return 0
    if len(words) > 1 or any(word.startswith("-") for word in words):
        raise RecipeError(
            f"runs does not know '{' '.join(words)}'.", "runs [DIR], or runs clean RUN"
        )
    root = Path(*words) if words else ROOT
    table = plain_table(
        str(root), "run", "recipe", "state", "quality", "speed", "parameters", "disk", "age"
    )
    for path in (found := list(_below(root))):
        table.add_row(*map(escape, _row(path, root)))
    if not found:
        raise RecipeError(f"there is no run in {root.resolve()}.", "runs DIR")
    console.print(table)
    return 0


def _below(root: Path) -> Iterator[Path]:
    for place in PLACES:
        yield from (file.parent for file in sorted(root.glob(f"{place}/{RUN_FILE}")))


def _row(path: Path, root: Path) -> tuple[str, ...]:
    name, disk, age = str(path.relative_to(root)), f"{_size(path) / 1e9:.2f} GB", _age(path)
    try:
        record, state = read_run(path), _state(read_statuses(path.resolve()))
    except RecipeError:  # of one run, which hides no other
        return name, "", "unreadable: see status", "", "", "", disk, age
    made = record.exported
    parameters = f"{made.parameters / 1e6:.1f} M" if made and made.parameters else ""
    quality = _headline(record, "eval_results", "search_results")
    speed = _headline(record, "speed_results")
    return name, record.recipe, state, quality, speed, parameters, disk, age


def _headline(record: RunRecord, *kinds: str) -> str:
    return next((headline(found) for kind in kinds if (found := record.find(kind))), "")


def _state(stages: Sequence[StageStatus]) -> str:
    """Says at which stage a run is, or ended."""
    for status in NOT_COMPLETE:
        for stage in stages:
            if stage.status is status:
                return f"{status} at {stage.name}"
    done = sum(stage.status is Status.COMPLETE for stage in stages)
    return Status.COMPLETE if done == len(stages) else f"{done} of {len(stages)} stages"


def _age(path: Path) -> str:
    """Time since a stage was last completed, or since the run was planned."""
    newest = max(file.stat().st_mtime for file in (path / RUN_FILE, *path.glob(f"*/{MANIFEST}")))
    seconds = time.time() - newest
    for unit, length in AGES:
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return "now"


def _size(path: Path) -> int:
    """Bytes of a folder's files; a file with several names counts once."""
    sizes = {}
    for folder, _, names in os.walk(path):
        for name in names:
            stat = os.lstat(os.path.join(folder, name))
            sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())


def _clean(names: Sequence[str], confirmed: bool, console: Console) -> None:
    """Deletes runs, except stages that other runs have as inputs; only shows them at first."""
    if not names:
        raise RecipeError(
            "which runs?", f"runs clean RUN1 RUN2, by the names that runs lists; {YES}"
        )
    chosen = find_runs(ROOT / name if (ROOT / name).is_dir() else Path(name) for name in names)
    for path in chosen:
        if lock.holder(path) or active_jobs(path):
            fix = f"python launch/run.py cancel run_dir={path}"
            raise RecipeError(f"{path} is being run.", fix)
    needed = {stage: run for run in _others(chosen) for stage in _inputs(run)}
    deletable = [folder for path in chosen for folder in _unneeded(path, needed)]
    table = plain_table("clean", "folder", "disk", "")
    rows = {stage: f"kept for {run}" for stage, run in needed.items() if stage.parent in chosen}
    rows |= dict.fromkeys(deletable, "deleted" if confirmed else "")
    for folder, note in rows.items():
        table.add_row(str(folder), f"{_size(folder) / 1e9:.2f} GB", note)
    console.print(table)
    if not confirmed:
        console.print(f"nothing was deleted; {YES} deletes what has no remark")
        return
    with ExitStack() as locks:
        for path in chosen:
            locks.enter_context(lock.held(path))
        for folder in deletable:
            _delete(folder)


def _unneeded(run: Path, needed: Collection[Path]) -> list[Path]:
    """Returns a whole run, or its stages that no other run needs."""
    stages = [folder for folder in sorted(run.iterdir()) if folder.is_dir()]
    free = [folder for folder in stages if folder not in needed]
    return free if len(free) < len(stages) else [run]


def _others(chosen: Sequence[Path]) -> set[Path]:
    """Returns the runs that stay, of those in ``runs`` and beside the chosen ones."""
    places: Iterable[Path] = {ROOT.resolve(), *(path.parent for path in chosen)}
    return {run.resolve() for place in places for run in _below(place)} - set(chosen)


def _inputs(run: Path) -> Iterator[Path]:
    for file in run.glob(f"*/{REQUEST}"):
        yield from (ref.directory for ref in read_request(file.parent).inputs.values())


def _delete(folder: Path) -> None:
    """Deletes manifests first: after a kill, nothing that remains looks complete."""
    for manifest in (*folder.glob(MANIFEST), *folder.glob(f"*/{MANIFEST}")):
        manifest.unlink()
    shutil.rmtree(folder)
