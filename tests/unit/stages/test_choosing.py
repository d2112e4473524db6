"""Held-out text reports, and nothing is chosen on it."""

from __future__ import annotations

import ast
from pathlib import Path

from launch.planned import load_stage, stage_names

HELDOUT = "heldout"
MEASURE = {
    "engines/checks.py:compare_engine",
    "engines/quantization.py:_quality",
    "evaluation/text_quality.py:measure",
}
"""Functions that read it: each reports what others, or other text, have chosen."""
STARTED_BY = {"build_engine", "evaluate", "quantize"}
"""Stages that may import them."""
MEASURED = ("eval_results", "task_results")
"""Kinds of results on it."""
SHOW = ("report", "export_hf")
"""Stages that show such results; gates judge what they show."""
READERS = ("read_sequences", "read_tokens", "read_loss_mask", "document_end", "sources_of")
"""Functions by which text is read, a part of it by name."""


def parsed(root: Path) -> dict[str, ast.Module]:
    """The modules below ``recipes``, by file."""
    files = sorted((root / "recipes").rglob("*.py"))
    return {str(f.relative_to(root / "recipes")): ast.parse(f.read_text()) for f in files}


def test_held_out_text_is_read_by_what_reports(root: Path) -> None:
    found = set()
    for file, tree in parsed(root).items():
        for function in tree.body:
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in READERS:
                    part = node.args[1]
                    if isinstance(part, ast.Constant) and part.value == HELDOUT:
                        found.add(f"{file}:{getattr(function, 'name', '')}")
    assert found == MEASURE


def test_what_reports_is_imported_by_stages_that_report(root: Path) -> None:
    found = set()
    for file, tree in parsed(root).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = str(node.module).removeprefix("recipes.").replace(".", "/")
                if {f"{module}.py:{alias.name}" for alias in node.names} & MEASURE:
                    found.add(file)
    assert found <= {f"stages/{stage}.py" for stage in STARTED_BY}
    assert "stages/evaluate.py" in found


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
    for file, tree in parsed(root).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in READERS:
                part = node.args[1]
                given = isinstance(part, ast.Name) and part.id == "part"
                helper = file.endswith(("token_sequences.py", "data.py"))
                assert isinstance(part, ast.Constant) or (given and helper), f"{file}:{node.lineno}"
                calls += 1
    assert calls > 10
