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
from tests.support.runs import copy_without, manifest_of, settings, tiny

STEPS = 4
"""Optimizer steps of a distillation."""


def overrides(model: Path, text_file: Path, run_dir: Path, **distill: Any) -> list[str]:
    """Returns overrides of a run that prunes one of four layers, and saves a checkpoint per step.

    The learning rate is constant, so the weights after a step do not depend on ``max_steps``.
    ``distill`` has further fields of the stage, which replace the defaults of this function.
    """
    fields = {"precision": 32, "lr": 1e-3, "min_lr": 1e-3, "warmup_steps": 0, "max_steps": STEPS}
    return [
        "recipe=llama_depth_prune",
        *tiny(model, text_file, run_dir),
        "stages.prune.target_num_layers=3",
        *settings("distill", **{**fields, "checkpoint_interval": 1, **distill}),
    ]


@pytest.fixture(scope="module")
def pruned(even_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the directory of a run whose stages before ``distill`` are complete."""
    run_dir = tmp_path_factory.mktemp("pruned") / "run"
    only = "only=[import_hf,prepare_data,score,prune]"
    run_successfully(*overrides(even_llama, text_file, run_dir), only, cwd=run_dir.parent)
    return run_dir


def require_same_weights(first: Path, second: Path) -> None:
    """Asserts that two NeMo checkpoints have bitwise equal weights."""
    first_weights, second_weights = dict(hf_weights(first)), dict(hf_weights(second))
    assert first_weights.keys() == second_weights.keys()
    for name, tensor in first_weights.items():
        assert torch.equal(tensor, second_weights[name]), name


def student_after(run_dir: Path, step: int) -> Path:
    """Returns the checkpoint of the student that was saved after a step."""
    return nemo.step_checkpoints(run_dir / "distill" / ARTIFACT)[step]


def test_a_student_saved_after_a_step_equals_the_result_of_a_run_that_ends_there(
    pruned: Path, even_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Also tests that saving students does not change training.

    Uses two data-parallel ranks. Ranks gather updated weights only before the next step, so saving
    a student must gather the weights, too.
    """
    losses = {}
    for name, fields in {
        "saved": {"student_steps": "[2,3]"},
        "plain": {},
        "short": {"max_steps": 2},
    }.items():
        run_dir = copy_without(pruned, tmp_path / name)
        ranks = {"resources.devices": 2, "micro_batch_size": 1, **fields}
        command = overrides(even_llama, text_file, run_dir, **ranks)
        run_successfully(*command, "only=[distill]", cwd=tmp_path)
        steps = steps_of(run_dir / "distill" / METRICS, "distill")
        losses[name] = [step["loss"] for step in steps]
    assert losses["saved"] == losses["plain"]
    final = {name: nemo.find_checkpoint(tmp_path / name / "distill" / ARTIFACT) for name in losses}
    require_same_weights(final["saved"], final["plain"])
    require_same_weights(student_after(tmp_path / "saved", 2), final["short"])
    assert [*nemo.step_checkpoints(tmp_path / "saved" / "distill" / ARTIFACT)] == [2, 3]
    assert not (tmp_path / "plain" / "distill" / ARTIFACT / nemo.STEPS).exists()


def test_a_failed_and_resumed_run_has_all_students(
    pruned: Path, even_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run fails while it saves the student of step 2, and resumes after step 1."""
    run_dir, save = copy_without(pruned, tmp_path / "run"), trainer._save_trained

    def save_and_fail_at_step_2(*args: Any) -> None:
        save(*args)
        checkpoint: Path = args[-1]
        if checkpoint.name == f"2.nemo{PARTIAL}":
            raise RecipeError("failed", "run again")

    command = overrides(even_llama, text_file, run_dir, student_steps="[1,2]")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_save_trained", save_and_fail_at_step_2)
        assert run_in_process(*command, "only=[distill]", cwd=tmp_path).code == 1
    folder = run_dir / "distill" / WORK / nemo.STEPS
    assert sorted(path.name for path in folder.iterdir()) == ["1.nemo", f"2.nemo{PARTIAL}"]
    assert "resume" in run_successfully(*command, "only=[distill]", cwd=tmp_path).output
    assert [*nemo.step_checkpoints(run_dir / "distill" / ARTIFACT)] == [1, 2]
    assert not (run_dir / "distill" / WORK).exists()


def test_students_are_evaluated_exported_and_plotted(
    pruned: Path, even_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    run_dir = copy_without(pruned, tmp_path / "run")
    command = overrides(even_llama, text_file, run_dir, student_steps="[1,3]")
    tasks = settings("evaluate_tasks", tasks="[sciq,lambada_openai]", limit=4)
    evaluate = settings("evaluate", num_sequences=4, seq_length=64, new_tokens=4)
    run_successfully(*command, "engine=null", "tasks=quick", *tasks, *evaluate, cwd=tmp_path)
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
    assert convert_by_command("to-hf", student_after(run_dir, 1), tmp_path / "hf") == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()
