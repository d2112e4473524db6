"""Tests that a rank is bound to the CPU cores near its GPU, if these are enough."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from recipes.backend.device import bind_to_near_cores


@pytest.mark.parametrize(
    ("cpu_list", "ranks", "is_bound"),
    [  # the job may use cores 4 to 7
        ("0-3,4,5", 2, True),
        ("0-3,4,5", 1, False),  # a single rank would lose half of its cores
        ("0-7", 2, False),  # all of the job's cores are near
        ("64-127", 2, False),  # the job's cores are on the other socket
        (None, 2, False),  # the file does not exist
    ],
)
def test_a_rank_is_bound_to_the_cores_near_its_gpu_if_these_are_enough(
    cpu_list: str | None,
    ranks: int,
    is_bound: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if cpu_list is not None:
        (tmp_path / "local_cpulist").write_text(f"{cpu_list}\n")
    bindings: dict[int, set[int]] = {}
    threads = {int(thread.name) for thread in Path("/proc/self/task").iterdir()}

    def bind(thread: int, cores: set[int]) -> None:
        bindings[thread] = cores
        if thread == min(threads):
            raise ProcessLookupError  # as if this thread had ended after it was listed

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7})
    monkeypatch.setattr(os, "sched_setaffinity", bind)
    bind_to_near_cores(tmp_path, ranks)
    # Cores 4 and 5 are near the GPU and among the job's cores.
    assert bindings == ({thread: {4, 5} for thread in threads} if is_bound else {})
