"""Recipe files that a user adds to ``conf/recipe``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launch import schema
from launch.run import cli
from recipes.core.errors import RecipeError

if TYPE_CHECKING:
    from tests.unit.conftest import MakePlan

RECIPE = "# @package _global_\ndefaults: [{/chain@_global_: prune_distill}, _self_]\n"
"""The shortest valid recipe. It has no field ``description``."""


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of recipes in a copy of ``conf``."""
    conf = shutil.copytree(schema.CONF, tmp_path / "conf")
    monkeypatch.setattr(schema, "CONF", conf)
    return conf / "recipe"


def test_a_recipe_needs_no_description(recipes: Path, plan: MakePlan) -> None:
    (recipes / "mine_prune.yaml").write_text(RECIPE)
    assert plan("stages.prune.target_ffn_hidden_size=0.5", recipe="recipe=mine_prune").stages


@pytest.mark.parametrize("name", ["my-7b_prune", "4090_prune", "7b-x_prune"])
def test_names_of_recipes_may_have_hyphens_and_digits(recipes: Path, name: str) -> None:
    (recipes / f"{name}.yaml").write_text(RECIPE)
    assert "prune" in schema.compose(f"recipe={name}").stages


def test_a_recipe_without_its_package_is_refused(recipes: Path, plan: MakePlan) -> None:
    (recipes / "ignored_prune.yaml").write_text(RECIPE.partition("\n")[2])
    with pytest.raises(RecipeError, match=r"recipe=… names has no effect.*\n.*@package"):
        plan(recipe="recipe=ignored_prune")


def test_unknown_defaults_of_a_recipe_are_named(
    recipes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipes / "mine.yaml").write_text("defaults: [llama_width_prun, _self_]\n")
    monkeypatch.setattr(sys, "argv", ["run.py", "recipe=mine"])
    assert cli() == 1
    expected = "there is no recipe 'llama_width_prun'. Did you mean 'llama_width_prune'?"
    assert expected in capsys.readouterr().err


def test_a_recipe_that_is_not_valid_yaml_is_listed(
    recipes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipes / "broken.yaml").write_text("a: [1\nb: 2\n")
    assert {"broken", "llama_width_prune"} <= schema.recipes().keys()
    monkeypatch.setattr(sys, "argv", ["run.py", "recipe=broken"])
    assert cli() == 1
    assert "broken.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["gate: [a]", "data: {max_token: 3}"])
def test_unknown_fields_of_a_recipe_are_refused(recipes: Path, plan: MakePlan, line: str) -> None:
    (recipes / "typo_prune.yaml").write_text(f"{RECIPE}{line}\n")
    with pytest.raises(RecipeError, match=r"there is no field .* Did you mean"):
        plan(recipe="recipe=typo_prune")
