"""Every message says how to mend what it is about."""

from __future__ import annotations

import ast

from launch.reference.trouble import PACKAGES, messages
from recipes.core.files import REPO_ROOT

OF_A_STAGE = {
    "stage <name> failed: … log: <log>",
    "stage <name>, job <id>, failed<ended>: … log: <log>",
    "<name> of <name> failed: <reason>",
}
"""What a stage said itself, its own fix with it."""


def test_every_message_has_a_fix() -> None:
    files = (
        file for name in (*PACKAGES, "benchmarks") for file in (REPO_ROOT / name).rglob("*.py")
    )
    every = [one for file in files for one in messages(ast.parse(file.read_text("utf-8")))]
    assert len(every) > 250
    assert {one.what for one in every if not one.fix} == OF_A_STAGE


def test_a_message_without_a_fix_is_seen() -> None:
    said = (
        'RecipeError("it broke"), RecipeError("it broke", ""), RecipeError("it broke", fix_of(it))'
    )
    assert [one.fix for one in messages(ast.parse(said))] == ["", "", "…"]
