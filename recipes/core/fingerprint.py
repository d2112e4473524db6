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
import contextlib
import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from recipes.core.files import REPO_ROOT, sha256_of, write_json
from recipes.core.snapshot import hash_source, source_files
from recipes.core.wheels import cache_dir

WORKER = "recipes.core.worker"
"""Main module of every stage's process."""
BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")
"""Fields of ``ast`` nodes that contain statements, directly or in nodes such as handlers."""
MODULES_FILE = "modules.json"
"""File in ``cache_dir()`` with the hashes and imports of all modules."""
MAX_HASHED_BYTES = 1 << 20
"""``external_stamp`` does not hash larger files: 140 GB of weights would take minutes per plan."""


def digest(value: object) -> str:
    """Returns the SHA-256 of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def result_settings(config: Any) -> dict[str, object]:
    """Returns the settings that affect the result, by field name.

    Omits fields with the metadata ``resource``. Makes paths in fields with ``path`` absolute.
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
    """Makes the path or glob pattern of existing files absolute; returns other values unchanged.

    Options may follow a path after ``#``, as in ``my.jsonl#text=body``.
    """
    if isinstance(value, list):
        return [with_absolute_path(item) for item in value]
    if not isinstance(value, str):
        return value
    path, separator, options = value.partition("#")
    return os.path.abspath(path) + separator + options if glob.glob(path) else value


def external_stamp(path: Path, patterns: Iterable[str] = ("**/*",)) -> dict[str, object]:
    """Returns a stamp for each file, by relative path. A stamp changes when its file changes.

    The stamp of a file up to ``MAX_HASHED_BYTES`` is its SHA-256. The stamp of a larger file is its
    size in bytes and ``mtime_ns``.

    Args:
        path: A file or folder from outside the run.
        patterns: If ``path`` is a folder, glob patterns of the files in it that get a stamp.
    """
    matches = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
    files = [path] if path.is_file() else sorted(matches)
    stamps: dict[str, object] = {}
    for file in files:
        stat = file.stat()
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        if stat.st_size <= MAX_HASHED_BYTES:
            stamps[name] = sha256_of(file)
        else:
            stamps[name] = [stat.st_size, stat.st_mtime_ns]
    return stamps


def module_of(stage: str) -> str:
    """Returns the module of a type of stage: ``recipes.stages.distill`` for ``distill``."""
    return f"recipes.stages.{stage}"


def stage_code(stages: Iterable[str]) -> str:
    """Returns the ``code_fingerprint`` of types of stages and of ``WORKER``."""
    return code_fingerprint(WORKER, *map(module_of, stages))


@cache
def code_fingerprint(*modules: str) -> str:
    """Returns one hash of modules and of this repository's modules that they import."""
    return digest(imported_code(REPO_ROOT, modules))


def imported_code(root: Path, modules: Iterable[str]) -> dict[str, str]:
    """Hashes modules and all modules below ``root`` that they import, directly or indirectly.

    Imports inside functions count, imports under ``TYPE_CHECKING`` do not. Comments, docstrings and
    formatting do not change a hash. Returns the hashes by module name, sorted by that name.
    """
    hashes: dict[str, str] = {}
    queue = list(modules)
    while queue:
        if (module := queue.pop()) not in hashes:
            path = _path_of(root, module)
            if path is None:
                raise ValueError(f"there is no module {module} in {root}")
            hashes[module], imports = _all_modules(root)[path]
            queue += imports
    return dict(sorted(hashes.items()))


@cache
def _all_modules(root: Path) -> dict[str, tuple[str, list[str]]]:
    """Returns the hash of each module's code and the modules that it imports, by path.

    Parsing all modules takes a fifth of a dry run's time, so the user's cache keeps the result. Its
    key depends on the content of all files, this module included, and on Python's version.
    """
    key = f"{hash_source(source_files(root))} {sys.version}"
    file = cache_dir() / MODULES_FILE
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        cached = json.loads(file.read_text(encoding="utf-8"))
        if cached["key"] == key:
            return {path: (code, imports) for path, (code, imports) in cached["modules"].items()}
    python_files = [path for path in source_files(root) if path.endswith(".py")]
    modules = {path: _read_module(root, path) for path in python_files}
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"key": key, "modules": modules})
    return modules


def _read_module(root: Path, path: str) -> tuple[str, list[str]]:
    """Returns the hash of a module's code, and the modules below ``root`` that it imports."""
    tree = ast.parse(source_files(root)[path])
    statements = _strip_ignored(tree)
    imports = {name for name in _imports(path, statements) if _path_of(root, name)}
    return hashlib.sha256(_dump(tree).encode()).hexdigest(), sorted(imports)


def _path_of(root: Path, module: str) -> str | None:
    """Returns the path of a module relative to ``root``; ``None`` if it is not below ``root``."""
    base = module.replace(".", "/")
    candidates = f"{base}.py", f"{base}/__init__.py"
    return next((path for path in candidates if path in source_files(root)), None)


def _strip_ignored(tree: ast.Module) -> list[ast.AST]:
    """Removes ignored statements from a tree in place, and returns all other statements.

    Does not visit expressions: they contain no imports, and visiting them would take most of the
    time.
    """
    nodes: list[ast.AST] = [tree]
    for node in nodes:  # the loop also visits the nodes that it appends
        for name in BLOCKS:
            if statements := getattr(node, name, None):
                statements[:] = [child for child in statements if not _is_ignored(child)]
                nodes += statements
    return nodes


def _is_ignored(statement: ast.AST) -> bool:
    """Returns whether a statement is ``if TYPE_CHECKING``, or a docstring, also of a field."""
    match statement:
        case ast.Expr(value=ast.Constant(value=str())) | ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
    return False


def _imports(path: str, statements: Iterable[ast.AST]) -> Iterator[str]:
    """Yields the names that the statements of a module import.

    For ``from a import b``, yields ``a`` and ``a.b``, because ``b`` may be a module.
    """
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: relative imports are not followed; name the package")
            yield from (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names))


def _dump(tree: ast.Module) -> str:
    """Returns a syntax tree as text, without positions and empty fields.

    ``ast.dump`` would include empty fields, which differ between versions of Python.
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


def stage_fingerprint(
    settings: Mapping[str, object],
    code: str,
    libraries: Mapping[str, str],
    inputs: Mapping[str, str],
    external: Mapping[str, object],
) -> str:
    """Returns the fingerprint of a stage.

    Args:
        settings: ``result_settings`` of the stage.
        code: ``stage_code`` of the stage and of the stages that it starts.
        libraries: Version of each library, by the library's name.
        inputs: Fingerprint of each input, by the input's name.
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
