"""Fingerprint of a stage: one SHA-256 of everything that its result depends on.

It covers the settings except resources, the fingerprints of the inputs, files from outside the
run, ``versions.result_versions``, and the code of the worker and the stage, with all modules of
this repository that the two import.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from recipes.core.files import REPO_ROOT, sha256_of
from recipes.core.snapshot import source_files

WORKER = "recipes.core.worker"
"""Main module of every stage's process."""
BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")
"""Fields of a syntax tree's nodes that hold statements."""
MAX_HASHED_BYTES = 1 << 20
"""Larger files from outside the run are not hashed."""


def digest(value: object) -> str:
    """Returns the SHA-256 of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def result_settings(config: Any) -> dict[str, object]:
    """Returns a config as plain data, without fields whose metadata marks them as ``resource``.

    Fields that are marked as ``path`` have a folder's absolute path.
    """
    plain: dict[str, object] = {}
    for spec in fields(config):
        value = getattr(config, spec.name)
        if spec.metadata.get("path"):
            value = with_absolute_path(value)
        if not spec.metadata.get("resource"):
            plain[spec.name] = result_settings(value) if is_dataclass(value) else value
    return plain


def with_absolute_path(value: object) -> object:
    """Returns a folder's absolute path, so that its spelling does not count; or another value."""
    return os.path.abspath(value) if isinstance(value, str) and os.path.isdir(value) else value


def external_stamp(path: Path, patterns: Iterable[str] = ("**/*",)) -> dict[str, object]:
    """Returns a stamp of each file: a small file's hash, or a large file's size and ``mtime``.

    Hashing 140 GB of weights for every plan would take minutes.

    Args:
        path: A file or folder from outside the run.
        patterns: Patterns of the files of a folder.
    """
    matches = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
    files = [path] if path.is_file() else sorted(matches)
    stamp: dict[str, object] = {}
    for file in files:
        stat = file.stat()
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        if stat.st_size <= MAX_HASHED_BYTES:
            stamp[name] = sha256_of(file)
        else:
            stamp[name] = [stat.st_size, stat.st_mtime_ns]
    return stamp


@cache
def code_fingerprint(*modules: str) -> str:
    """Returns the fingerprint of modules and of all first-party modules that they import."""
    return digest(imported_code(REPO_ROOT, modules))


def module_of(stage: str) -> str:
    """Returns the name of a stage's module."""
    return f"recipes.stages.{stage}"


def stage_code(stages: Iterable[str]) -> str:
    """Returns the fingerprint of the code that runs stages."""
    return code_fingerprint(WORKER, *map(module_of, stages))


def imported_code(root: Path, modules: Iterable[str]) -> dict[str, str]:
    """Hashes the source of modules and of every first-party module that they import, transitively.

    Imports inside functions count, imports for type checkers do not. Comments, docstrings and
    formatting do not change a hash.

    Args:
        root: The checkout.
        modules: Names of modules.

    Returns:
        Hashes by module name, sorted.
    """
    hashes: dict[str, str] = {}
    queue = list(modules)
    while queue:
        if (module := queue.pop()) not in hashes:
            hashes[module], imports = _read_module(root, module)
            queue += imports
    return dict(sorted(hashes.items()))


@cache
def _read_module(root: Path, module: str) -> tuple[str, frozenset[str]]:
    """Returns the hash of a module's code and the first-party modules that it imports."""
    path = _path_of(root, module)
    if path is None:
        raise ValueError(f"there is no module {module} in {root}")
    tree = ast.parse(source_files(root)[path])
    # ``_imports`` also removes ignored statements from the tree, so it precedes the hash.
    imports = frozenset(name for name in _imports(path, tree) if _path_of(root, name))
    return hashlib.sha256(_dump(tree).encode()).hexdigest(), imports


def _dump(tree: ast.Module) -> str:
    """Returns a syntax tree as text, without positions.

    ``ast.dump`` would include empty fields, of which newer versions of Python have more.
    """
    words: list[str] = []
    rest: list[object] = [tree]
    while rest:
        value = rest.pop()
        if isinstance(value, ast.AST):
            words.append(type(value).__name__)
            for name in value._fields:
                if (item := getattr(value, name, None)) is not None and item != []:
                    words.append(name)
                    rest.append(item)
        elif isinstance(value, list):
            words.append(str(len(value)))
            rest += value
        else:
            words.append(repr(value))
    return " ".join(words)


def _imports(path: str, tree: ast.Module) -> Iterator[str]:
    for node in _strip_ignored(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: relative imports are not followed; name the package")
            yield from (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names))


def _strip_ignored(tree: ast.Module) -> Iterator[ast.AST]:
    """Removes docstrings and ``if TYPE_CHECKING`` from a tree in place; yields other statements.

    Expressions are not visited: they have no imports, and a visit would take most of the time.
    """
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        yield node
        for name in BLOCKS:
            if statements := getattr(node, name, None):
                statements[:] = [child for child in statements if not _is_ignored(child)]
                nodes += statements


def _path_of(root: Path, module: str) -> str | None:
    """Returns the file of a first-party module; ``None`` for other modules."""
    base = module.replace(".", "/")
    return next((p for p in (f"{base}.py", f"{base}/__init__.py") if p in source_files(root)), None)


def _is_ignored(statement: ast.AST) -> bool:
    """Returns whether a statement is a docstring (of a field, too) or is only for type checkers."""
    match statement:
        case ast.Expr(value=ast.Constant(value=str())) | ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
    return False


def stage_fingerprint(
    settings: Mapping[str, object],
    code: str,
    libraries: Mapping[str, str],
    inputs: Mapping[str, str],
    external: Mapping[str, object],
) -> str:
    """Returns the fingerprint of a stage.

    Args:
        settings: The stage's ``result_settings``.
        code: ``stage_code`` of the stage and of the stages that it starts.
        libraries: Versions by library.
        inputs: Fingerprints by input.
        external: ``external_stamp`` of each file or folder from outside the run, by name.
    """
    parts = {"libraries": libraries, "inputs": inputs, "external": external}
    return digest({"settings": settings, "code": code, **{n: dict(v) for n, v in parts.items()}})
