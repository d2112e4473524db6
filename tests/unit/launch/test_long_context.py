"""Plans of ``long_context=32k``, a second phase of the distillation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launch.schema import hydra_arguments
from recipes.core.errors import RecipeError
from recipes.planning.training_cost import training_cost
from tests.support.text import write_token_files
from tests.unit.conftest import MakePlan

if TYPE_CHECKING:
    from launch.plan import Plan

LONG = "long_context=32k"
ON_GPUS = ("cluster=slurm", "cluster.account=a", "cluster.images.tensorrt_llm=engine:1")
RECIPES = [
    "llama3_1_8b_depth",
    "llama3_1_8b_width_2.5b",
    "mistral_nemo_12b_width",
    "qwen3_8b_depth",
    "qwen3_8b_nas",
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_second_phase_fits_and_costs_little(plan: MakePlan, recipe: str) -> None:
    chain = plan(LONG, *ON_GPUS, recipe=f"recipe={recipe}").chain
    workload = chain.workloads["distill_long"]
    assert (workload.seq_length, workload.layout.context) == (32768, 2)
    assert workload.trained == chain.shape_of("distill")
    assert workload.tokens == pytest.approx(0.52e9, rel=0.01)
    cost = training_cost(workload, chain.hardware)
    assert cost.memory.total < 70e9  # of 80 GB
    assert cost.device_hours < 100


def test_later_stages_use_the_model_of_the_second_phase(plan: MakePlan) -> None:
    def sources_of_models(planned: Plan) -> set[str]:
        stages = planned.chain.stages
        model_inputs = dict.fromkeys(("evaluate", "evaluate_tasks", "report"), "distilled")
        model_inputs["export_hf"] = "checkpoint"
        return {stages[stage].inputs[key] for stage, key in model_inputs.items()}

    recipe = "recipe=qwen3_8b_depth"
    overrides = (LONG, "tasks=full", "teacher=corrected", "skip_rules=[memory]")
    planned = plan(*overrides, *ON_GPUS, recipe=recipe)
    assert sources_of_models(planned) == {"distill_long"}
    assert sources_of_models(plan("tasks=full", *ON_GPUS, recipe=recipe)) == {"distill"}
    added = plan("add_layers=teacher", *overrides, *ON_GPUS, recipe=recipe).chain.stages
    assert added["add_layers"].inputs["student"] == "distill_long"
    assert (
        {added[name].inputs["distilled"] for name in ("evaluate", "evaluate_tasks")}
        == {added["export_hf"].inputs["checkpoint"]}
        == {"add_layers"}
    )
    assert planned.chain.stages["distill_long"].inputs == {
        "teacher": "correct_teacher",
        "student": "distill",
        "data": "prepare_long_data",
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=smollm2_135m", r"seq_length=32768 .* teacher's 8192 positions"),
        ("hardware=cpu", "context_parallel_size=2 needs a GPU"),
        ("teacher=cached", "cached teacher has seq_length=4096"),
        ("long_context=32", "long_context"),
        ("long_context=nan", "long_context"),
    ],
)
def test_settings_that_the_second_phase_does_not_support_are_refused(
    plan: MakePlan, override: str, message: str
) -> None:
    # ``override`` replaces one of the common overrides if it has the same key.
    overrides = dict([item.partition("=")[::2] for item in (LONG, *ON_GPUS, override)])
    with pytest.raises(RecipeError, match=message):
        plan(*hydra_arguments(map("=".join, overrides.items())), recipe="recipe=qwen3_8b_depth")


def test_both_phases_accept_conversations(plan: MakePlan, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats.write_text(json.dumps({"messages": messages}) + "\n")
    overrides = (LONG, f"data.sources=[{chats}]", "data.format=chat", "data.heldout_sources=[]")
    skipped = "skip_rules=[tokens,data-splits,data-sources]"
    plan(*overrides, *ON_GPUS, skipped, recipe="recipe=qwen3_8b_depth")


def test_tokenized_text_must_be_divided_in_the_same_way_in_both_phases(
    plan: MakePlan, tmp_path: Path
) -> None:
    """Otherwise, the second phase would train on documents that the first phase holds out."""
    prefix = write_token_files(tmp_path / "corpus")
    (tmp_path / "link").symlink_to(tmp_path)
    overrides = (LONG, f"data.prefix={prefix}", "data.sources=[]", "data.heldout_sources=[]")
    overrides += (*ON_GPUS, "skip_rules=[tokens]")
    recipe, second = "recipe=qwen3_8b_depth", "stages.prepare_long_data"
    same = f"{second}.max_tokens=${{stages.prepare_data.max_tokens}}"
    for link in ((), (f"{second}.prefix={tmp_path}/link/corpus",)):
        with pytest.raises(RecipeError, match=re.escape(f"'{same}'")):
            plan(*overrides, *link, recipe=recipe)
        plan(*overrides, *link, same, recipe=recipe)
    text = (f"{second}.prefix=null", f"{second}.sources=[{tmp_path}/*.txt]")
    (tmp_path / "text.txt").write_text("A text.")
    fix = f"~{second}.inputs.held_out"
    with pytest.raises(RecipeError, match=re.escape(f"'{fix}'")):
        plan(*overrides, *text, recipe=recipe)
    plan(*overrides, *text, fix, recipe=recipe)
    plan(
        *overrides, *text, f"stages.prepare_data.heldout_sources=[{tmp_path}/*.txt]", recipe=recipe
    )
