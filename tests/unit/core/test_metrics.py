from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import pytest

from recipes.core.metrics import MetricsLog, read_records, steps_of

if TYPE_CHECKING:
    from pathlib import Path


def test_log_without_a_path_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = MetricsLog(None)
    log.log(loss=1.0)
    log.progress("train", 1, 2)
    assert list(tmp_path.iterdir()) == []


def test_records_can_be_read_while_the_log_is_open(tmp_path: Path) -> None:
    before = time.time()
    log = MetricsLog(tmp_path / "m.jsonl")
    log.progress("train", 1, 2, loss=0.5)
    MetricsLog(tmp_path / "m.jsonl").log(note="ü")
    first, second = read_records(tmp_path / "m.jsonl")
    # The log rounds times to milliseconds.
    assert before - 0.001 <= first.pop("time") <= time.time() + 0.001
    assert first == {"task": "train", "done": 1, "total": 2, "loss": 0.5}
    assert second["note"] == "ü"


def test_nan_and_infinity_are_written_as_null(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "m.jsonl").log(loss=math.nan, losses=[math.inf, 1.0])
    [record] = read_records(tmp_path / "m.jsonl")
    assert (record["loss"], record["losses"]) == (None, [None, 1.0])


def test_a_log_continues_after_a_truncated_line(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text('{"task": "train", "done": 1}\n{"task": "train", "do')
    assert [r["done"] for r in read_records(file)] == [1]
    MetricsLog(file).progress("train", 2, 2)
    assert [r["done"] for r in read_records(file)] == [1, 2]


def test_steps_are_sorted_and_have_only_their_last_record(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    for step, loss in ((1, 5.0), (3, 3.0), (2, 2.0), (3, 1.0)):
        log.progress("train", step, 3, loss=loss)
        log.progress("validate", step, 3, loss=9.0)
    log.log(done=1, loss=7.0)  # no progress record, because it has no task
    steps = steps_of(tmp_path / "m.jsonl", "train")
    assert [(r["done"], r["loss"]) for r in steps] == [(1, 5.0), (2, 2.0), (3, 1.0)]
