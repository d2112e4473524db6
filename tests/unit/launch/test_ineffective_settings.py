"""Settings that would have no effect, or the wrong one, are refused by the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from recipes.core.errors import RecipeError

if TYPE_CHECKING:
    from tests.unit.conftest import MakePlan

SHRINK, DEPTH = "recipe=shrink", "recipe=llama_depth_prune"
SEARCH = "stages.successive_halving.distill."
NO_GATES = "; only the latter is judged"
LARGE = "recipe=llama3_1_8b_depth"
ANY_MACHINE = "skip_rules=[engine-image,memory,job]"
QUANTIZED = (ANY_MACHINE, "engine=tensorrt_llm_quantized")
GPU = ("hardware=h100", "hardware.precision=bf16-mixed")
UNEVEN = (*GPU, "stages.enumerate_shapes.space.ffn_hidden_size_divisor=8")
"""Settings of a search: the sizes of some shapes, not the largest, are no multiples of 16."""
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
    "job of a training in a search": (SHRINK, [f"{SEARCH}resources.time=1:00:00"], "is one job"),
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
    "gates of the report": (DEPTH, ["stages.report.gates=['recovered > 0']"], NO_GATES),
    "gates of the report of a search": (
        *("recipe=llama_search", ["+stages.report.gates=['recovered > 0']"], NO_GATES),
    ),
    "FP8 after a search": (SHRINK, [*UNEVEN, "stages.distill.fp8=hybrid"], "not a multiple of 16"),
    "FP8 in a search": (SHRINK, [*UNEVEN, f"{SEARCH}fp8=hybrid"], "not a multiple of 16"),
    "quantized model in bf16": (
        *(LARGE, [*QUANTIZED, "stages.build_engine.precision=bf16"], "is quantized to fp8"),
    ),
    "other format": (
        LARGE,
        [
            *(*QUANTIZED, "stages.build_engine.backend=tensorrt_llm_pytorch"),
            *("stages.build_engine.precision=int4_awq", "stages.quantize.format=fp8"),
        ],
        "format=int4_awq, but that of quantize is quantized to fp8",
    ),
    "fp8 without quantize": (
        LARGE,
        [ANY_MACHINE, "engine=tensorrt_llm", "stages.build_engine.precision=fp8"],
        "that of export_hf is not quantized",
    ),
    "quantize without effect": (
        LARGE,
        [*QUANTIZED, "stages.build_engine.inputs.checkpoint=export_hf"],
        "that of export_hf is not quantized",
    ),
    "module of another stage": (
        *(DEPTH, ["stages.distill.stage=evaluate"], "settings are those of another stage"),
    ),
    "module of a similar stage": (
        DEPTH,
        ["engine=openvino", "served=engine", "stages.evaluate_served.stage=evaluate_tasks"],
        "another stage",
    ),
    "long generations": (DEPTH, ["stages.evaluate.new_tokens=8161"], "has 8192 positions"),
    **{
        setting: (DEPTH, [f"stages.distill.{setting}", *others], f"has no effect without {needed}")
        for setting, needed, *others in (
            ("jsd_beta=0.3", "logits_loss=jsd"),
            ("hidden_loss=mse", "hidden_weight above 0"),
            ("intermediate_layer_pairs=[[1,1]]", "hidden_weight above 0"),
            ("hidden_pipeline_stages=1", "hidden_weight above 0"),
            ("logits_loss=jsd", "kd_weight above 0", *NO_TEACHER),
            ("temperature=2", "kd_weight above 0", *NO_TEACHER),
            ("top_k=8", "kd_weight above 0", *NO_TEACHER),
            ("loss_balancer=dynamic", "two of kd_weight", *NO_TEACHER),
            ("fp8_recipe=delayed", "fp8=hybrid"),
        )
    },
    "large weight decay": (DEPTH, ["stages.distill.weight_decay=11"], "must be 10 or less"),
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
