"""Stages run the code that they were planned with, from a snapshot in the run directory.

Each test copies the checkout, edits the copy and starts the launcher there.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from recipes.core.manifest import Manifest
from recipes.core.run_state import begin_work, read_request
from recipes.core.snapshot import CODE
from tests.support.contributing import copy_with, run
from tests.support.manifests import unfinished_manifest
from tests.support.runs import manifest_of
from tests.unit.conftest import RECIPE

BROKEN = "\nraise SystemExit('edited')\n"
"""Code that makes the import of a module fail, if it is appended to the module."""
HARMLESS = "\nEDITED = True\n"
"""Code that changes only the hash of a module, if it is appended to the module."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_with(tmp_path / "checkout")


def launch(checkout: Path, *arguments: str) -> Path:
    """Runs the stage ``plan`` with the copy's launcher; returns the run's directory."""
    process = run(checkout, "launch/run.py", RECIPE, "only=[plan]", "skip_rules=[disk]", *arguments)
    assert process.returncode == 0, process.stdout + process.stderr
    return checkout / "runs" / "llama_width_prune"


def append_code(folder: Path, text: str, module: str = "stages/plan") -> None:
    """Appends code to a module of the package ``recipes`` in a checkout or a snapshot."""
    file = folder / "recipes" / f"{module}.py"
    content = file.read_text()
    file.unlink()  # files of a snapshot are read-only
    file.write_text(content + text)


def snapshots(run_dir: Path) -> list[str]:
    """Lists the names of the folders in ``code/``. A snapshot's name is its hash."""
    return [folder.name for folder in (run_dir / CODE).iterdir()]


def result(run_dir: Path) -> Manifest:
    return manifest_of(run_dir, "plan")


def test_a_stage_runs_the_code_that_it_was_planned_with(checkout: Path) -> None:
    """An edited snapshot is refused. The same command restores it.

    Python finds the snapshot before the working directory and the user's PYTHONPATH.
    """
    run_dir = launch(checkout, "dry_run=true")
    [planned] = snapshots(run_dir)
    append_code(run_dir / CODE / planned, HARMLESS)
    script = run_dir / "plan" / "run.sh"
    process = subprocess.run([script], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "is not the code that this stage was planned with" in process.stderr
    assert not (run_dir / "plan" / "manifest.json").exists()
    launch(checkout, "dry_run=true")
    for module in ("stages/plan", "core/worker", "__init__"):
        append_code(checkout, BROKEN, module)
    subprocess.run([script], env={"PYTHONPATH": str(checkout)}, check=True)
    assert result(run_dir).snapshot == planned


def test_changed_code_takes_a_new_snapshot_and_the_old_one_is_removed(checkout: Path) -> None:
    run_dir = launch(checkout)
    before = result(run_dir)
    # A killed launcher leaves a partial snapshot. The reversed hash serves as a different hash.
    partial = f"{str(before.snapshot)[::-1]}.partial"
    (run_dir / CODE / partial / "recipes").mkdir(parents=True)
    (run_dir / CODE / "mine").mkdir()  # a user's folder, which no launch may delete
    append_code(checkout, HARMLESS, "report/plots")  # the stage ``plan`` does not import it
    launch(checkout)
    assert result(run_dir) == before, "the stage does not run again"
    append_code(checkout, HARMLESS)
    launch(checkout, "dry_run=true")
    assert set(snapshots(run_dir)) > {before.snapshot}, "the result's snapshot stays"
    launch(checkout)
    after = result(run_dir)
    assert after.snapshot != before.snapshot
    assert set(snapshots(run_dir)) == {after.snapshot, "mine"}


def test_accepted_unfinished_work_runs_its_old_snapshot(checkout: Path) -> None:
    run_dir = launch(checkout, "dry_run=true")
    begin_work(run_dir / "plan", unfinished_manifest(read_request(run_dir / "plan")))
    [old_snapshot] = snapshots(run_dir)
    append_code(checkout, HARMLESS)
    launch(checkout, "accept=[plan]")
    assert result(run_dir).snapshot == old_snapshot
    assert result(run_dir).seconds > 0, "the stage ran; unfinished_manifest has 0 seconds"
