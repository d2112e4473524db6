"""``python launch/run.py runs [DIR]`` lists runs; ``runs clean RUN`` deletes runs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
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
RUN_PATTERNS = ("*", "sweeps/*/*")
"""Patterns of run directories in ``ROOT``."""
YES = "--yes"
AGE_UNITS = (("days", 86400), ("h", 3600), ("min", 60))
"""Units with their seconds."""
INCOMPLETE = (
    *(Status.RUNNING, Status.FAILED, Status.HUNG),
    *(Status.STOPPED, Status.INTERRUPTED, Status.PENDING),
)
"""Statuses of a stage that are shown for its run, the most important first."""


def runs(words: Sequence[str], console: Console) -> int:
    """Lists the runs of a directory, or deletes the runs that follow ``clean``."""
    if list(words[:1]) == ["clean"]:
        _clean([word for word in words[1:] if word != YES], YES in words, console)
        return 0
    if len(words) > 1 or any(word.startswith("-") for word in words):
        raise RecipeError(
            f"runs does not know '{' '.join(words)}'.", "runs [DIR], or runs clean RUN"
        )
    root = Path(*words) if words else ROOT
    paths = _find_runs(root)
    if not paths:
        raise RecipeError(f"there is no run in {root.resolve()}.", "runs DIR")
    columns = ("run", "recipe", "state", "quality", "speed", "parameters", "disk", "age")
    table = plain_table(str(root), *columns)
    for path in paths:
        table.add_row(*map(escape, _row(path, root)))
    console.print(table)
    return 0


def _find_runs(root: Path) -> list[Path]:
    files = (sorted(root.glob(f"{pattern}/{RUN_FILE}")) for pattern in RUN_PATTERNS)
    return [file.parent for group in files for file in group]


def _row(path: Path, root: Path) -> tuple[str, ...]:
    name, disk, age = str(path.relative_to(root)), f"{_size(path) / 1e9:.2f} GB", _age(path)
    try:
        record, state = read_run(path), _state(read_statuses(path.resolve()))
    except RecipeError:  # the other runs are still listed
        return name, "", "unreadable: see status", "", "", "", disk, age
    exported = record.exported
    parameters = f"{exported.parameters / 1e6:.1f} M" if exported and exported.parameters else ""
    quality = _headline(record, "eval_results", "search_results")
    speed = _headline(record, "speed_results")
    return name, record.recipe, state, quality, speed, parameters, disk, age


def _headline(record: RunRecord, *kinds: str) -> str:
    return next((headline(result) for kind in kinds if (result := record.find(kind))), "")


def _state(stages: Sequence[StageStatus]) -> str:
    for status in INCOMPLETE:
        for stage in stages:
            if stage.status is status:
                return f"{status} at {stage.name}"
    done = sum(stage.status is Status.COMPLETE for stage in stages)
    return Status.COMPLETE if done == len(stages) else f"{done} of {len(stages)} stages"


def _age(path: Path) -> str:
    """Returns the time since the run was planned, or since its last stage was completed."""
    newest = max(file.stat().st_mtime for file in (path / RUN_FILE, *path.glob(f"*/{MANIFEST}")))
    age = time.time() - newest
    return next(
        (f"{age // length:.0f} {unit}" for unit, length in AGE_UNITS if age >= length), "now"
    )


def _size(path: Path) -> int:
    """Returns the bytes of a folder's files; hard links to one file count once."""
    sizes = {}
    for folder, _, names in os.walk(path):
        for name in names:
            stat = os.lstat(os.path.join(folder, name))
            sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())


def _clean(names: Sequence[str], confirmed: bool, console: Console) -> None:
    """Deletes runs, but not stages that other runs need; without ``--yes`` only lists them."""
    if not names:
        raise RecipeError(
            "which runs?", f"runs clean RUN1 RUN2, by the names that runs lists; {YES}"
        )
    chosen = find_runs(ROOT / name if (ROOT / name).is_dir() else Path(name) for name in names)
    for path in chosen:
        if lock.read_holder(path) or active_jobs(path):
            fix = f"python launch/run.py cancel run_dir={path}"
            raise RecipeError(f"{path} is being run.", fix)
    needed = _inputs_of_other_runs(chosen)
    rows = {stage: f"kept for {run}" for stage, run in needed.items() if stage.parent in chosen}
    deletable = [folder for run in chosen for folder in _deletable(run, needed)]
    rows |= dict.fromkeys(deletable, "deleted" if confirmed else "")
    table = plain_table("clean", "folder", "disk", "")
    for folder, note in rows.items():
        table.add_row(str(folder), f"{_size(folder) / 1e9:.2f} GB", note)
    console.print(table)
    if not confirmed:
        console.print(f"nothing was deleted; {YES} deletes the folders without a remark")
        return
    with ExitStack() as locks:
        for path in chosen:
            locks.enter_context(lock.acquire(path))
        for folder in deletable:
            _delete(folder)


def _delete(folder: Path) -> None:
    """Deletes manifests first: if this is killed, nothing that remains looks complete."""
    for manifest in (*folder.glob(MANIFEST), *folder.glob(f"*/{MANIFEST}")):
        manifest.unlink()
    shutil.rmtree(folder)


def _deletable(run: Path, needed: Collection[Path]) -> list[Path]:
    """Returns a whole run, or its stages that no other run needs."""
    stages = [folder for folder in sorted(run.iterdir()) if folder.is_dir()]
    unneeded = [folder for folder in stages if folder not in needed]
    return unneeded if len(unneeded) < len(stages) else [run]


def _inputs_of_other_runs(chosen: Sequence[Path]) -> dict[Path, Path]:
    """Returns stage directories that other runs, here or in ``runs``, need; with such a run."""
    roots = {ROOT.resolve(), *(path.parent for path in chosen)}
    others = {run.resolve() for root in roots for run in _find_runs(root)} - set(chosen)
    return {stage: run for run in others for stage in _inputs(run)}


def _inputs(run: Path) -> Iterator[Path]:
    for file in run.glob(f"*/{REQUEST}"):
        yield from (ref.directory for ref in read_request(file.parent).inputs.values())
