"""Fingerprints: what a stage's result depends on, as one SHA-256.

That is the stage's own settings without resources, its inputs' fingerprints, the files it reads
from outside the run, and the code that can change the result: the stage module, the first-party
modules it imports (found in the source, without importing anything), and the pinned dependencies.
"""

from __future__ import annotations

import ast
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parent.parent
FIRST_PARTY = ("recipes", "nemo_convert")
SMALL_FILE = 1 << 20


def digest(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def result_settings(config: Any) -> dict[str, Any]:
    """A config dataclass as plain data, without fields marked ``metadata={"resource": True}``."""
    plain: dict[str, Any] = {}
    for spec in fields(config):
        value = getattr(config, spec.name)
        if not spec.metadata.get("resource"):
            plain[spec.name] = result_settings(value) if is_dataclass(value) else value
    return plain


def external_stamp(path: Path) -> dict[str, Any]:
    """Identity of a file or folder that is not an artifact of ours.

    Small files are hashed; weights and corpora are known by size and modification time, since
    hashing 140 GB of weights on every plan would cost minutes.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stamp: dict[str, Any] = {}
    for file in files:
        stat = file.stat()
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        if stat.st_size <= SMALL_FILE:
            stamp[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            stamp[name] = [stat.st_size, stat.st_mtime_ns]
    return stamp


def _source(module: str) -> Path | None:
    base = REPO_ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _parsed(path: Path) -> tuple[str, frozenset[str]]:
    """Hash of a module's meaning (comments and formatting do not count) and what it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(f"{path}: relative imports hide what a result depends on")
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module)
            imported.update(f"{node.module}.{alias.name}" for alias in node.names)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), frozenset(imported)


@cache
def code_fingerprint(module: str) -> str:
    """Fingerprint of ``module`` and all first-party code it can reach, and of the pinned stack."""
    hashes: dict[str, str] = {}
    queue = [module]
    while queue:
        path = _source(queue.pop())
        if path is None or (name := path.relative_to(REPO_ROOT).as_posix()) in hashes:
            continue
        hashes[name], imported = _parsed(path)
        queue += [i for i in imported if i.split(".")[0] in FIRST_PARTY]
    with (REPO_ROOT / "pyproject.toml").open("rb") as file:
        pins = tomllib.load(file)["project"]["dependencies"]
    return digest({"code": hashes, "dependencies": pins})


def stage_fingerprint(
    settings: Mapping[str, Any],
    code: str,
    inputs: Mapping[str, str],
    external: Mapping[str, Any],
) -> str:
    """Fingerprint of one stage; see the module's docstring."""
    return digest(
        {"settings": settings, "code": code, "inputs": dict(inputs), "external": dict(external)}
    )
