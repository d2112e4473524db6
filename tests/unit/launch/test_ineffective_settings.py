"""Settings that would have no effect, or the wrong one, are refused by the plan."""

from __future__ import annotations

import pytest

from recipes.core.errors import RecipeError
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
BY_SEARCH = "chooses it for each training"
OTHER_SEQUENCES = "logits of other sequences"
NOT_16 = "not a multiple of 16"
NOT_QUANTIZED = "that of export_hf is not quantized"
OTHER_MODULE = "settings are those of another stage"
ENGINE = "stages.build_engine."
CASES = [
    (SHRINK, [f"{SEARCH}max_steps=50"], BY_SEARCH),
    (SHRINK, [f"{SEARCH}stop_at_recovered=0.9"], BY_SEARCH),
    (SHRINK, [f"{SEARCH}student_steps=[5]"], BY_SEARCH),
    (SHRINK, [f"+{SEARCH}inputs.teacher=import_hf"], BY_SEARCH),
    (SHRINK, [f"{SEARCH}top_k=99999"], "less than the vocabulary size"),
    (SHRINK, [f"{SEARCH}resources.time=1:00:00"], "the search is one job"),
    (SHRINK, ["stages.enumerate_shapes.service.speed=fast"], "set automatically"),
    (SHRINK, ["+budget.flops=1"], "there is no field budget.flops"),
    (SHRINK, [*UNEVEN, "stages.distill.fp8=hybrid"], NOT_16),
    (SHRINK, [*UNEVEN, f"{SEARCH}fp8=hybrid"], NOT_16),
    ("recipe=llama_search", ["+stages.report.gates=['recovered > 0']"], NO_GATES),
    (DEPTH, ["stages.report.gates=['recovered > 0']"], NO_GATES),
    (DEPTH, ["tracker=wandb", "+tracker.team=us"], "there is no field tracker.team"),
    (DEPTH, ["force=[prune]", "only=[plan]"], "excludes it"),
    (DEPTH, ["teacher=cached", *NO_TEACHER], "work of cache_logits"),
    (DEPTH, ["teacher=corrected", *NO_TEACHER], "work of correct_teacher"),
    (DEPTH, ["teacher=cached", "stages.cache_logits.seed=1"], OTHER_SEQUENCES),
    (DEPTH, ["teacher=cached", "+stages.cache_logits.weights={law: 1}"], OTHER_SEQUENCES),
    (LARGE, [*QUANTIZED, f"{ENGINE}precision=bf16"], "is quantized to fp8"),
    (
        LARGE,
        [
            *(*QUANTIZED, f"{ENGINE}backend=tensorrt_llm_pytorch"),
            *(f"{ENGINE}precision=int4_awq", "stages.quantize.format=fp8"),
        ],
        "format=int4_awq, but that of quantize is quantized to fp8",
    ),
    (LARGE, [ANY_MACHINE, "engine=tensorrt_llm", f"{ENGINE}precision=fp8"], NOT_QUANTIZED),
    (LARGE, [*QUANTIZED, f"{ENGINE}inputs.checkpoint=export_hf"], NOT_QUANTIZED),
    (DEPTH, ["stages.distill.stage=evaluate"], OTHER_MODULE),
    (
        DEPTH,
        ["engine=openvino", "served=engine", "stages.evaluate_served.stage=evaluate_tasks"],
        OTHER_MODULE,
    ),
    (DEPTH, ["stages.evaluate.new_tokens=8161"], "has 8192 positions"),
    (DEPTH, ["stages.distill.weight_decay=11"], "must be 10 or less"),
    *(
        (DEPTH, [f"stages.distill.{setting}", *others], f"has no effect without {needed}")
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
    ),
]


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"), CASES, ids=[" ".join(case[1]) for case in CASES]
)
def test_a_setting_without_effect_is_refused(
    plan: MakePlan, recipe: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(*overrides, recipe=recipe)


def test_a_cache_of_the_whole_text_has_all_sequences(plan: MakePlan) -> None:
    plan(
        *("teacher=cached", "stages.cache_logits.seed=1"),
        *("stages.cache_logits.num_sequences=null", "stages.prune.target_num_layers=24"),
        recipe=DEPTH,
    )
