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


def classes_named(tree: ast.AST, name: str) -> list[ast.ClassDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name]


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


@pytest.mark.skipif(package_folder() is None, reason="needs TensorRT-LLM")
def test_source_of_tensorrt_llm_agrees_with_the_recorded_names() -> None:
    """``API`` lists names that must exist, and classes that must not map the names of tensors.

    The package is not imported.
    """
    root = package_folder()
    assert root is not None
    differences = []
    for title, entry in API.items():
        if title == "what":  # a description of the file
            continue
        trees = [parse(root / file) for file in entry["file"].split(" and ")]
        existing = {name for tree in trees for name in names_in(tree)}
        differences += [(title, n) for n in recorded_names(entry) if n not in existing]
        for module, names in entry.get("imports", {}).items():
            path = root / module.replace(".", "/")
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            defined = set(names_in(parse(path))) if path.exists() else set()
            differences += [(module, name) for name in names if name not in defined]
    tensors = API["ModelOpt's tensors in engines"]
    layers = parse(root / tensors["file"])
    differences += [
        (name, "is mapped")
        for name in tensors["unmapped"]
        for layer in classes_named(layers, name)
        # A layer with this attribute maps tensor names of checkpoints to its own names.
        if "tllm_to_externel_key_dict" in names_in(layer)
    ]
    build_configs = classes_named(parse(root / API["BuildConfig"]["file"]), "BuildConfig")
    body = [statement for config in build_configs for statement in config.body]
    declared = {ast.unparse(item.target) for item in body if isinstance(item, ast.AnnAssign)}
    differences += [("BuildConfig", f) for f in API["BuildConfig"]["fields"] if f not in declared]
    assert differences == []
