"""A fixture ``plan`` that plans a recipe like the fixture of all unit tests, but faster."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from launch.plan import Plan, make_plan
from launch.schema import CONF, hydra_arguments
from launch.settings import settings_of
from tests.unit.conftest import RECIPE, complete_overrides

if TYPE_CHECKING:
    from pathlib import Path

    from recipes.planning.rules import Problem
    from tests.unit.conftest import Compose, MakePlan


def sets_field(override: Override) -> bool:
    """Returns whether an override sets a field; it can also choose a config, or delete a node."""
    name = override.key_or_group
    chooses_config = (CONF / name).is_dir() or name.startswith("hydra.")
    return not (chooses_config or override.is_delete())


@pytest.fixture
def plan(compose: Compose, tmp_path: Path, large_disk: None, versions_read_once: None) -> MakePlan:
    """Plans a recipe. Hydra does not compose the recipe again for overrides that set fields."""

    def plan_recipe(*overrides: str, recipe: str = RECIPE) -> Plan:
        arguments = complete_overrides(recipe, overrides)
        parsed = OverridesParser.create().parse_overrides(hydra_arguments(arguments))
        arguments_and_parsed = zip(arguments, parsed, strict=True)
        composed = [argument for argument, each in arguments_and_parsed if not sets_field(each)]
        cfg = copy.deepcopy(compose(*composed))
        for each in filter(sets_field, parsed):
            OmegaConf.update(cfg, each.key_or_group, each.value(), force_add=each.is_add())
        return make_plan(cfg, settings_of(cfg), tmp_path / "run")

    return plan_recipe


def notes_of(planned: Plan, rule: str) -> list[Problem]:
    """Returns the warnings of a plan that belong to a rule."""
    return [note for note in planned.notes if note.rule.name == rule]
