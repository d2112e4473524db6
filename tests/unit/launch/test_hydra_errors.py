"""Errors of Hydra and OmegaConf become one message with a fix."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from launch.hydra_errors import SHOW_FIELDS, SHOW_HELP, explain
from launch.schema import CONF, hydra_arguments, recipes
from launch.settings import DATA_FIELDS
from recipes.core.errors import RecipeError
from tests.unit.conftest import RECIPE, Compose, MakePlan, stage_named


def error_message(compose: Compose, *overrides: str) -> str:
    """Returns the message that the user sees for overrides that Hydra refuses."""
    with pytest.raises(HydraException) as caught:
        compose(*overrides)
    return explain(caught.value)


def test_unknown_recipes_list_all_recipes(compose: Compose) -> None:
    fix = f"\n  fix: use one of: {', '.join(recipes())}"
    hint = " Did you mean 'llama_width_prune'?"
    message = error_message(compose, "recipe=llama_width_prun")
    assert message == f"there is no recipe 'llama_width_prun'.{hint}{fix}"
    assert error_message(compose, "recipe=zzz") == f"there is no recipe 'zzz'.{fix}"
    assert error_message(compose, "llama_width_prune") == (
        "'llama_width_prune' is neither FIELD=VALUE nor a command. "
        f"Did you mean 'recipe=llama_width_prune'?\n  fix: {SHOW_HELP}"
    )


def test_flags_may_stand_between_overrides() -> None:
    arguments = "a=b -m c=d --config-dir x run_dir=1e5 --cfg=job run_dir=null"
    in_hydras_order = 'a=b c=d run_dir="1e5" run_dir=null -m --config-dir x --cfg=job'
    assert hydra_arguments(arguments.split()) == in_hydras_order.split()


def test_names_of_files_are_no_choices() -> None:
    with pytest.raises(RecipeError, match=r"fix: recipe=mine$"):
        hydra_arguments(["recipe=mine.yaml"])


@pytest.mark.parametrize(
    "arg",
    ["cluster=null", "recipe=null", "hardware=[]", "model=org/name", "model=null", "+data=5"],
)
def test_values_that_are_not_choices_are_refused(arg: str) -> None:
    with pytest.raises(RecipeError, match="names no ") as caught:
        hydra_arguments([arg])
    # Only ``model`` has a field for values that are not names of choices; null needs no such hint.
    hint, message = "fix: model.hf_path=org/name for a folder or a hub id", str(caught.value)
    assert (hint in message) == ("model.hf_path" in message) == (arg == "model=org/name")


def test_null_omits_a_group_in_a_sweep_too(compose: Compose) -> None:
    # Hydra accepts no null for a group on the command line. An empty list has the same effect.
    arguments = hydra_arguments([RECIPE, "heal=null,least_squares", "-m"])
    assert arguments == [RECIPE, "heal=[],least_squares", "-m"]
    stages = compose(RECIPE, "engine=null", "tracker=null").stages
    assert "build_engine" not in stages
    assert "export_hf" in stages


@pytest.mark.parametrize(
    ("override", "expected", "valid_choice"),
    [
        ("model=smollm", "there is no model 'smollm'.", "smollm2_135m"),
        ("data=wikpedia", "no data 'wikpedia'. Did you mean 'wikipedia'?", "wikipedia"),
        ("engine=none", "there is no engine 'none'.", "null"),
        ("stage/distill@stages.distill=logit", "Did you mean 'logits'?", "logits"),
    ],
)
def test_unknown_choices_list_the_choices(
    compose: Compose, override: str, expected: str, valid_choice: str
) -> None:
    message = error_message(compose, RECIPE, override)
    assert expected in message
    choices = message.partition("use one of: ")[2].split(", ")
    assert valid_choice in choices
    assert "schema" not in choices  # groups have a file schema.yaml, which is not a choice
    # Plain names, not paths or arguments.
    assert not [name for name in choices if "/" in name or "=" in name or " " in name]


@pytest.mark.parametrize(
    ("override", "message_end"),
    [
        ("stages.prune.target_hiden_size=512", "_hiden_size. Did you mean 'target_hidden_size'?"),
        ("stages.prun.seq_length=1", "there is no field stages.prun. Did you mean 'prune'?"),
        ("distill.lr=1", "there is no field distill. Did you mean 'stages.distill'?"),
        ("dryrun=true", "there is no field dryrun. Did you mean 'dry_run'?"),
        ("latency=measured", "there is no field latency. Did you mean 'latency_model'?"),
        ("latency_model=measured", "has no latency_model.\n  fix: leave out latency_model=…"),
        ("stages.only=[prune]", "there is no field stages.only. Did you mean 'only'?"),
        ("stages.distill.resources.device=2", "resources.device. Did you mean 'devices'?"),
        # No field has a similar name.
        ("stages.prune.qqq=1", f"stages.prune.qqq.\n  fix: {SHOW_FIELDS}"),
        ("cluster.images.distil=x", "cluster.images.distil. Did you mean 'distill'?"),
        # New keys of dict fields need a ``+``.
        ("cluster.images.distill=x", "'+cluster.images={distill: …}' adds it"),
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
def test_unknown_fields_get_a_hint(compose: Compose, override: str, message_end: str) -> None:
    message = error_message(compose, RECIPE, "cluster=docker", override)
    assert message.endswith(message_end)


@pytest.mark.parametrize(
    ("override", "field_and_hint"),
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
def test_unknown_fields_are_refused_even_with_a_plus(
    plan: MakePlan, override: str, field_and_hint: str
) -> None:
    """Hydra itself accepts any field that ``+`` adds."""
    with pytest.raises(RecipeError) as caught:
        plan(override)
    assert str(caught.value).startswith(f"there is no field {field_and_hint}")


def test_added_field_to_which_another_field_refers_is_accepted(plan: MakePlan) -> None:
    planned = plan("+data.steps=33", "+steps=${data.steps}", "stages.distill.max_steps=${steps}")
    assert stage_named(planned, "distill").config.max_steps == 33


def test_data_fields_are_the_fields_of_all_choices_of_data() -> None:
    configs = [OmegaConf.load(file) for file in (CONF / "data").glob("*.yaml")]
    field_names = {str(name) for config in configs for name in config}
    assert field_names - {"defaults"} == {*DATA_FIELDS}


@pytest.mark.parametrize(
    "value", ["registry#image:1", "it's", 'a#"b"', "[a >= 1]", "{a: b#c}", "a=b"]
)
def test_the_fix_of_an_unquoted_value_has_a_value_of_the_same_type(
    compose: Compose, value: str
) -> None:
    """Hydra cannot parse these values without quotes.

    The fix for a text contains this text. The fix for a list or a dict is a fixed example.
    """
    message = error_message(compose, RECIPE, f"stages.report.title={value}")
    fix = message.partition("such as ")[2]
    [argument] = shlex.split(fix)
    parsed = OverridesParser.create().parse_override(argument).value()
    examples: dict[str, object] = {"[": ["a >= 1"], "{": {"a": "b >= 1"}}  # by first character
    assert parsed == examples.get(value[0], value)


@pytest.mark.parametrize("value", ["~", "~/zz", "[a.txt,~/b.txt]", "{a: ~/b}"])
def test_the_fix_of_a_tilde_writes_out_the_home_directory(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    fix = error_message(compose, RECIPE, f"run_dir={value}").partition("home directory: ")[2]
    assert shlex.split(fix) == [f"run_dir={value.replace('~', '/home/me')}"]


def test_the_fix_of_several_values_is_a_list_or_a_sweep(compose: Compose) -> None:
    message = error_message(compose, RECIPE, "skip_rules=memory,disk")
    assert "'skip_rules=[memory,disk]'" in message
    assert "-m" in message
    # A config group takes one choice, so the fix suggests no list.
    assert "[openvino" not in error_message(compose, RECIPE, "engine=openvino,null")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.distill.max_steps=abc", ["'abc'", "Integer", "fix: use a whole number"]),
        ("stages.distill.lr=fast", ["'fast'", "Float", "fix: use a number"]),
        ("stages.prune.drop_layers=[x]", ["'x'", "Integer"]),
        ("stages.import_hf.pack=maybe", ["'maybe'", "valid bool", "fix: use true or false"]),
        ("stages.prune.drop_layers=[a", ["[a"]),  # not closed
    ],
)
def test_message_about_an_invalid_value_has_field_value_and_type(
    compose: Compose, override: str, expected: list[str]
) -> None:
    message = error_message(compose, RECIPE, override)
    field_name = override.partition("=")[0]
    for text in (field_name, *expected):
        assert text in message


@pytest.mark.parametrize("cause_attribute", ["__cause__", "__context__"])
def test_other_errors_show_the_error_and_its_direct_cause(cause_attribute: str) -> None:
    outer, inner = HydraException("outer"), ValueError("inner")
    setattr(outer, cause_attribute, inner)
    setattr(inner, cause_attribute, KeyError("innermost"))
    assert explain(outer) == f"outer\n  inner\n  fix: {SHOW_FIELDS}"
