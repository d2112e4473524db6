"""Tests that students are saved after configured steps, evaluated, exported and plotted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_convert import nemo
from nemo_convert.convert import hf_weights
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, WORK
from recipes.core.metrics import METRICS, steps_of
from recipes.distillation import trainer
from recipes.distillation.callbacks import PARTIAL
from recipes.evaluation.results import TaskResults
from tests.support.conversion import convert_by_command
from tests.support.in_process import run_in_process, run_successfully
from tests.support.pages import Page, section
from tests.support.runs import copy_without, manifest_of, settings


@pytest.fixture(scope="module")
def command(short_recipe: list[str]) -> list[str]:
    """The overrides of a run that distils for 4 steps.

    The learning rate is constant, so the weights after a step do not depend on ``max_steps``.
    """
    return [*short_recipe, *settings("distill", lr=1e-3, min_lr=1e-3, warmup_steps=0, max_steps=4)]


def test_a_student_saved_after_a_step_equals_the_result_of_a_run_that_ends_there(
    pruned_run: Path, command: list[str], tmp_path: Path
) -> None:
    """The student of step 2 is saved before step 3, so saving does not change training.

    Uses two data-parallel ranks. Ranks gather updated weights only before the next step, so saving
    a student must gather the weights, too.
    """
    losses = {}
    for name, fields in {"saved": {"student_steps": "[2,3]"}, "short": {"max_steps": 3}}.items():
        run_dir = copy_without(pruned_run, tmp_path / name / "run")
        ranks = settings("distill", **{"resources.devices": 2, "micro_batch_size": 1, **fields})
        run_successfully(*command, *ranks, "only=[distill]", cwd=run_dir.parent)
        steps = steps_of(run_dir / "distill" / METRICS, "distill")
        losses[name] = [step["loss"] for step in steps]
    assert len(losses["saved"]) == 4
    assert losses["saved"][:3] == losses["short"]
    saved, short = (tmp_path / name / "run" / "distill" / ARTIFACT for name in losses)
    assert [*nemo.step_checkpoints(saved)] == [2, 3]
    checkpoints = nemo.step_checkpoints(saved)[3], nemo.find_checkpoint(short)
    student, expected = (dict(hf_weights(checkpoint)) for checkpoint in checkpoints)
    assert student.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(student[name], tensor), name
    assert not (short / nemo.STEPS).exists()


def test_a_failed_and_resumed_run_has_all_students(
    pruned_run: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run fails while it saves the student of step 2, and resumes after step 1."""
    run_dir, save = copy_without(pruned_run, tmp_path / "run"), trainer._save_trained

    def save_and_fail_at_step_2(*args: Any) -> None:
        save(*args)
        checkpoint: Path = args[-1]
        if checkpoint.name == f"2.nemo{PARTIAL}":
            raise RecipeError("failed", "run again")

    command = [*command, *settings("distill", student_steps="[1,2]"), "only=[distill]"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_save_trained", save_and_fail_at_step_2)
        assert run_in_process(*command, cwd=tmp_path).code == 1
    folder = run_dir / "distill" / WORK / nemo.STEPS
    assert sorted(path.name for path in folder.iterdir()) == ["1.nemo", f"2.nemo{PARTIAL}"]
    assert "resume" in run_successfully(*command, cwd=tmp_path).output
    assert [*nemo.step_checkpoints(run_dir / "distill" / ARTIFACT)] == [1, 2]
    assert not (run_dir / "distill" / WORK).exists()


def test_students_are_evaluated_exported_and_plotted(
    pruned_run: Path, command: list[str], tmp_path: Path
) -> None:
    run_dir = copy_without(pruned_run, tmp_path / "run")
    students = settings("distill", student_steps="[1,3]")
    tasks = settings("evaluate_tasks", tasks="[sciq,lambada_openai]", limit=4)
    evaluate = settings("evaluate", num_sequences=4, seq_length=64, new_tokens=4)
    changes = ["engine=null", "tasks=quick", *students, *tasks, *evaluate]
    run_successfully(*command, *changes, cwd=tmp_path)
    results = manifest_of(run_dir, "evaluate_tasks").result(TaskResults).tasks
    plots = section((run_dir / "report" / ARTIFACT / "report.html").read_text(), "tasks")
    assert {"plot-task-0", "plot-task-1"} <= set(Page(plots).values("id"))
    for name, task in results.items():
        assert [*task.steps] == [1, 3]
        for step, score in task.steps.items():
            tokens = step * 4 * 64  # 4 sequences of 64 tokens per step
            assert f"tokens {tokens}: student {score.value:.4g}" in plots, (name, step)
    # A line has the responses of all models to an item. Different models must differ in these.
    for line in (run_dir / "evaluate_tasks/artifact/samples/sciq.jsonl").open():
        item = json.loads(line)
        responses = {str(item[model]["response"]) for model in ("pruned", "step 1", "step 3")}
        assert len(responses) == 3, "two models are the same"
    first_student = nemo.step_checkpoints(run_dir / "distill" / ARTIFACT)[1]
    assert convert_by_command("to-hf", first_student, tmp_path / "hf") == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()
