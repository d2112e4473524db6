"""The recorded names against the package itself, where it is: in NVIDIA's image, or a checkout.

Its modules are parsed, not imported, so no GPU is needed. ``TENSORRT_LLM_SOURCE`` names the folder
that holds ``tensorrt_llm``, where that is not on Python's path.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

API: dict[str, Any] = json.loads(Path(__file__).with_name("tensorrt_llm_api.json").read_text())


def source() -> Path | None:
    """The folder that the package is in."""
    if named := os.environ.get("TENSORRT_LLM_SOURCE"):
        return Path(named)
    found = importlib.util.find_spec("tensorrt_llm")
    return Path(found.origin).parent.parent if found and found.origin else None


def words(tree: ast.AST) -> Iterator[str]:
    """Whatever a module calls by name: options, keys, fields, parameters, attributes."""
    for node in ast.walk(tree):
        for name in ("id", "attr", "arg", "name", "value"):
            if isinstance(word := getattr(node, name, None), str):
                yield word


def fields(tree: ast.AST, cls: str) -> set[str]:
    """Annotated fields of a class."""
    return {
        item.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == cls
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def maps_tensors(tree: ast.AST, cls: str) -> bool:
    """Whether a layer says under which names a checkpoint has its tensors."""
    return any(
        isinstance(node, ast.ClassDef)
        and node.name == cls
        and "tllm_to_externel_key_dict" in set(words(node))
        for node in ast.walk(tree)
    )


def leaves(entry: Any) -> Iterator[str]:
    """Recorded names."""
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
    """What is recorded, and the package does not have."""
    found = []
    for title, entry in API.items():
        if title == "what":
            continue
        trees = [parse(root / file) for file in entry["file"].split(" and ")]
        known = {word for tree in trees for word in words(tree)}
        found += [f"{title}: {name}" for name in leaves(entry) if name not in known]
        for module, names in entry.get("imports", {}).items():
            path = root / module.replace(".", "/")
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            defined = set(words(parse(path))) if path.exists() else set()
            found += [f"{module}: {name}" for name in names if name not in defined]
    tensors = API["ModelOpt's tensors in engines"]
    layers = parse(root / tensors["file"])
    found += [f"{cls}: is mapped" for cls in tensors["unmapped"] if maps_tensors(layers, cls)]
    declared = fields(parse(root / API["BuildConfig"]["file"]), "BuildConfig")
    return found + [f"BuildConfig.{f}" for f in API["BuildConfig"]["fields"] if f not in declared]


@pytest.mark.skipif(source() is None, reason="TensorRT-LLM is not here; no package index has it")
def test_the_package_has_every_recorded_name() -> None:
    folder = source()
    assert folder is not None
    assert differences(folder) == []
