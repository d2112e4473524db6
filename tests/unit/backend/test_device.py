"""A rank moves to the cores near its GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from recipes.backend.device import bind_to_near_cores


@pytest.mark.parametrize(
    ("near", "ranks", "moved"),
    [
        ("first", 2, True),
        ("first", 1, False),  # one rank would lose half of its cores
        ("all", 2, False),
        ("none", 2, False),  # the job's are on the other socket
        ("unknown", 2, False),
    ],
)
def test_a_rank_moves_to_the_cores_near_its_gpu(
    near: str, ranks: int, moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = {4, 5, 6, 7}
    listed = {"first": "0-3,4,5", "all": "0-7", "none": "64-127"}
    if near in listed:
        (tmp_path / "local_cpulist").write_text(f"{listed[near]}\n")
    bound: dict[int, set[int]] = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    monkeypatch.setattr(os, "sched_setaffinity", bound.__setitem__)
    bind_to_near_cores(tmp_path, ranks)
    threads = {int(thread.name) for thread in Path("/proc/self/task").iterdir()}
    assert bound == ({thread: {4, 5} for thread in threads} if moved else {})


def test_a_thread_that_has_ended_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local_cpulist").write_text("0-1\n")
    threads: list[int] = []

    def bind(thread: int, cores: set[int]) -> None:
        threads.append(thread)
        raise ProcessLookupError

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(os, "sched_setaffinity", bind)
    bind_to_near_cores(tmp_path, ranks=2)
    assert threads
