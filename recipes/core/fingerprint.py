"""Fingerprints: what a stage's result depends on, as one SHA-256.

That is the stage's own settings without resources, its inputs' fingerprints, the files it reads
from outside the run, the pinned dependencies, and the code that can change the result.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from recipes.core.files import REPO_ROOT, sha256_of
from recipes.core.reachable_code import reachable_code

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
def code_fingerprint(*names: str) -> str:
    """Fingerprint of functions, as ``module:name``, or whole modules, and of the pinned stack."""
    with (REPO_ROOT / "pyproject.toml").open("rb") as file:
        pins = tomllib.load(file)["project"]["dependencies"]
    return digest({"code": reachable_code(REPO_ROOT, names), "dependencies": pins})


def stage_code(stages: Iterable[str]) -> str:
    """Fingerprint of the code that the ``run`` of stages can reach; no check, no planning."""
    return code_fingerprint(*(f"recipes.stages.{stage}:run" for stage in stages))


def stage_fingerprint(
    settings: Mapping[str, object],
    code: str,
    inputs: Mapping[str, str],
    external: Mapping[str, object],
) -> str:
    """Fingerprint of one stage; see the module's docstring."""
    return digest(
        {"settings": settings, "code": code, "inputs": dict(inputs), "external": dict(external)}
    )
