"""Answers that a model has given before, so that no model does the same benchmark twice.

Kept beside the downloads, a file each, shared by all runs: the teacher of ten runs is evaluated
once. What a file is the answer to is in it, with a hash of its items.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from recipes.core.files import storage_explained, write_text_atomically
from recipes.core.fingerprint import digest
from recipes.core.wheels import cache_dir
from recipes.evaluation.results import Item

FOLDER = "evaluations"


@dataclass(frozen=True)
class Question:
    """All that an answer depends on."""

    model: str
    """Hash of weights, config and tokenizer."""
    task: str
    version: str
    data: str
    """Where the items came from."""
    limit: int | None
    num_fewshot: int | None
    seed: int
    harness: str
    """Version of lm-eval."""
    code: str
    """Fingerprint of our part of the scoring."""
    device: str
    libraries: str
    """Versions of what runs the model."""


@dataclass(frozen=True)
class Answer:
    """What a model said to a benchmark's items, and the time it took."""

    items: list[Item]
    seconds: float


def path_of(question: Question) -> Path:
    """File that holds the answer, if it was given."""
    return cache_dir() / FOLDER / f"{question.task}-{digest(asdict(question))[:32]}.json"


def look_up(question: Question) -> Answer | None:
    """The stored answer; ``None`` when there is none, or when its file is damaged."""
    try:
        stored = json.loads(path_of(question).read_text(encoding="utf-8"))
        answer = Answer([Item(**item) for item in stored["items"]], float(stored["seconds"]))
        sound = stored["question"] == asdict(question) and stored["sha256"] == digest(
            stored["items"]
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return answer if sound and answer.items else None


def store(question: Question, answer: Answer) -> None:
    """Keeps an answer for later runs."""
    path = path_of(question)
    given = asdict(answer)
    stored = {"question": asdict(question), "sha256": digest(given["items"]), **given}
    with storage_explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(stored, ensure_ascii=False))
