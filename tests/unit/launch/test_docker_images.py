"""Images of stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.unit.conftest import MakePlan

DOCKER = ("cluster=docker", "hardware=h100")
HEADS = {"openvino": (), "tensorrt_llm": ("stages.build_engine.backend=tensorrt_llm_pytorch",)}


@pytest.mark.parametrize("recipe", ["llama_width_prune", "shrink"])
def test_images_are_chosen_by_what_a_stage_runs(plan: MakePlan, recipe: str) -> None:
    """OpenVINO's stages run in the default image, those of TensorRT-LLM in its own."""
    engines = {"build_engine", "build_teacher_engine", "measure_speed"}
    for engine in ("openvino", "tensorrt_llm"):
        made = plan(*DOCKER, f"engine={engine}", *HEADS[engine], recipe=f"recipe={recipe}")
        own = {s.name for s in made.stages if s.image == "nemo-recipes-engine:0.1.0"}
        assert own == (engines if engine == "tensorrt_llm" else set())
        assert {s.image for s in made.stages if s.name not in own} == {"nemo-recipes:0.1.0"}
