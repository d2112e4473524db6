"""Tests which benchmarks ``evaluate_served`` runs with each server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from recipes.core.errors import RecipeError
from recipes.stages import evaluate_served
from tests.unit.conftest import notes_of

if TYPE_CHECKING:
    from tests.unit.conftest import MakePlan

TRTLLM = ("engine=tensorrt_llm", "stages.build_engine.backend=tensorrt_llm_pytorch")
"""Overrides that build TensorRT-LLM engines. Its server returns no log-probabilities of prompts."""


def test_served_models_answer_the_benchmarks_of_evaluate_tasks(plan: MakePlan) -> None:
    """Without ``evaluate_tasks``, ``evaluate_served`` has default tasks and a limit of items."""
    for served, artifact in (("engine", "build_engine"), ("gguf", "export_gguf")):
        planned = plan("tasks=full", "gguf=q8_0", "engine=openvino", f"served={served}")
        stages: Any = SimpleNamespace(**planned.chain.stages)
        tasks, served_tasks = stages.evaluate_tasks, stages.evaluate_served
        for name in ("tasks", "limit", "num_fewshot", "source", "revisions"):
            assert getattr(served_tasks, name) == getattr(tasks, name)
        assert served_tasks.inputs["artifact"] == artifact
        assert stages.report.inputs["served"] == "evaluate_served"
        # A warning, because tasks=full has no limit of items.
        assert notes_of(planned, "served-time")
    planned = plan("engine=openvino", "served=engine")  # without ``evaluate_tasks``
    assert "sciq" in vars(planned.chain.stages["evaluate_served"])["tasks"]
    assert not notes_of(planned, "served-time")


def test_tensorrt_llm_refuses_tasks_that_need_log_probabilities(plan: MakePlan) -> None:
    with pytest.raises(RecipeError, match="log-probabilities of prompts"):
        plan(*TRTLLM, "served=engine", "stages.evaluate_served.tasks=[sciq]")


@pytest.mark.parametrize("tasks", ["full", "null"])
def test_only_tensorrt_llm_limits_benchmarks_to_generation(tasks: str, plan: MakePlan) -> None:
    """If the same run serves its GGUF file instead, the stage runs all benchmarks."""
    for served, is_generation_only in (("engine", True), ("gguf", False)):
        planned = plan(*TRTLLM, f"tasks={tasks}", "gguf=q8_0", f"served={served}")
        served_tasks = vars(planned.chain.stages["evaluate_served"])["tasks"]
        assert (served_tasks == [*evaluate_served.GENERATION_TASKS]) == is_generation_only


def test_settings_of_benchmarks_that_are_not_served_are_allowed(plan: MakePlan) -> None:
    """``winogrande`` is a benchmark of ``evaluate_tasks`` only."""
    planned = plan(
        *TRTLLM,
        "served=engine",
        "tasks=quick",
        "stages.evaluate_tasks.source=hub",
        "stages.evaluate_tasks.tasks=[winogrande,gsm8k_cot]",
        "+stages.evaluate_tasks.num_fewshot.winogrande=5",
        "stages.evaluate_served.tasks=[gsm8k_cot]",
    )
    assert "evaluate_served" in {stage.name for stage in planned.stages}


def test_the_served_model_is_made_from_the_student_that_it_is_compared_with(
    plan: MakePlan,
) -> None:
    overrides = ("engine=openvino", "served=engine")
    assert plan(*overrides)
    message = "compares build_teacher_engine, which is built from import_hf, with export_hf"
    with pytest.raises(RecipeError, match=message):
        plan(*overrides, "stages.evaluate_served.inputs.artifact=build_teacher_engine")
