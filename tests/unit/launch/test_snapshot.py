"""Stages run the code that they were planned with. Tests start processes in a copied checkout."""

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
HARMLESS = "\nEDITED = True\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_with(tmp_path / "checkout")


def launch(checkout: Path, *arguments: str, status: int = 0) -> Path:
    """Runs the stage ``plan``; returns the run's directory."""
    done = run(checkout, "launch/run.py", RECIPE, "only=[plan]", "skip_rules=[disk]", *arguments)
    assert done.returncode == status, done.stdout + done.stderr
    return checkout / "runs" / "llama_width_prune"


def edit(folder: Path, text: str, module: str = "stages/plan") -> None:
    file = folder / "recipes" / f"{module}.py"
    content = file.read_text()
    file.unlink()  # files of a snapshot are read-only
    file.write_text(content + text)


def snapshots(run_dir: Path) -> list[str]:
    return [folder.name for folder in (run_dir / CODE).iterdir()]


def result(run_dir: Path) -> Manifest:
    return manifest_of(run_dir, "plan")


def test_edit_after_the_plan_does_not_affect_the_stage(checkout: Path) -> None:
    """Python finds the snapshot before the working directory and the user's PYTHONPATH."""
    run_dir = launch(checkout, "dry_run=true")
    [planned] = snapshots(run_dir)
    for module in ("stages/plan", "core/worker", "__init__"):
        edit(checkout, BROKEN, module)
    subprocess.run([run_dir / "plan" / "run.sh"], env={"PYTHONPATH": str(checkout)}, check=True)
    assert result(run_dir).snapshot == planned


def test_changed_code_takes_a_new_snapshot_and_the_old_one_is_removed(checkout: Path) -> None:
    run_dir = launch(checkout)
    before = result(run_dir)
    partial = Path(str(before.snapshot)[::-1]).with_suffix(".partial")  # of a killed launcher
    (run_dir / CODE / partial / "recipes").mkdir(parents=True)
    (run_dir / CODE / "mine").mkdir()
    edit(checkout, HARMLESS, "report/plots")  # the stage does not import it
    launch(checkout)
    assert result(run_dir) == before
    edit(checkout, HARMLESS)
    launch(checkout, "dry_run=true")
    assert set(snapshots(run_dir)) > {before.snapshot}, "the result's snapshot stays"
    launch(checkout)
    after = result(run_dir)
    assert after.snapshot != before.snapshot
    assert set(snapshots(run_dir)) == {after.snapshot, "mine"}


def test_edited_snapshot_is_refused_and_the_same_command_restores_it(checkout: Path) -> None:
    run_dir = launch(checkout, "dry_run=true")
    [planned] = snapshots(run_dir)
    edit(run_dir / CODE / planned, HARMLESS)
    done = subprocess.run(
        [run_dir / "plan" / "run.sh"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "is not the code that this stage was planned with" in done.stderr
    assert not (run_dir / "plan" / "manifest.json").exists()
    launch(checkout)
    assert result(run_dir).snapshot == planned


def test_accepted_unfinished_work_runs_its_old_snapshot(checkout: Path) -> None:
    run_dir = launch(checkout, "dry_run=true")
    begin_work(run_dir / "plan", unfinished_manifest(read_request(run_dir / "plan")))
    [started_with] = snapshots(run_dir)
    edit(checkout, HARMLESS)
    launch(checkout, "accept=[plan]")
    assert result(run_dir).snapshot == started_with
    assert result(run_dir).seconds > 0
