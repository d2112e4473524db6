"""Plans of ``long_context=32k``, a second phase of the distillation."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from launch.plan import Plan
from launch.schema import hydra_arguments
from recipes.core.errors import RecipeError
from recipes.planning.training_cost import training_cost
from tests.support.text import write_token_files
from tests.unit.conftest import MakePlan

LONG = "long_context=32k"
ON_GPUS = ("cluster=slurm", "cluster.account=a", "cluster.images.tensorrt_llm=engine:1")
"""Overrides for Slurm. The account and the image need not exist."""


@pytest.mark.parametrize(
    "recipe",
    [
        *("llama3_1_8b_depth", "llama3_1_8b_width_2.5b", "mistral_nemo_12b_width"),
        *("qwen3_8b_depth", "qwen3_8b_nas"),
    ],
)
def test_the_second_phase_fits_into_memory_and_costs_little(plan: MakePlan, recipe: str) -> None:
    chain = plan(LONG, *ON_GPUS, recipe=f"recipe={recipe}").chain
    workload = chain.workloads["distill_long"]
    # The values are from conf/long_context/32k.yaml.
    assert (workload.seq_length, workload.layout.context) == (32768, 2)
    assert workload.trained == chain.shape_of("distill")
    # 500 steps of 32 sequences of 32,768 tokens.
    assert workload.tokens == pytest.approx(0.52e9, rel=0.01)
    cost = training_cost(workload, chain.hardware)
    assert cost.memory.total < 70e9  # of 80 GB
    assert cost.device_hours < 100  # our limit


OWN_SETTINGS = {
    *("lr", "min_lr", "max_steps", "warmup_steps", "val_check_interval", "limit_val_batches"),
    *("stage", "name", "inputs", "student_steps", "stop_at_recovered", "hidden_pipeline_stages"),
}
"""Settings that affect results and that other trainings do not copy from ``distill``."""


@pytest.mark.parametrize(
    ("overrides", "stage", "own"),
    [
        (("teacher=corrected",), "correct_teacher", set()),
        # Sequences, and batches of them, are longer in the second phase.
        ((LONG, *ON_GPUS), "distill_long", {"seq_length", "global_batch_size"}),
    ],
)
def test_other_trainings_have_the_settings_of_the_distillation(
    plan: MakePlan, overrides: tuple[str, ...], stage: str, own: set[str]
) -> None:
    """``lr`` and a few others are their own. All other settings that affect results are copied."""
    changes = {
        "seed": 7,
        "precision": "32",
        "mask_document_ends": False,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "clip_grad": 2.0,
        "grad_reduce_in_fp32": False,
        "weight_decay": 0.2,
        "weights": {"wikipedia": 1.0, "speeches": 2.0},
    }
    values = {key: f"stages.distill.{key}={value}" for key, value in changes.items()}
    values["weights"] = "+stages.distill.weights={wikipedia: 1, speeches: 2}"
    planned = plan(*values.values(), "data=two_kinds", *overrides, recipe="recipe=qwen3_8b_depth")
    distill = vars(planned.chain.stages["distill"])
    other = planned.chain.stages[stage]
    assert {key: distill[key] for key in changes} == changes
    settings = [spec.name for spec in fields(other) if not spec.metadata.get("resource")]
    compared = {*settings} - OWN_SETTINGS - own - {"resources"}
    assert {key: vars(other)[key] for key in compared} == {key: distill[key] for key in compared}


def test_later_stages_use_the_model_of_the_second_phase(plan: MakePlan) -> None:
    def model_sources(planned: Plan) -> set[str]:
        """Returns the stages whose results later stages read as the final student."""
        stages = planned.chain.stages
        model_inputs = dict.fromkeys(("evaluate", "evaluate_tasks", "report"), "distilled")
        model_inputs["export_hf"] = "checkpoint"
        return {stages[stage].inputs[key] for stage, key in model_inputs.items()}

    recipe = "recipe=qwen3_8b_depth"
    overrides = (LONG, "tasks=full", "teacher=corrected", "skip_rules=[memory]")
    planned = plan(*overrides, *ON_GPUS, recipe=recipe)
    assert model_sources(planned) == {"distill_long"}
    # Without a second phase:
    assert model_sources(plan("tasks=full", *ON_GPUS, recipe=recipe)) == {"distill"}
    # With a stage after the second phase:
    stages = plan("add_layers=teacher", *overrides, *ON_GPUS, recipe=recipe).chain.stages
    assert stages["add_layers"].inputs["student"] == "distill_long"
    for name in ("evaluate", "evaluate_tasks"):
        assert stages[name].inputs["distilled"] == "add_layers"
    assert stages["export_hf"].inputs["checkpoint"] == "add_layers"
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
        ("long_context=32", "long_context"),  # neither is a name of a choice
        ("long_context=nan", "long_context"),
    ],
)
def test_settings_that_the_second_phase_does_not_support_are_refused(
    plan: MakePlan, override: str, message: str
) -> None:
    # ``override`` replaces one of the common overrides if it has the same key.
    settings = dict(item.split("=", maxsplit=1) for item in (LONG, *ON_GPUS, override))
    arguments = ["=".join(setting) for setting in settings.items()]
    with pytest.raises(RecipeError, match=message):
        # ``hydra_arguments`` refuses values of a group that are not names.
        plan(*hydra_arguments(arguments), recipe="recipe=qwen3_8b_depth")


def test_both_phases_accept_conversations(plan: MakePlan, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats.write_text(json.dumps({"messages": messages}) + "\n")
    overrides = (LONG, f"data.sources=[{chats}]", "data.format=chat", "data.heldout_sources=[]")
    skip_rules = "skip_rules=[tokens,data-splits,data-sources]"  # there is only one conversation
    plan(*overrides, *ON_GPUS, skip_rules, recipe="recipe=qwen3_8b_depth")


def test_both_phases_must_split_tokenized_text_at_the_same_documents(
    plan: MakePlan, tmp_path: Path
) -> None:
    """Otherwise, the second phase would train on documents that the first phase holds out."""
    prefix = write_token_files(tmp_path / "corpus")
    (tmp_path / "link").symlink_to(tmp_path)
    overrides = (LONG, f"data.prefix={prefix}", "data.sources=[]", "data.heldout_sources=[]")
    overrides += (*ON_GPUS, "skip_rules=[tokens]")
    recipe, second_data = "recipe=qwen3_8b_depth", "stages.prepare_long_data"
    # The same files, also if the second phase reads them through a link. ``max_tokens`` affects
    # where the splits start, and has another value in the second phase.
    same_split = f"{second_data}.max_tokens=${{stages.prepare_data.max_tokens}}"
    for prefix_override in ((), (f"{second_data}.prefix={tmp_path}/link/corpus",)):
        with pytest.raises(RecipeError, match=re.escape(f"'{same_split}'")):
            plan(*overrides, *prefix_override, recipe=recipe)
        plan(*overrides, *prefix_override, same_split, recipe=recipe)
    # Only the first phase has tokenized text, so its documents cannot be recognized in the second.
    other_text = (f"{second_data}.prefix=null", f"{second_data}.sources=[{tmp_path}/*.txt]")
    (tmp_path / "text.txt").write_text("A text.")
    no_held_out = f"~{second_data}.inputs.held_out"
    with pytest.raises(RecipeError, match=re.escape(f"'{no_held_out}'")):
        plan(*overrides, *other_text, recipe=recipe)
    plan(*overrides, *other_text, no_held_out, recipe=recipe)
    # Documents of separate held-out text can be recognized.
    held_out = f"stages.prepare_data.heldout_sources=[{tmp_path}/*.txt]"
    plan(*overrides, *other_text, held_out, recipe=recipe)
