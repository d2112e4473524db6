"""Fingerprint of a stage: one SHA-256 of everything that its result depends on.

The fingerprint covers:

- the stage's settings, except resources
- the fingerprints of its inputs
- files from outside the run, such as a model from Hugging Face
- the versions of libraries (``versions.result_versions``)
- the code of the stage and of ``WORKER``, with all modules of this repository that they import
"""

from __future__ import annotations

import ast
import glob
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
"""Fields of ``ast`` nodes that hold lists of statements, or of nodes with such lists."""
MAX_HASHED_BYTES = 1 << 20
"""``external_stamp`` does not hash larger files: 140 GB of weights would take minutes per plan."""


def digest(value: object) -> str:
    """Returns the SHA-256 of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def result_settings(config: Any) -> dict[str, object]:
    """Returns the settings that affect the result, by field name.

    The metadata of a config's fields decides. Fields with ``resource`` are omitted. In fields with
    ``path``, paths are made absolute.
    """
    settings: dict[str, object] = {}
    for spec in fields(config):
        value = getattr(config, spec.name)
        if spec.metadata.get("path"):
            value = with_absolute_path(value)
        if not spec.metadata.get("resource"):
            settings[spec.name] = result_settings(value) if is_dataclass(value) else value
    return settings


def with_absolute_path(value: object) -> object:
    """Makes the path of an existing file or folder absolute; other values are returned unchanged.

    Args:
        value: The value of a field, or a list of values. Options may follow a path, as in
            ``my.jsonl#text=body`` (see ``recipes/data/sources.py``).
    """
    if isinstance(value, list):
        return [with_absolute_path(item) for item in value]
    if not isinstance(value, str):
        return value
    path, separator, options = value.partition("#")
    return os.path.abspath(path) + separator + options if glob.glob(path) else value


def external_stamp(path: Path, patterns: Iterable[str] = ("**/*",)) -> dict[str, object]:
    """Returns a stamp for each file, which changes when the file changes.

    Args:
        path: A file or folder from outside the run.
        patterns: Glob patterns of the files of a folder.

    Returns:
        Stamps by relative path. The stamp of a file up to ``MAX_HASHED_BYTES`` is its SHA-256. The
        stamp of a larger file is its size in bytes and ``mtime_ns``.
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
    """Returns the name of the module of a type of stage, such as ``distill``."""
    return f"recipes.stages.{stage}"


def stage_code(stages: Iterable[str]) -> str:
    """Returns the fingerprint of the code of types of stages and of ``WORKER``."""
    return code_fingerprint(WORKER, *map(module_of, stages))


def imported_code(root: Path, modules: Iterable[str]) -> dict[str, str]:
    """Hashes the source of modules and of every first-party module that they import, transitively.

    Imports inside functions count, imports for type checkers do not. Comments, docstrings and
    formatting do not change a hash.

    Args:
        root: Root folder of the repository's code.
        modules: Full names of modules.

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
    # ``_imports`` also removes docstrings from the tree, so it must be called before ``_dump``.
    imports = frozenset(name for name in _imports(path, tree) if _path_of(root, name))
    return hashlib.sha256(_dump(tree).encode()).hexdigest(), imports


def _dump(tree: ast.Module) -> str:
    """Returns a syntax tree as text, without positions.

    ``ast.dump`` would include empty fields. Newer versions of Python have more of them, so the hash
    would depend on the version.
    """
    words: list[str] = []
    pending: list[object] = [tree]
    while pending:
        value = pending.pop()
        if isinstance(value, ast.AST):
            words.append(type(value).__name__)
            for name in value._fields:
                if (item := getattr(value, name, None)) is not None and item != []:
                    words.append(name)
                    pending.append(item)
        elif isinstance(value, list):
            words.append(str(len(value)))
            pending += value
        else:
            words.append(repr(value))
    return " ".join(words)


def _imports(path: str, tree: ast.Module) -> Iterator[str]:
    """Yields the names that a module imports, and removes ignored statements from its tree.

    For ``from a import b``, yields ``a`` and ``a.b``, because ``b`` may be a module.
    """
    for node in _strip_ignored(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: relative imports are not followed; name the package")
            yield from (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names))


def _strip_ignored(tree: ast.Module) -> Iterator[ast.AST]:
    """Removes ignored statements from a tree in place, and yields all other statements.

    ``_is_ignored`` says which are ignored. Expressions are not visited: they contain no imports,
    and visiting them would take most of the time.
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
    """Returns the path of a first-party module below ``root``; ``None`` for other modules."""
    base = module.replace(".", "/")
    candidates = f"{base}.py", f"{base}/__init__.py"
    return next((path for path in candidates if path in source_files(root)), None)


def _is_ignored(statement: ast.AST) -> bool:
    """Returns whether a statement is a docstring, also one of a field, or ``if TYPE_CHECKING``."""
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
        libraries: ``result_versions``: versions by library.
        inputs: Fingerprints by input.
        external: ``external_stamp`` of each file or folder from outside the run, by name.
    """
    return digest(
        {
            "settings": settings,
            "code": code,
            "libraries": dict(libraries),
            "inputs": dict(inputs),
            "external": dict(external),
        }
    )
