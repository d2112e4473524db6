"""A chain whose shape a search chooses while it runs: what is planned and checked before."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from recipes.core.errors import RecipeError
from recipes.core.manifest import write_manifest
from recipes.search.space import name_of
from tests.support.manifests import bare_manifest
from tests.support.runs import settings

if TYPE_CHECKING:
    from tests.unit.conftest import Complete, MakePlan

RECIPE = "recipe=shrink"
LARGE = [
    "model=llama3_1_8b",
    "hardware=h100",
    *settings("enumerate_shapes.space", tensor_model_parallel_size=4),
    *(
        word
        for stage in ("distill", "successive_halving.distill")
        for word in settings(stage, **{"tensor_model_parallel_size": 4, "resources.devices": 4})
    ),
]
"""Llama 3.1 8B, with trainings on four H100."""


@pytest.fixture
def tiny(hf_folder: Path) -> list[str]:
    """Overrides for a model of four layers."""
    steps = "stages.enumerate_shapes.space={hidden_size_divisor: 32, ffn_hidden_size_divisor: 32}"
    return [f"model.hf_path={hf_folder}", steps, "data.seq_length=64"]


@pytest.mark.parametrize(
    ("budget", "least", "most"),
    [
        ("parameters=0.7", 0.69, 0.7),
        ("latency_ms=0.7 budget.parameters=null", 0.6, 0.75),
        ("tokens_per_second=305 budget.parameters=null", 0.6, 0.75),
    ],
)
def test_what_is_planned_is_the_largest_shape_within_the_budget(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch, budget: str, least: float, most: float
) -> None:
    """Without torch: a login node may have none."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("recipes.planning.published_configs.in_reach", lambda _: False)
    planned = plan(*LARGE, *f"budget.{budget}".split(), recipe=RECIPE)
    chain = planned.chain
    student = chain.shape_of("prune")
    whole = chain.teacher.parameters()
    assert least * whole < student.parameters() <= most * whole
    [note] = [note for note in planned.notes if note.rule.name == "searched-shape"]
    assert name_of(student) in note.what
    assert chain.workloads["distill"].trained == student
    search: Any = chain.stages["enumerate_shapes"]
    assert student == max(search.shapes(chain.teacher), key=lambda s: s.parameters())
    [prune] = [stage for stage in planned.stages if stage.name == "prune"]
    assert prune.inputs["shape"].kind == "search_results"
    names = [stage.name for stage in planned.stages]
    assert names.index("successive_halving") < names.index("prune") < names.index("distill")


def test_another_budget_reuses_what_does_not_depend_on_it(
    plan: MakePlan, complete: Complete, tiny: list[str]
) -> None:
    complete(plan(*tiny, recipe=RECIPE))
    assert plan(*tiny, recipe=RECIPE).todo() == []
    again = {s.name: s.reason for s in plan(*tiny, "budget.parameters=0.6", recipe=RECIPE).todo()}
    assert not {"import_hf", "prepare_data", "score"} & again.keys()
    assert again["rank_candidates"] == "input shapes changed"
    assert again["prune"] == "input shape changed"
    assert again["distill"] == "input student changed"


@pytest.mark.parametrize(
    ("override", "what", "fix"),
    [
        ("stages.prune.target_num_layers=3", "has both targets and a search", "~stages.prune"),
        ("stages.prune.drop_layers=[2]", "has both targets and a search", "~stages.prune"),
        (
            "stages.prune.inputs.shape=rank_candidates",
            "has no chosen architecture",
            "successive_halving",
        ),
        ("stages.prune.inputs.shape=OTHER", "has no chosen architecture", "run it again"),
        ("budget.parameters=null", "budget is empty", "parameters, weight_bytes"),
        ("budget.parameters=0.01", "no architecture fits", "loosen the budget"),
    ],
)
def test_a_shape_that_cannot_be_taken_is_refused(
    plan: MakePlan, tiny: list[str], tmp_path: Path, override: str, what: str, fix: str
) -> None:
    other = tmp_path / "other"
    (other / "artifact").mkdir(parents=True)
    write_manifest(other, bare_manifest("successive_halving", "search_results", None))
    with pytest.raises(RecipeError) as caught:
        plan(*tiny, override.replace("OTHER", str(other)), recipe=RECIPE)
    assert what in str(caught.value)
    assert fix in str(caught.value)


def test_the_choice_of_another_runs_search_is_known(
    plan: MakePlan, tiny: list[str], tmp_path: Path
) -> None:
    """Any recipe takes it, and plans for that very shape."""
    other = tmp_path / "other"
    (other / "artifact").mkdir(parents=True)
    found = bare_manifest("successive_halving", "search_results", None)
    shape = plan(*tiny, recipe=RECIPE).chain.shape_of("prune")
    found.architecture = shape.as_dict() | {"num_layers": 3, "ffn_hidden_size": 160}
    write_manifest(other, found)
    words = [f"+stages.prune.inputs.shape={other}", "stages.prune.target_num_layers=null"]
    planned = plan(*tiny[::2], *words, recipe="recipe=llama_depth_prune")
    student = planned.chain.shape_of("prune")
    assert (student.num_layers, student.ffn_hidden_size) == (3, 160)
    assert "searched-shape" not in {note.rule.name for note in planned.notes}
