from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from recipes.core.errors import RecipeError
from recipes.planning import rules
from recipes.planning.chain import read_chain
from recipes.planning.rules import Problem, require_none

if TYPE_CHECKING:
    from pathlib import Path

    from nemo_convert.architecture import Architecture


def test_all_problems_are_in_one_error() -> None:
    problems = [
        Problem(rules.Rule("r1", ""), "first is wrong", "mend it"),
        Problem(rules.Rule("r2", ""), "second", "drop it"),
    ]
    assert require_none(iter(())) == ()
    with pytest.raises(RecipeError) as caught:
        require_none(iter(problems))
    assert str(caught.value).splitlines() == [
        "first is wrong",
        "  fix: mend it   [r1]",
        "second",
        "  fix: drop it   [r2]",
    ]


def test_a_chain_reads_its_teacher(hf_folder: Path, teacher: Architecture) -> None:
    assert read_chain(str(hf_folder), {}).teacher == teacher
    config = json.loads((hf_folder / "config.json").read_text())
    config["architectures"] = ["MixtralForCausalLM"]
    (hf_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="MixtralForCausalLM is not supported") as caught:
        read_chain(str(hf_folder), {})
    assert str(hf_folder) in str(caught.value)
