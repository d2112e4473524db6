from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hydra.errors import HydraException

from launch.hydra_errors import SHOW_FIELDS, SHOW_HELP, explain
from launch.schema import hydra_words, recipes
from recipes.core.errors import RecipeError

RECIPE = "recipe=llama_width_prune"
Compose = Callable[..., Any]


def explained(compose: Compose, *overrides: str) -> str:
    with pytest.raises(HydraException) as caught:
        compose(*overrides)
    return explain(caught.value)


def test_recipe_errors_are_shown_as_they_are() -> None:
    assert explain(RecipeError("what\nelse", "mend it")) == "what\nelse\n  fix: mend it"


def test_unknown_recipe_lists_the_recipes_only(compose: Compose) -> None:
    assert explained(compose, "recipe=llama_width_prun").splitlines() == [
        "there is no recipe 'llama_width_prun'. Did you mean 'llama_width_prune'?",
        f"  fix: use one of: {', '.join(recipes())}",
    ]


def test_a_recipe_without_its_key_is_recognised(compose: Compose) -> None:
    said = "'llama_width_prune' is neither FIELD=VALUE nor a command."
    assert explained(compose, "llama_width_prune").splitlines() == [
        f"{said} Did you mean 'recipe=llama_width_prune'?",
        f"  fix: {SHOW_HELP}",
    ]


@pytest.mark.parametrize("word", ["cluster=null", "recipe=null", "hardware=[]", "model=org/name"])
def test_what_is_no_choice_of_a_group_is_refused(word: str) -> None:
    with pytest.raises(RecipeError, match="names no "):
        hydra_words([word])


def test_null_chooses_nothing_also_in_a_sweep(compose: Compose) -> None:
    assert hydra_words([RECIPE, "heal=null,least_squares", "-m"]) == [
        *("-m", RECIPE, "heal=[],least_squares")
    ]
    stages = compose(RECIPE, "engine=null", "tracker=null").stages
    assert "build_engine" not in stages
    assert "export_hf" in stages


def test_a_hub_id_is_no_choice_of_a_group() -> None:
    with pytest.raises(RecipeError, match=r"fix: model.hf_path=Qwen/Qwen3-8B for a folder or a"):
        hydra_words(["model=Qwen/Qwen3-8B"])


def test_no_near_name_gives_no_hint(compose: Compose) -> None:
    first, fix = explained(compose, "recipe=zzz").splitlines()
    assert first == "there is no recipe 'zzz'."
    assert fix.endswith(", ".join(recipes()))


@pytest.mark.parametrize(
    ("override", "words", "options"),
    [
        ("model=smollm", "there is no model 'smollm'.", "smollm2_135m"),
        ("data=wikpedia", "no data 'wikpedia'. Did you mean 'wikipedia'?", "wikipedia"),
        ("cluster=locl", "no cluster 'locl'. Did you mean 'local'?", "local"),
        ("engine=none", "there is no engine 'none'.", "null"),
        ("stage/distill@stages.distill=logit", "Did you mean 'logits'?", "logits"),
    ],
)
def test_unknown_option_of_each_group(
    compose: Compose, override: str, words: str, options: str
) -> None:
    message = explained(compose, RECIPE, override)
    assert words in message
    listed = message.partition("use one of: ")[2].split(", ")
    assert options in listed
    assert "schema" not in listed
    assert not [name for name in listed if "/" in name or "=" in name or " " in name]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.prune.target_hiden_size=512",
            "there is no field stages.prune.target_hiden_size. Did you mean 'target_hidden_size'?",
        ),
        ("stages.prun.seq_length=1", "there is no field stages.prun. Did you mean 'prune'?"),
        ("model.hf_pth=x", "there is no field model.hf_pth. Did you mean 'hf_path'?"),
        ("distill.lr=1", "there is no field distill. Did you mean 'stages.distill'?"),
        ("dryrun=true", "there is no field dryrun. Did you mean 'dry_run'?"),
        ("latency=measured", "there is no field latency. Did you mean 'latency_model'?"),
        (
            "latency_model=measured",
            "this recipe has no latency_model.\n  fix: leave out latency_model=…",
        ),
        ("stages.only=[prune]", "there is no field stages.only. Did you mean 'only'?"),
        ("stages.distill.resources.device=2", "resources.device. Did you mean 'devices'?"),
        (
            "stages.prune.qqq=1",
            f"stages.prune.qqq.\n  fix: {SHOW_FIELDS}",
        ),
        ("cluster.env.NCCL_DEBUG=INFO", "fix: '+cluster.env={NCCL_DEBUG: …}' adds it"),
        (
            "stages.evaluate_tasks.revisions={allenai/sciq: a1}",
            "fix: '+stages.evaluate_tasks.revisions={allenai/sciq: …}' adds it",
        ),
    ],
)
def test_unknown_field_names_the_nearest(compose: Compose, override: str, message: str) -> None:
    assert explained(compose, RECIPE, override).endswith(message)


@pytest.mark.parametrize(
    ("override", "value", "field", "type_name"),
    [
        ("stages.distill.max_steps=abc", "'abc'", "stages.distill.max_steps", "Integer"),
        ("stages.distill.lr=fast", "'fast'", "stages.distill.lr", "Float"),
        ("stages.prune.drop_layers=[x]", "'x'", "stages.prune.drop_layers", "Integer"),
        ("stages.import_hf.pack=maybe", "'maybe'", "stages.import_hf.pack", "valid bool"),
    ],
)
def test_wrong_type_names_value_field_and_type(
    compose: Compose, override: str, value: str, field: str, type_name: str
) -> None:
    message = explained(compose, RECIPE, override)
    assert override in message
    for words in (value, field, type_name):
        assert words in message


def test_malformed_override_is_quoted(compose: Compose) -> None:
    assert "[a" in explained(compose, RECIPE, "stages.prune.drop_layers=[a")


def test_other_errors_show_two_messages_of_their_chain() -> None:
    outer, inner = HydraException("outer"), ValueError("inner")
    outer.__cause__, inner.__cause__ = inner, KeyError("innermost")
    assert explain(outer).startswith("outer\n  inner\n  fix: --cfg job shows")


def test_implicit_causes_count() -> None:
    outer = HydraException("outer")
    outer.__context__ = ValueError("inner")
    assert explain(outer).startswith("outer\n  inner\n  fix:")
