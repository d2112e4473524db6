"""Caches models' answers to benchmarks, so that several runs can share the answers of a model.

A file has the answers of one model to one benchmark, the key of these answers, and their hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.core.files import explain_storage_errors, write_text_atomically
from recipes.core.fingerprint import digest
from recipes.core.wheels import cache_dir
from recipes.evaluation.results import Item

FOLDER = "evaluations"
"""Name of the cache's folder in ``cache_dir()``."""
Key = Mapping[str, Any]
"""Everything that the answers depend on, as JSON data; ``key["task"]`` is the benchmark's name."""


@dataclass(frozen=True)
class TaskAnswers:
    """A model's answers to all items of a benchmark, and the seconds that answering took."""

    items: list[Item]
    seconds: float


def path_of(key: Key) -> Path:
    """Returns the path of the file for a key's answers. The file may not exist."""
    return cache_dir() / FOLDER / f"{key['task']}-{digest(dict(key))[:32]}.json"


def look_up(key: Key) -> TaskAnswers | None:
    """Returns the cached answers of a key; ``None`` if the file is missing, damaged or empty."""
    try:
        stored = json.loads(path_of(key).read_text(encoding="utf-8"))
        answers = TaskAnswers([Item(**item) for item in stored["items"]], float(stored["seconds"]))
        valid = stored["key"] == key and stored["sha256"] == digest(stored["items"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return answers if valid and answers.items else None


def store(key: Key, answers: TaskAnswers) -> None:
    """Stores answers for later runs. Raises ``RecipeError`` if the disk refuses the file."""
    path, fields = path_of(key), asdict(answers)
    stored = {"key": dict(key), "sha256": digest(fields["items"]), **fields}
    with explain_storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(stored, ensure_ascii=False))
