"""Fingerprints: what a stage's result depends on, as one SHA-256.

It covers the stage's settings without resources, its inputs' fingerprints, the files it reads from
outside the run, the versions of five libraries, and the code of every first-party module that it
imports.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from recipes.core.files import REPO_ROOT, sha256_of

FIRST_PARTY = ("recipes", "nemo_convert")
SMALL_FILE = 1 << 20


def digest(value: object) -> str:
    """SHA-256 of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def result_settings(config: Any) -> dict[str, object]:
    """A config dataclass as plain data, without fields marked ``metadata={"resource": True}``."""
    plain: dict[str, object] = {}
    for spec in fields(config):
        value = getattr(config, spec.name)
        if not spec.metadata.get("resource"):
            plain[spec.name] = result_settings(value) if is_dataclass(value) else value
    return plain


def external_stamp(path: Path) -> dict[str, object]:
    """Identity of a file or folder that is not an artifact of ours.

    Small files are hashed; weights and corpora are known by size and modification time, since
    hashing 140 GB of weights on every plan would cost minutes.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stamp: dict[str, object] = {}
    for file in files:
        stat = file.stat()
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        if stat.st_size <= SMALL_FILE:
            stamp[name] = sha256_of(file)
        else:
            stamp[name] = [stat.st_size, stat.st_mtime_ns]
    return stamp


@cache
def code_fingerprint(*modules: str) -> str:
    """Returns the fingerprint of modules and of all first-party modules that they import."""
    return digest(imported_code(REPO_ROOT, modules))


def stage_code(stages: Iterable[str]) -> str:
    """Fingerprint of the code of stages."""
    return code_fingerprint(*(f"recipes.stages.{stage}" for stage in stages))


def imported_code(root: Path, modules: Iterable[str]) -> dict[str, str]:
    """Hashes modules and every first-party module that they import, directly or not.

    Nothing is imported: the source is read. Imports inside functions count, imports for type
    checkers do not. Comments, docstrings and formatting are not part of a hash.
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
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [s for s in body if not (_is_text(s) or _is_for_types(s))]  # type: ignore[attr-defined]
    imports = frozenset(name for name in _imports(path, tree) if _path_of(root, name))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imports


def _imports(path: Path, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: relative imports are not followed; name the package")
            yield from (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names))


def _path_of(root: Path, module: str) -> Path | None:
    """File of a first-party module; ``None`` for anything else."""
    first, *rest = module.split(".")
    base = root.joinpath(first, *rest)
    if first not in FIRST_PARTY:
        return None
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _is_text(statement: ast.AST) -> bool:
    """Whether a statement is only a text: a docstring, below a field too."""
    match statement:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
    return False


def _is_for_types(statement: ast.AST) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"


def stage_fingerprint(
    settings: Mapping[str, object],
    code: str,
    libraries: Mapping[str, str],
    inputs: Mapping[str, str],
    external: Mapping[str, object],
) -> str:
    """Fingerprint of one stage; see the module's docstring."""
    return digest(
        {
            "settings": settings,
            "code": code,
            "libraries": dict(libraries),
            "inputs": dict(inputs),
            "external": dict(external),
        }
    )
