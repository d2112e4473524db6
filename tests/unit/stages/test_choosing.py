"""Held-out text reports, and nothing is chosen on it: no code that chooses can come to it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from launch.planned import load_stage, stage_names
from recipes.core.reachable_code import _defines, _without_docstrings, reachable_code

HELDOUT = "heldout"
MEASURE = ("evaluate", "build_engine", "quantize", "measure_speed")
"""Stages that measure on it what others, or other text, have chosen."""
PREPARE = ("prepare_data", "report")
"""Those that write it, and that say how much there is of it."""
MEASURED = ("eval_results", "task_results")
"""Kinds of results on it."""
SHOW = ("report", "export_hf")
"""Stages that show such results; gates judge what they show."""
READERS = ("read_windows", "read_tokens", "read_learnt", "document_end", "sources_of")
"""Functions by which text is read, a part of it by name."""


@cache
def mentions_of(root: Path, module: str) -> list[tuple[frozenset[str], str]]:
    """Where a module names the part or asks for its sources, with what each is defined as."""
    base = root.joinpath(*module.split("."))
    file = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
    found = []
    for statement in _without_docstrings(ast.parse(file.read_text())).body:
        for node in ast.walk(statement):
            said = node.value if isinstance(node, ast.Constant) else getattr(node, "attr", None)
            if isinstance(said, str) and HELDOUT in said:
                names = frozenset(_defines(statement) or [""])
                found.append((names, f"{module}:{node.lineno}"))
    return found


def mentions(root: Path, start: str) -> Iterator[str]:
    """All of them in code that can be reached."""
    for module, found in reachable_code(root, [start]).items():
        names = {each.split(" ")[0] for each in found}
        yield from (place for of, place in mentions_of(root, module) if of & names)


@pytest.mark.parametrize("stage", sorted({*stage_names()} - {*MEASURE, *PREPARE}))
def test_what_chooses_cannot_come_to_held_out_text(root: Path, stage: str) -> None:
    starts = [stage, *load_stage(stage).starts]
    assert [place for one in starts for place in mentions(root, f"recipes.stages.{one}:run")] == []


@pytest.mark.parametrize("stage", MEASURE)
def test_what_measures_on_it_is_found(root: Path, stage: str) -> None:
    """Else the test above could not fail."""
    assert list(mentions(root, f"recipes.stages.{stage}:run"))


def test_results_on_it_are_only_shown() -> None:
    for name in set(stage_names()) - set(SHOW):
        stage = load_stage(name)
        taken = [
            kind
            for kinds in (*stage.inputs.values(), *stage.optional_inputs.values())
            for kind in kinds
        ]
        assert set(taken).isdisjoint(MEASURED), name


def test_a_part_of_the_text_is_read_by_its_name(root: Path) -> None:
    """So that what is named is what is read; helpers of the readers pass on what they are given."""
    calls = 0
    for file in (root / "recipes").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in READERS:
                part = node.args[1]
                given = isinstance(part, ast.Name) and part.id == "part"
                helper = file.name in ("token_windows.py", "data.py")
                assert isinstance(part, ast.Constant) or (given and helper), f"{file}:{node.lineno}"
                calls += 1
    assert calls > 10
