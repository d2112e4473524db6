"""Students are saved after configured steps, evaluated on benchmarks, exported and plotted."""

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


def overrides(model: Path, text_file: Path, run_dir: Path, **distill: Any) -> list[str]:
    """Returns overrides with a constant learning rate, so that no step depends on ``max_steps``."""
    fields = {"precision": 32, "lr": 1e-3, "min_lr": 1e-3, "warmup_steps": 0, "max_steps": STEPS}
    return [
        "recipe=llama_depth_prune",
        *tiny(model, text_file, run_dir),
        "stages.prune.target_num_layers=3",
        *settings("distill", **{**fields, "checkpoint_interval": 1, **distill}),
    ]


@pytest.fixture(scope="module")
def pruned(even_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("pruned") / "run"
    only = "only=[import_hf,prepare_data,score,prune]"
    run_successfully(*overrides(even_llama, text_file, run_dir), only, cwd=run_dir.parent)
    return run_dir


def require_same_weights(first: Path, second: Path) -> None:
    weights, expected = dict(hf_weights(first)), dict(hf_weights(second))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


def student_after(run_dir: Path, step: int) -> Path:
    return nemo.step_checkpoints(run_dir / "distill" / ARTIFACT)[step]


def test_saved_students_equal_those_of_shorter_runs(
    pruned: Path, even_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Uses two data-parallel ranks. They gather updated weights only before the next step, so a
    save must gather the weights, too.
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
        losses[name] = [s["loss"] for s in steps_of(run_dir / "distill" / METRICS, "distill")]
    assert losses["saved"] == losses["plain"]
    final = [nemo.find_checkpoint(tmp_path / n / "distill" / ARTIFACT) for n in ("saved", "plain")]
    require_same_weights(*final)
    short = nemo.find_checkpoint(tmp_path / "short" / "distill" / ARTIFACT)
    require_same_weights(student_after(tmp_path / "saved", 2), short)
    assert [*nemo.step_checkpoints(tmp_path / "saved" / "distill" / ARTIFACT)] == [2, 3]
    assert not (tmp_path / "plain" / "distill" / ARTIFACT / nemo.STEPS).exists()


def test_a_failed_and_resumed_run_has_all_students(
    pruned: Path, even_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run fails while it saves the second student, and resumes after the first student."""
    run_dir, save = copy_without(pruned, tmp_path / "run"), trainer._save_trained

    def save_and_fail_at_step_2(*args: Any) -> None:
        save(*args)
        if args[-1].name == f"2.nemo{PARTIAL}":
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
    text = section((run_dir / "report" / ARTIFACT / "report.html").read_text(), "tasks")
    assert {"plot-task-0", "plot-task-1"} <= set(Page(text).values("id"))
    for name, task in results.items():
        assert [*task.steps] == [1, 3]
        for step, score in task.steps.items():
            tokens = step * 4 * 64  # 4 sequences of 64 tokens per step
            assert f"tokens {tokens}: student {score.value:.4g}" in text, (name, step)
    likelihoods = [
        [row["pruned"]["response"], *(row[f"step {n}"]["response"] for n in (1, 3))]
        for row in map(json.loads, (run_dir / "evaluate_tasks/artifact/samples/sciq.jsonl").open())
    ]
    assert all(len(set(map(str, row))) == 3 for row in likelihoods), "two models are the same"
    assert convert_by_command("to-hf", student_after(run_dir, 1), tmp_path / "hf") == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()
