"""Settings that would have no effect, or the wrong one, are refused by the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from recipes.core.errors import RecipeError

if TYPE_CHECKING:
    from tests.unit.conftest import MakePlan

SHRINK, DEPTH = "recipe=shrink", "recipe=llama_depth_prune"
SEARCH = "stages.successive_halving.distill."
NO_TEACHER = ("stages.distill.kd_weight=0", "stages.distill.lm_weight=1")
CASES = {
    "steps of a search": (SHRINK, [f"{SEARCH}max_steps=50"], "chooses it for each training"),
    "early stop in a search": (
        *(SHRINK, [f"{SEARCH}stop_at_recovered=0.9"], "chooses it for each training"),
    ),
    "students of a search": (
        *(SHRINK, [f"{SEARCH}student_steps=[5]"], "chooses it for each training"),
    ),
    "inputs of a search": (
        *(SHRINK, [f"+{SEARCH}inputs.teacher=import_hf"], "chooses it for each training"),
    ),
    "top-k in a search": (SHRINK, [f"{SEARCH}top_k=99999"], "less than the vocabulary size"),
    "computed speed": (SHRINK, ["stages.enumerate_shapes.service.speed=fast"], "set automatically"),
    "unknown limit": (SHRINK, ["+budget.flops=1"], "there is no field budget.flops"),
    "unknown tracker field": (
        *(DEPTH, ["tracker=wandb", "+tracker.team=us"], "there is no field tracker.team"),
    ),
    "force without its stage": (DEPTH, ["force=[prune]", "only=[plan]"], "excludes it"),
    "cached teacher without loss": (DEPTH, ["teacher=cached", *NO_TEACHER], "work of cache_logits"),
    "corrected teacher without loss": (
        *(DEPTH, ["teacher=corrected", *NO_TEACHER], "work of correct_teacher"),
    ),
    "cache of other sequences": (
        *(DEPTH, ["teacher=cached", "stages.cache_logits.seed=1"], "logits of other sequences"),
    ),
    "cache with other weights": (
        DEPTH,
        ["teacher=cached", "+stages.cache_logits.weights={law: 1}"],
        "logits of other sequences",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_setting_without_effect_is_refused(plan: MakePlan, name: str) -> None:
    recipe, overrides, message = CASES[name]
    with pytest.raises(RecipeError, match=message):
        plan(*overrides, recipe=recipe)


def test_a_cache_of_the_whole_text_has_all_sequences(plan: MakePlan) -> None:
    plan(
        *("teacher=cached", "stages.cache_logits.seed=1"),
        *("stages.cache_logits.num_sequences=null", "stages.prune.target_num_layers=24"),
        recipe=DEPTH,
    )
