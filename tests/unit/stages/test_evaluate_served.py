"""Tests which benchmarks are served, and which of them a server can answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from launch.plan import Plan
from recipes.core.errors import RecipeError
from recipes.stages import evaluate_served

TRTLLM = ("engine=tensorrt_llm", "stages.build_engine.backend=tensorrt_llm_pytorch")


def test_served_models_answer_the_benchmarks_of_evaluate_tasks(plan: Callable[..., Plan]) -> None:
    for served, artifact in (("engine", "build_engine"), ("gguf", "export_gguf")):
        planned = plan("tasks=full", "gguf=q8_0", "engine=openvino", f"served={served}")
        configs = {stage.name: stage.config for stage in planned.stages}
        tasks, served_tasks = configs["evaluate_tasks"], configs["evaluate_served"]
        for name in ("tasks", "limit", "num_fewshot", "source", "revisions"):
            assert getattr(served_tasks, name) == getattr(tasks, name)
        assert served_tasks.inputs["artifact"] == artifact
        assert configs["report"].inputs["served"] == "evaluate_served"
        assert "served-time" in {note.rule.name for note in planned.notes}  # all items
    planned = plan("engine=openvino", "served=engine")  # without ``tasks``
    [stage] = (stage for stage in planned.stages if "served" in stage.name)
    assert "sciq" in stage.config.tasks  # type: ignore[attr-defined]
    assert "served-time" not in {note.rule.name for note in planned.notes}


def test_tensorrt_llm_serves_only_generated_answers(plan: Callable[..., Plan]) -> None:
    with pytest.raises(RecipeError, match="log-probabilities of prompts"):
        plan(*TRTLLM, "served=engine", "stages.evaluate_served.tasks=[sciq]")


@pytest.mark.parametrize("tasks", ["full", "quick", "null"])
def test_benchmarks_follow_from_the_server(tasks: str, plan: Callable[..., Plan]) -> None:
    """A GGUF file of the same run answers all benchmarks."""
    for served, generated in (("engine", True), ("gguf", False)):
        planned = plan(*TRTLLM, f"tasks={tasks}", "gguf=q8_0", f"served={served}")
        [config] = (s.config for s in planned.stages if s.name == "evaluate_served")
        assert (config.tasks == [*evaluate_served.GENERATION_TASKS]) == generated  # type: ignore[attr-defined]
