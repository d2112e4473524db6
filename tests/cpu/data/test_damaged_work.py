"""Tests damaged files in the work folder of a killed preparation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from recipes.core.errors import RecipeError
from recipes.data.corpus import digest
from recipes.data.ledger import Ledger
from recipes.data.split_writer import SplitWriter


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_the_error_for_a_damaged_ledger_says_what_to_delete(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        for number in range(2000):  # several pages of the SQLite file
            ledger.add_if_new(digest(str(number)))
        ledger.save({})
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(RecipeError, match=r"ledger\.sqlite is damaged") as caught:
        Ledger(path)
    assert f"delete {tmp_path} " in str(caught.value)


def test_a_file_shorter_than_its_recorded_size_is_refused(tmp_path: Path) -> None:
    with SplitWriter(tmp_path, ["train"]) as writer:
        writer.add("train", [1, 2, 3])
    (tmp_path / "train.bin").write_bytes(b"")  # the three tokens are lost
    with pytest.raises(RecipeError, match="is damaged: it is shorter"):
        SplitWriter(tmp_path, ["train"], writer.sizes)
