"""Caches models' answers to benchmarks: a model that several runs evaluate is run only once.

The cache is a folder beside the downloads. It has a file for each model and benchmark, with its key
and a hash of its items.
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
Key = Mapping[str, Any]
"""Everything that the answers depend on, as JSON; ``task`` is the benchmark's name."""


@dataclass(frozen=True)
class Answer:
    """A model's answers to all items of a benchmark, and their time."""

    items: list[Item]
    seconds: float


def path_of(key: Key) -> Path:
    """Returns the file of cached answers."""
    return cache_dir() / FOLDER / f"{key['task']}-{digest(dict(key))[:32]}.json"


def look_up(key: Key) -> Answer | None:
    """Returns cached answers; ``None`` if there are none or the file is damaged."""
    try:
        stored = json.loads(path_of(key).read_text(encoding="utf-8"))
        answer = Answer([Item(**item) for item in stored["items"]], float(stored["seconds"]))
        valid = stored["key"] == key and stored["sha256"] == digest(stored["items"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return answer if valid and answer.items else None


def store(key: Key, answer: Answer) -> None:
    """Stores answers for later runs."""
    path, content = path_of(key), asdict(answer)
    stored = {"key": dict(key), "sha256": digest(content["items"]), **content}
    with explain_storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(stored, ensure_ascii=False))
