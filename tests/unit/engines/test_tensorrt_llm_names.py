"""Compares the names in ``tensorrt_llm_api.json`` with TensorRT-LLM's source, if it is available.

``API``, the content of that file, maps titles to entries. An entry names one or more source files
and lists names that the files must contain.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.engines.test_tensorrt_llm import API


def package_folder() -> Path | None:
    """Returns the parent folder of the package ``tensorrt_llm``; ``None`` without TensorRT-LLM.

    The environment variable ``TENSORRT_LLM_SOURCE`` precedes the installed package.
    """
    if source := os.environ.get("TENSORRT_LLM_SOURCE"):
        return Path(source)
    spec = importlib.util.find_spec("tensorrt_llm")
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def names_in(tree: ast.AST) -> Iterator[str]:
    """Yields all names and strings of a module, such as options, keys, fields and parameters."""
    # These attributes of nodes can be strings: variables, attributes, arguments, definitions and
    # imports, and constants.
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "value"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


def annotated_fields(tree: ast.AST, cls: str) -> set[str]:
    """Returns the names of the annotated fields of the class ``cls``."""
    return {
        item.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == cls
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def maps_tensors(tree: ast.AST, cls: str) -> bool:
    """Returns whether the layer class ``cls`` maps tensor names of checkpoints to its own names."""
    return any(
        isinstance(node, ast.ClassDef)
        and node.name == cls
        and "tllm_to_externel_key_dict" in set(names_in(node))
        for node in ast.walk(tree)
    )


def recorded_names(entry: Any) -> Iterator[str]:
    """Yields the names that an entry of ``API`` lists, except those of its key ``imports``."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, list):
        for item in entry:
            yield from recorded_names(item)
    else:
        for key, item in entry.items():
            if key not in ("file", "commit", "what", "imports"):
                yield from recorded_names(item)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def differences(root: Path) -> list[str]:
    """Returns a line for each way in which TensorRT-LLM's source differs from ``API``.

    ``API`` lists names that must exist, and classes that must not map the names of tensors. The
    package is not imported.

    Args:
        root: Parent folder of the package ``tensorrt_llm``.
    """
    lines = []
    for title, entry in API.items():
        if title == "what":  # a description of the file
            continue
        trees = [parse(root / file) for file in entry["file"].split(" and ")]
        existing = {name for tree in trees for name in names_in(tree)}
        lines += [f"{title}: {name}" for name in recorded_names(entry) if name not in existing]
        for module, names in entry.get("imports", {}).items():
            path = root / module.replace(".", "/")
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            defined = set(names_in(parse(path))) if path.exists() else set()
            lines += [f"{module}: {name}" for name in names if name not in defined]
    tensors = API["ModelOpt's tensors in engines"]
    layers = parse(root / tensors["file"])
    lines += [f"{cls}: is mapped" for cls in tensors["unmapped"] if maps_tensors(layers, cls)]
    declared = annotated_fields(parse(root / API["BuildConfig"]["file"]), "BuildConfig")
    return lines + [f"BuildConfig.{f}" for f in API["BuildConfig"]["fields"] if f not in declared]


@pytest.mark.skipif(package_folder() is None, reason="needs TensorRT-LLM")
def test_source_of_tensorrt_llm_agrees_with_the_recorded_names() -> None:
    folder = package_folder()
    assert folder is not None
    assert differences(folder) == []
