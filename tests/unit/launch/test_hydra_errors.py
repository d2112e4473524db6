"""Errors of Hydra and OmegaConf become one message with a fix."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from launch.hydra_errors import SHOW_FIELDS, SHOW_HELP, explain
from launch.schema import CONF, hydra_arguments, recipes
from launch.settings import DATA_FIELDS
from recipes.core.errors import RecipeError
from tests.unit.conftest import stage_named

if TYPE_CHECKING:
    from tests.unit.conftest import Compose, MakePlan

RECIPE = "recipe=llama_width_prune"


def error_message(compose: Compose, *overrides: str) -> str:
    """Returns the message for overrides that Hydra refuses."""
    with pytest.raises(HydraException) as caught:
        compose(*overrides)
    return explain(caught.value)


def test_unknown_recipes_list_all_recipes(compose: Compose) -> None:
    all_recipes = f"  fix: use one of: {', '.join(recipes())}"
    suggestion = "Did you mean 'llama_width_prune'?"
    assert error_message(compose, "recipe=llama_width_prun").splitlines() == [
        f"there is no recipe 'llama_width_prun'. {suggestion}",
        all_recipes,
    ]
    assert error_message(compose, "recipe=zzz").splitlines() == [
        "there is no recipe 'zzz'.",
        all_recipes,
    ]
    assert error_message(compose, "llama_width_prune").splitlines() == [
        "'llama_width_prune' is neither FIELD=VALUE nor a command. "
        "Did you mean 'recipe=llama_width_prune'?",
        f"  fix: {SHOW_HELP}",
    ]


@pytest.mark.parametrize(
    "arg", ["cluster=null", "recipe=null", "hardware=[]", "model=org/name", "+data=5"]
)
def test_values_that_are_not_choices_are_refused(arg: str) -> None:
    with pytest.raises(RecipeError, match="names no ") as caught:
        hydra_arguments([arg])
    hint = "fix: model.hf_path=org/name for a folder or a hub id"
    assert (hint in str(caught.value)) == arg.startswith("model")


def test_null_omits_a_group_in_a_sweep_too(compose: Compose) -> None:
    arguments = hydra_arguments([RECIPE, "heal=null,least_squares", "-m"])
    assert arguments == ["-m", RECIPE, "heal=[],least_squares"]
    stages = compose(RECIPE, "engine=null", "tracker=null").stages
    assert "build_engine" not in stages
    assert "export_hf" in stages


@pytest.mark.parametrize(
    ("override", "expected", "option"),
    [
        ("model=smollm", "there is no model 'smollm'.", "smollm2_135m"),
        ("data=wikpedia", "no data 'wikpedia'. Did you mean 'wikipedia'?", "wikipedia"),
        ("engine=none", "there is no engine 'none'.", "null"),
        ("stage/distill@stages.distill=logit", "Did you mean 'logits'?", "logits"),
    ],
)
def test_unknown_choices_list_the_choices(
    compose: Compose, override: str, expected: str, option: str
) -> None:
    message = error_message(compose, RECIPE, override)
    assert expected in message
    choices = message.partition("use one of: ")[2].split(", ")
    assert option in choices
    assert "schema" not in choices
    assert not [name for name in choices if "/" in name or "=" in name or " " in name]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.prune.target_hiden_size=512", "_hiden_size. Did you mean 'target_hidden_size'?"),
        ("stages.prun.seq_length=1", "there is no field stages.prun. Did you mean 'prune'?"),
        ("distill.lr=1", "there is no field distill. Did you mean 'stages.distill'?"),
        ("dryrun=true", "there is no field dryrun. Did you mean 'dry_run'?"),
        ("latency=measured", "there is no field latency. Did you mean 'latency_model'?"),
        ("latency_model=measured", "has no latency_model.\n  fix: leave out latency_model=…"),
        ("stages.only=[prune]", "there is no field stages.only. Did you mean 'only'?"),
        ("stages.distill.resources.device=2", "resources.device. Did you mean 'devices'?"),
        ("stages.prune.qqq=1", f"stages.prune.qqq.\n  fix: {SHOW_FIELDS}"),
        ("cluster.env.NCCL_DEBUG=INFO", "fix: '+cluster.env={NCCL_DEBUG: …}' adds it"),
        (
            "stages.distill.weights={wikipedia: 0.9}",
            "fix: '+stages.distill.weights={wikipedia: …}' adds it",
        ),
        (
            "stages.evaluate_tasks.revisions={allenai/sciq: a1}",
            "fix: '+stages.evaluate_tasks.revisions={allenai/sciq: …}' adds it",
        ),
    ],
)
def test_unknown_fields_get_a_hint(compose: Compose, override: str, message: str) -> None:
    assert error_message(compose, RECIPE, override).endswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+stages.distill.wieghts={a: 1}", "stages.distill.wieghts. Did you mean 'weights'?"),
        (
            "+stages.distill.resources.gpuz=1",
            f"stages.distill.resources.gpuz.\n  fix: {SHOW_FIELDS}",
        ),
        ("+data.max_token=5", "data.max_token. Did you mean 'max_tokens'?"),
        ("+skip_rule=[memory]", "skip_rule. Did you mean 'skip_rules'?"),
    ],
)
def test_unknown_fields_that_are_added_are_refused(
    plan: MakePlan, override: str, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(override)
    assert str(caught.value).startswith(f"there is no field {message}")


def test_added_field_to_which_another_field_refers_is_accepted(plan: MakePlan) -> None:
    planned = plan("+data.steps=33", "+steps=${data.steps}", "stages.distill.max_steps=${steps}")
    assert stage_named(planned, "distill").config.max_steps == 33


def test_every_choice_of_data_has_known_fields() -> None:
    files = [OmegaConf.load(file) for file in (CONF / "data").glob("*.yaml")]
    assert {str(name) for file in files for name in file} - {"defaults"} == {*DATA_FIELDS}


def test_an_image_of_a_misspelled_stage_gets_a_hint(compose: Compose) -> None:
    message = error_message(compose, RECIPE, "cluster=docker", "cluster.images.distil=x")
    assert message.endswith("cluster.images.distil. Did you mean 'distill'?")
    message = error_message(compose, RECIPE, "cluster=docker", "cluster.images.distill=x")
    assert message.endswith("'+cluster.images={distill: …}' adds it")


@pytest.mark.parametrize(
    "value", ["registry#image:1", "it's", 'a#"b"', "[a >= 1]", "{a: b#c}", "a=b"]
)
def test_the_fix_of_an_unquoted_value_has_a_value_of_the_same_type(
    compose: Compose, value: str
) -> None:
    """The fix for a text contains this text. The fix for a list or a dict is an example."""
    message = error_message(compose, RECIPE, f"stages.report.title={value}")
    fix = message.partition("such as ")[2]
    [argument] = shlex.split(fix)
    parsed = OverridesParser.create().parse_override(argument).value()
    example: dict[str, object] = {"[": ["a >= 1"], "{": {"a": "b >= 1"}}
    assert parsed == example.get(value[0], value)


@pytest.mark.parametrize("value", ["~", "~/zz", "[a.txt,~/b.txt]", "{a: ~/b}"])
def test_the_fix_of_a_tilde_has_the_home_directory(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    fix = error_message(compose, RECIPE, f"run_dir={value}").partition("home directory: ")[2]
    assert shlex.split(fix) == [f"run_dir={value.replace('~', '/home/me')}"]


def test_the_fix_of_several_values_is_a_list_or_a_sweep(compose: Compose) -> None:
    message = error_message(compose, RECIPE, "skip_rules=memory,disk")
    assert "'skip_rules=[memory,disk]'" in message
    assert "-m" in message
    assert "[openvino" not in error_message(compose, RECIPE, "engine=openvino,null")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.distill.max_steps=abc", ["'abc'", "Integer", "fix: use a whole number"]),
        ("stages.distill.lr=fast", ["'fast'", "Float", "fix: use a number"]),
        ("stages.prune.drop_layers=[x]", ["'x'", "Integer"]),
        ("stages.import_hf.pack=maybe", ["'maybe'", "valid bool", "fix: use true or false"]),
    ],
)
def test_message_about_a_wrong_type_has_field_value_and_type(
    compose: Compose, override: str, expected: list[str]
) -> None:
    message = error_message(compose, RECIPE, override)
    for part in (override.partition("=")[0], *expected):
        assert part in message
    # Hydra cannot parse a list without its closing bracket. The message quotes what the user typed.
    assert "[a" in error_message(compose, RECIPE, "stages.prune.drop_layers=[a")


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_other_errors_show_two_messages_of_their_chain(link: str) -> None:
    outer, inner = HydraException("outer"), ValueError("inner")
    setattr(outer, link, inner)
    setattr(inner, link, KeyError("innermost"))
    assert explain(outer) == f"outer\n  inner\n  fix: {SHOW_FIELDS}"
