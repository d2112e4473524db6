"""Conversion beside other ways to write a model's files, on tiny models."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import convert


def test_conversion_is_measured_beside_transformers(odd_llama: Path, tmp_path: Path) -> None:
    """All sides in this process, where a real measurement has one for each."""
    found = {s: convert.measured(convert.work_of(s, odd_llama, tmp_path)) for s in convert.SIDES}
    assert load_file(tmp_path / "copy" / "model.safetensors").keys() == (
        load_file(tmp_path / "back" / "model.safetensors").keys()
    )
    text = convert.table(found, size=1_000_000)
    assert "checkpoint: 1 MB" in text
    assert [line.split()[0] for line in text.splitlines()[2:]] == list(convert.SIDES)
    assert f"{1:.2f}" in text.splitlines()[2]


def test_weights_come_back_from_a_cold_conversion(odd_llama: Path, tmp_path: Path) -> None:
    """As with ``--billions``, all sides in this process."""
    folder = tmp_path / "model"
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    convert.write_random(folder, odd_llama, shape)
    for side in convert.COLD_SIDES:
        convert.settle(folder, forget=True)
        convert.work_of(side, folder, tmp_path)()
    copied, back = tmp_path / "copy", tmp_path / "back"
    assert load_file(copied / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    convert.require_same(folder, back)
    weights = load_file(back / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, back / "model.safetensors")
    with pytest.raises(SystemExit, match=r"model.norm.weight is another"):
        convert.require_same(folder, back)


def test_the_baseline_comes_first_and_last_by_turns(
    odd_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a side would do is only written down."""
    order: list[str] = []

    def run(side: str, folder: Path, scratch: Path, cold: bool) -> dict[str, float]:
        order.append(side)
        return {"seconds": float(len(order))}

    monkeypatch.setattr(convert, "run_side", run)
    runs = convert.run_sides(odd_llama, 2)
    first, *others = convert.SIDES
    assert order == [first, *others, *others, first]
    assert convert.best(runs)[first] == {"seconds": 1.0}


def test_the_peak_of_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB that are gone again when the work is done."""
    looks: list[dict[str, int]] = []

    def memory() -> dict[str, int]:
        looks.append(look())
        return looks[-1]

    def work() -> None:
        # Not by malloc, which would take what tests before have left free.
        held = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for start in range(0, len(held), mmap.PAGESIZE):
            held[start] = 1
        before, deadline = len(looks), time.monotonic() + 60
        # On a busy machine the watching thread may not run for a while.
        while len(looks) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        held.close()

    look = convert.memory
    monkeypatch.setattr(convert, "memory", memory)
    assert 60 << 20 < convert.measured(work)["anonymous"] < 200 << 20
