"""Several rounds of pruning and distilling as one chain."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from launch.schema import hydra_words
from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.pruning.targets import interpolated_shape
from tests.unit.conftest import MakePlan

if TYPE_CHECKING:
    from launch.plan import Plan

HEALS = "heal=least_squares"
HALF = "stages.prune.target_num_layers=0.5"


def order(plan: Plan) -> list[str]:
    return [s.name for s in plan.stages if s.name.startswith(("score", "prune", "heal", "distill"))]


def test_each_round_removes_an_equal_fraction(plan: MakePlan) -> None:
    once, twice, thrice = plan(HALF), plan(HALF, "rounds=2"), plan(HALF, "rounds=3")
    assert order(once) == ["score", "prune", "distill"]
    first = ["score", "prune_1", "distill_1", "score_2"]
    assert order(twice) == [*first, "prune", "distill"]
    assert order(thrice) == [*first, "prune_2", "distill_2", "score_3", "prune", "distill"]
    assert order(plan(HALF, "rounds=2", HEALS)) == [
        *("score", "prune_1", "heal_1", "distill_1", "score_2", "prune", "heal", "distill")
    ]
    # SmolLM2 has 30 layers, 576 channels and 1536 in each feed-forward layer.
    shapes = [thrice.chain.shape_of(f"distill{round}") for round in ("_1", "_2", "")]
    assert [(s.num_layers, s.hidden_size, s.ffn_hidden_size) for s in shapes] == [
        (24, 576, 1408),
        (19, 512, 1280),
        (15, 512, 1152),
    ]
    assert twice.chain.shape_of("distill_1").num_layers == 21
    for many in (twice, thrice):
        assert many.chain.shape_of("distill") == once.chain.shape_of("distill")
        assert many.chain.workloads.keys() == {n for n in order(many) if n.startswith("distill")}


def test_a_large_reduction_is_advised_to_use_rounds(plan: MakePlan) -> None:
    """Half of the layers are 39% of SmolLM2."""

    def warned(*words: str) -> list[str]:
        notes = plan(*words, recipe="recipe=llama_depth_prune").notes
        return [note.fix for note in notes if note.rule.name == "large-reduction"]

    [fix] = warned(HALF)
    assert "rounds=2" in fix
    assert warned(HALF, "rounds=2") == []
    again = warned("stages.prune.target_num_layers=1", "rounds=2")
    assert again == ["prune less, or raise rounds"]


def test_earlier_rounds_have_the_settings_of_the_last_and_their_own(plan: MakePlan) -> None:
    words = hydra_words(["stages.distill.lr=5e-4", "stages.distill_1.max_steps=50"])
    assert words[1] == "++stages.distill_1.max_steps=50"
    stages = plan(HALF, "rounds=2", HEALS, "teacher=cached", *words).chain.stages
    first, last = stages["distill_1"], stages["distill"]
    alike = replace(last, max_steps=50, compile=first.compile, inputs=first.inputs)  # type: ignore[call-arg]
    assert alike == first
    assert first.inputs == {**last.inputs, "student": "heal_1"}
    healed = [stages[name].inputs for name in ("heal_1", "heal")]
    assert [(one["checkpoint"], one["teacher"]) for one in healed] == [
        ("prune_1", "import_hf"),
        ("prune", "distill_1"),
    ]
    assert first.inputs["teacher"] == "cache_logits"
    assert stages["prune_1"].inputs["checkpoint"] == "import_hf"
    assert stages["prune"].inputs["checkpoint"] == stages["score_2"].inputs["checkpoint"]
    assert stages["score_2"].inputs["checkpoint"] == "distill_1"
    assert stages["prune"].inputs["importance"] == "score_2"


def test_rounds_approach_the_result_of_a_search(plan: MakePlan) -> None:
    planned = plan("rounds=2", "budget.parameters=0.6", recipe="recipe=shrink")
    sizes = [planned.chain.shape_of(n).parameters() for n in ("import_hf", "prune_1", "prune")]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[1] ** 2 == pytest.approx(sizes[0] * sizes[2], rel=0.05)


def test_block_sizes_are_those_of_each_rounds_layers(plan: MakePlan) -> None:
    block = ("stages.prune.layer_importance=block", "stages.score.num_loss_samples=8")
    words = (HALF, "rounds=2", *block)
    stages = {stage.name: stage.config for stage in plan(*words).stages}
    assert (stages["score"].block_sizes, stages["score_2"].block_sizes) == ([9], [6])  # type: ignore[attr-defined]
    plan(*words, "stages.score.block_sizes=[9,6]")
    with pytest.raises(RecipeError, match=r"stages\.score\.block_sizes=\[9\]"):
        plan(*words, "stages.score.block_sizes=[6]")
    with pytest.raises(RecipeError, match=r"stages\.score_2\.block_sizes=\[6\]"):
        plan(*words, "stages.score.block_sizes=[9]")


@pytest.mark.parametrize(
    ("words", "recipe", "message"),
    [
        ("rounds=0", "llama_width_prune", "must be 1 or more"),
        ("rounds=two", "llama_width_prune", "use a whole number"),
        ("rounds=2", "llama_search", "has no prune and no distill"),
        ("rounds=2 stages.prune.drop_layers=[3]", "llama_width_prune", "combined with rounds"),
    ],
)
def test_invalid_rounds_are_refused(plan: MakePlan, words: str, recipe: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(*words.split(), recipe=f"recipe={recipe}")


def test_a_shape_between_has_even_heads(teacher: Architecture) -> None:
    """8 heads in 4 groups."""
    groups = replace(teacher, num_query_groups=1, num_attention_heads=2)
    found = interpolated_shape(teacher, groups, 0.5, {})
    assert (found.num_query_groups, found.num_attention_heads) == (2, 4)
    heads = replace(teacher, num_attention_heads=4, hidden_size=64, ffn_hidden_size=128)
    found = interpolated_shape(teacher, heads, 0.25, {"hidden_size": 16, "ffn_hidden_size": 64})
    assert (found.num_query_groups, found.num_attention_heads) == (4, 8)
    assert (found.hidden_size, found.ffn_hidden_size) == (112, 192)
    assert interpolated_shape(teacher, teacher, 0.5, {"hidden_size": 100}) == teacher
