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
    ("student_sizes", "num_layers", "fix"),  # ``fix`` is ``None`` if there is no problem
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
    chain: Chain, student_sizes: dict[str, int], num_layers: int | None, fix: str | None
) -> None:
    """The teacher has 5 layers. The student has the teacher's sizes except ``student_sizes``."""
    teacher = replace(chain.teacher, num_layers=5)
    shapes = {"distill": [replace(teacher, **student_sizes)]}
    prune = PruneConfig("prune", {"checkpoint": "import_hf"})
    stages = {"prune": prune, "distill": DistillConfig("distill", {"student": "prune"})}
    chain = replace(chain, teacher=teacher, stages=stages, shapes=shapes)
    inputs = {"teacher": "import_hf", "student": "distill", "data": "prepare_data"}
    cfg = AddLayersConfig("add_layers", inputs, num_layers=num_layers)
    problems = list(add_layers.check(cfg, chain))
    if fix is not None:
        [problem] = problems
        assert fix in problem.fix
        return
    assert problems == []
    default = 3  # (2 + 5) // 2: the mean of the student's and the teacher's layers
    assert add_layers.result_shape(cfg, chain).num_layers == (num_layers or default)


@pytest.mark.parametrize(
    ("teacher_stage", "student_stage", "fix"),
    [
        ("import_hf", "distill", None),
        ("import_hf", "/another/run/distill", None),
        ("corrected", "distill", "stages.add_layers.inputs.teacher=import_hf"),
        ("import_hf", "import_hf", "add_layers=null"),
    ],
)
def test_added_layers_come_from_the_model_that_was_pruned(
    chain: Chain, teacher_stage: str, student_stage: str, fix: str | None
) -> None:
    """``distill`` was pruned from ``import_hf``. The origin of another run's student is unknown.

    Without a known origin, ``run`` checks the student.
    """
    shape = chain.teacher
    prune = PruneConfig("prune", {"checkpoint": "import_hf"})
    stages: dict[str, StageConfig] = {"prune": prune, "import_hf": StageConfig("import_hf")}
    stages["distill"] = DistillConfig("distill", {"student": "prune"})
    smaller = [replace(shape, num_layers=shape.num_layers - 2)]
    chain = replace(chain, stages=stages, shapes={"distill": smaller})
    inputs = {"teacher": teacher_stage, "student": student_stage, "data": "prepare_data"}
    problems = add_layers.check(AddLayersConfig("add_layers", inputs), chain)
    # Only these problems are about the origin of the student.
    fixes = [problem.fix for problem in problems if "teacher of add_layers" in problem.what]
    assert len(fixes) == (fix is not None)
    assert all(str(fix) in origin_fix for origin_fix in fixes)
