"""Checks of ``add_layers`` before a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recipes.core.stage import StageConfig
from recipes.distillation.settings import DistillConfig
from recipes.planning.chain import Chain
from recipes.pruning.settings import AddLayersConfig, PruneConfig
from recipes.stages import add_layers


@pytest.mark.parametrize(
    ("student", "num_layers", "found"),
    [
        ({"num_layers": 2}, None, None),
        ({"num_layers": 2}, 4, None),
        ({"num_layers": 2}, 2, "num_layers to one of [3, 4]"),
        ({"num_layers": 2}, 5, "num_layers to one of [3, 4]"),
        ({"num_layers": 4}, None, "add_layers=null"),
        ({}, None, "drop layers"),
        ({"num_layers": 2, "ffn_hidden_size": 64}, None, "prune only layers"),
    ],
)
def test_added_layers_need_a_student_with_the_widths_of_its_teacher(
    chain: Chain, student: dict[str, int], num_layers: int | None, found: str | None
) -> None:
    teacher = replace(chain.teacher, num_layers=5)
    shapes = {"distill": [replace(teacher, **student)]}
    prune = PruneConfig("prune", {"checkpoint": "import_hf"})
    stages = {"prune": prune, "distill": DistillConfig("distill", {"student": "prune"})}
    chain = replace(chain, teacher=teacher, stages=stages, shapes=shapes)
    inputs = {"teacher": "import_hf", "student": "distill", "data": "prepare_data"}
    cfg = AddLayersConfig("add_layers", inputs, num_layers=num_layers)
    fixes = [problem.fix for problem in add_layers.check(cfg, chain)]
    assert [found is not None and found in fix for fix in fixes] == ([True] if found else [])
    written = add_layers.result_shape(cfg, chain).num_layers
    assert found is not None or written == (num_layers or 3)


@pytest.mark.parametrize(
    ("model", "student", "found"),
    [
        ("import_hf", "distill", None),
        ("import_hf", "/another/run/distill", None),
        ("corrected", "distill", "stages.add_layers.inputs.teacher=import_hf"),
        ("import_hf", "import_hf", "add_layers=null"),
    ],
)
def test_added_layers_come_from_the_model_that_was_pruned(
    chain: Chain, model: str, student: str, found: str | None
) -> None:
    shape = chain.teacher
    prune = PruneConfig("prune", {"checkpoint": "import_hf"})
    stages: dict[str, StageConfig] = {"prune": prune, "import_hf": StageConfig("import_hf")}
    stages["distill"] = DistillConfig("distill", {"student": "prune"})
    smaller = [replace(shape, num_layers=shape.num_layers - 2)]
    chain = replace(chain, stages=stages, shapes={"distill": smaller})
    inputs = {"teacher": model, "student": student, "data": "prepare_data"}
    problems = [*add_layers.check(AddLayersConfig("add_layers", inputs, num_layers=1), chain)]
    origins = [p for p in problems if "teacher of add_layers" in p.what]
    assert [found in problem.fix for problem in origins if found] == ([True] if found else [])
    assert bool(origins) == bool(found)
