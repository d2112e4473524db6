"""Tests the cache of benchmark answers, which ignores damaged files and files of other keys."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.core.errors import RecipeError
from recipes.evaluation.results import Item
from recipes.evaluation.task_cache import TaskAnswers, look_up, path_of, store
from tests.support.disks import small_disk

KEY = {"model": "m", "task": "sciq", "limit": 100, "num_fewshot": None}
ANSWERS = TaskAnswers([Item("sciq/0", "h", {"text": "é"}, 1, [[-2.5, True]], {"acc": 1.0})], 1.5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which each test has its cache."""
    monkeypatch.setenv("NEMO_RECIPES_CACHE", str(tmp_path))
    return tmp_path


def test_stored_answers_are_returned(cache: Path) -> None:
    assert look_up(KEY) is None
    store(KEY, ANSWERS)
    assert look_up(KEY) == ANSWERS
    # A key that differs in any field has no answers.
    assert all(look_up({**KEY, field: "other"}) is None for field in KEY)
    assert [p.parent.name for p in cache.rglob("*.json")] == ["evaluations"]
    assert len(list(cache.rglob("*"))) == 2  # the folder and the file, but no temporary file


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"acc": 1.0', '"acc": 0.0'),
        lambda text: text.replace('"model": "m"', '"model": "n"'),
        lambda text: json.dumps({**json.loads(text), "items": []}),
    ],
    ids=["truncated", "empty", "other-type", "changed-items", "other-key", "no-items"],
)
def test_a_damaged_file_is_ignored_and_can_be_replaced(damage: Callable[[str], str]) -> None:
    store(KEY, ANSWERS)
    path = path_of(KEY)
    text = path.read_text(encoding="utf-8")
    damaged_text = damage(text)
    assert damaged_text != text
    path.write_text(damaged_text, encoding="utf-8")
    assert look_up(KEY) is None
    store(KEY, ANSWERS)
    assert look_up(KEY) == ANSWERS


def test_a_full_disk_is_reported_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "small", "64k") as disk:
        monkeypatch.setenv("NEMO_RECIPES_CACHE", str(disk.folder))
        too_large = dataclasses.replace(ANSWERS, items=1000 * ANSWERS.items)  # more than 64 KiB
        with pytest.raises(RecipeError, match="small/evaluations: No space left on device"):
            store(KEY, too_large)
        assert look_up(KEY) is None
        assert not list(disk.folder.glob("evaluations/*"))
