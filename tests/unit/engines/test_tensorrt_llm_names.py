"""Compares the names in ``tensorrt_llm_api.json`` with TensorRT-LLM, where it is installed."""

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
    """Returns the folder with ``tensorrt_llm`` in it: ``TENSORRT_LLM_SOURCE`` or site-packages."""
    if named := os.environ.get("TENSORRT_LLM_SOURCE"):
        return Path(named)
    spec = importlib.util.find_spec("tensorrt_llm")
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def names_in(tree: ast.AST) -> Iterator[str]:
    """Yields all names and strings of a module, such as options, keys, fields and parameters."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "value"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


def fields(tree: ast.AST, cls: str) -> set[str]:
    """Returns the annotated fields of a class."""
    return {
        item.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == cls
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def maps_tensors(tree: ast.AST, cls: str) -> bool:
    """Returns whether a layer's class maps names of a checkpoint's tensors to its own."""
    return any(
        isinstance(node, ast.ClassDef)
        and node.name == cls
        and "tllm_to_externel_key_dict" in set(names_in(node))
        for node in ast.walk(tree)
    )


def leaves(entry: Any) -> Iterator[str]:
    """Yields the names that an entry of the record lists, without its imports."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, list):
        for item in entry:
            yield from leaves(item)
    else:
        for key, item in entry.items():
            if key not in ("file", "commit", "what", "imports"):
                yield from leaves(item)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def differences(root: Path) -> list[str]:
    """Returns how the package's source differs from the record, without importing the package.

    The record lists names that must exist, and classes that must not map the names of tensors.
    """
    missing = []
    for title, entry in API.items():
        if title == "what":
            continue
        trees = [parse(root / file) for file in entry["file"].split(" and ")]
        names_of_package = {name for tree in trees for name in names_in(tree)}
        missing += [f"{title}: {name}" for name in leaves(entry) if name not in names_of_package]
        for module, names in entry.get("imports", {}).items():
            path = root / module.replace(".", "/")
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            defined = set(names_in(parse(path))) if path.exists() else set()
            missing += [f"{module}: {name}" for name in names if name not in defined]
    tensors = API["ModelOpt's tensors in engines"]
    layers = parse(root / tensors["file"])
    missing += [f"{cls}: is mapped" for cls in tensors["unmapped"] if maps_tensors(layers, cls)]
    declared = fields(parse(root / API["BuildConfig"]["file"]), "BuildConfig")
    return missing + [f"BuildConfig.{f}" for f in API["BuildConfig"]["fields"] if f not in declared]


@pytest.mark.skipif(package_folder() is None, reason="needs TensorRT-LLM")
def test_the_package_has_every_recorded_name() -> None:
    folder = package_folder()
    assert folder is not None
    assert differences(folder) == []
