"""No stage may select a model or a setting by held-out text, which is only for reports.

The tests read the source code of ``recipes``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from launch.planned import load_stage, stage_names

HELDOUT_READERS = {
    "engines/checks.py:compare_engine",
    "engines/quantization.py:_quality",
    "engines/served.py:_heldout_text",
    "evaluation/text_quality.py:measure",
    "stages/add_layers.py:run",
}
"""Functions that may read held-out text, as file below ``recipes`` and name. They measure models
with it."""
MEASURING_STAGES = {"build_engine", "evaluate", "quantize"}
"""Stages that may import ``HELDOUT_READERS``."""
HELDOUT_RESULTS = {"eval_results", "task_results", "served_results"}
"""Types of artifacts with results on held-out text and benchmarks."""
REPORTING_STAGES = {"report", "export_hf"}
"""Stages that may read ``HELDOUT_RESULTS``."""
READERS = ("read_sequences", "first_sequences", "read_tokens", "read_loss_mask")
"""Functions that read a split of the text; the name of the split is their second argument."""


def top_level_statements(root: Path) -> Iterator[tuple[str, str, ast.stmt]]:
    """Yields file, name (if any) and syntax tree of each top-level statement below ``recipes``."""
    for file in sorted((root / "recipes").rglob("*.py")):
        for statement in ast.parse(file.read_text()).body:
            yield str(file.relative_to(root / "recipes")), getattr(statement, "name", ""), statement


def test_only_measuring_functions_read_held_out_text(root: Path) -> None:
    """The split's name must be a literal, except in two modules that get it as an argument."""
    heldout_readers = set()
    for file, name, statement in top_level_statements(root):
        for node in ast.walk(statement):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") in READERS):
                continue
            split = node.args[1]
            if not isinstance(split, ast.Constant):
                gets_split_as_argument = file.endswith(
                    ("token_sequences.py", "distillation/data.py")
                )
                assert isinstance(split, ast.Name), f"{file}:{node.lineno}"
                assert gets_split_as_argument, f"{file}:{node.lineno}"
            elif split.value == "heldout":
                heldout_readers.add(f"{file}:{name}")
    assert heldout_readers == HELDOUT_READERS


def test_only_measuring_stages_import_functions_that_read_held_out_text(root: Path) -> None:
    importers = set()
    for file, _, statement in top_level_statements(root):
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom):
                # recipes.engines.checks -> engines/checks.py, as in HELDOUT_READERS
                module = str(node.module).removeprefix("recipes.").replace(".", "/") + ".py"
                if any(f"{module}:{alias.name}" in HELDOUT_READERS for alias in node.names):
                    importers.add(file)
    assert "stages/evaluate.py" in importers
    assert importers <= {f"stages/{stage}.py" for stage in MEASURING_STAGES}


def test_only_reporting_stages_read_results_on_held_out_text() -> None:
    for name in set(stage_names()) - REPORTING_STAGES:
        stage = load_stage(name)
        inputs = [*stage.inputs.values(), *stage.optional_inputs.values()]
        assert HELDOUT_RESULTS.isdisjoint(kind for kinds in inputs for kind in kinds), name
