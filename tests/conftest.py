"""Real text for every test, and the order of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LONGEST = (
    "test_slurm",
    "test_readme",
    "test_chain",
    "test_layouts",
    "test_benchmarks",
    "test_logit_cache",
    "test_rehearsal",
    "test_recipes_in_miniature",
    "test_settings",
)
"""Files that take minutes: started first, none of them is left over for one worker at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files; tests of a file keep their order."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real English prose: the language reference that comes with Python."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    paragraphs = [p for topic in topics.values() for p in topic.split("\n\n") if len(p) > 200]
    path.write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs[:1200]))
    return path
