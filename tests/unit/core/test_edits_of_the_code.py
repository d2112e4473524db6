"""What an edit of the code runs again, seen by a plan of a complete run over an edited copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.plan import Plan
from recipes.core import fingerprint, reachable_code

Edit = Callable[[str, str, str], None]
PACKAGES = ("recipes", "nemo_convert")


def forget() -> None:
    fingerprint.code_fingerprint.cache_clear()
    reachable_code._read.cache_clear()


@pytest.fixture
def edit(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Edit]:
    """Edits a file of a copy of the code, which fingerprints are then of."""
    copy = tmp_path / "checkout"
    for package in PACKAGES:
        shutil.copytree(root / package, copy / package, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(root / "pyproject.toml", copy)
    monkeypatch.setattr(fingerprint, "REPO_ROOT", copy)
    forget()

    def edited(file: str, old: str, new: str) -> None:
        text = (copy / file).read_text()
        assert text.count(old) >= 1, old
        (copy / file).write_text(text.replace(old, new))
        forget()

    yield edited
    forget()


def actions(plan: Plan) -> dict[str, str]:
    return {stage.name: stage.action for stage in plan.stages}


def test_words_run_nothing_again(
    edit: Edit, plan: Callable[..., Plan], complete: Callable[[Plan], None]
) -> None:
    """A rule, a docstring, a comment, a check, an estimate, the console's own code."""
    complete(plan(recipe="recipe=llama_depth_prune"))
    edit("recipes/planning/rules.py", "a full disk ends a training", "no training ends well")
    edit(
        "recipes/distillation/losses.py",
        '"""Losses per token, with',
        '"""The losses of a token, with',
    )
    edit("recipes/distillation/losses.py", "# of T² the inner", "# from T² the inner")
    edit("recipes/stages/prune.py", "does not measure", "did not measure")
    edit("recipes/planning/budget.py", "BYTES_PER_TOKEN = 4.0", "BYTES_PER_TOKEN = 3.5")
    edit("recipes/core/worker.py", "rank 0: {what}", "rank 0 said: {what}")
    assert set(actions(plan(recipe="recipe=llama_depth_prune")).values()) == {"skip"}


def test_a_line_of_the_loss_runs_distillation_and_what_follows(
    edit: Edit, plan: Callable[..., Plan], complete: Callable[[Plan], None]
) -> None:
    complete(plan(recipe="recipe=llama_depth_prune"))
    edit("recipes/distillation/losses.py", "log_q.exp_().sub_(p)", "log_q.exp_().sub_(p).mul_(1)")
    found = actions(plan(recipe="recipe=llama_depth_prune"))
    assert {name for name, action in found.items() if action == "run"} == {
        *("distill", "evaluate", "export_hf", "report"),
    }


def test_an_edited_estimate_makes_the_plan_anew_and_nothing_else(
    edit: Edit, plan: Callable[..., Plan], complete: Callable[[Plan], None]
) -> None:
    complete(plan(recipe="recipe=llama_depth_prune"))
    edit("recipes/planning/estimate.py", "FRAGMENTATION = 1.05", "FRAGMENTATION = 1.1")
    found = actions(plan(recipe="recipe=llama_depth_prune"))
    assert {name for name, action in found.items() if action == "run"} == {"plan", "report"}
