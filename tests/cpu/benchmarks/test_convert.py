"""The benchmark of conversion, on tiny models in this process."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import convert
from recipes.core.errors import RecipeError


def test_conversion_is_measured_beside_transformers(
    odd_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, and the second time the baseline comes last."""
    order: list[str] = []

    def run(_: str, side: str, folder: Path, scratch: Path, cold: bool) -> dict[str, float]:
        order.append(side)
        return convert.measure_side(side, folder, scratch, cold)

    monkeypatch.setattr(convert, "run_child", run)
    first, *others = convert.SIDES
    text = convert.table(convert.run_sides(odd_llama, 2), size=1_000_000)
    assert order == [first, *others, *others, first]
    assert "checkpoint: 1 MB" in text
    assert [line.split()[0] for line in text.splitlines()[2:]] == list(convert.SIDES)
    assert f"{1:.2f}" in text.splitlines()[2]


def test_weights_survive_a_cold_round_trip(odd_llama: Path, tmp_path: Path) -> None:
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
    with pytest.raises(RecipeError, match=r"model.norm.weight differs"):
        convert.require_same(folder, back)


def test_the_peak_of_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB that are free again at the end of the work."""
    samples: list[dict[str, int]] = []
    sample = convert.memory
    monkeypatch.setattr(convert, "memory", lambda: samples.append(sample()) or samples[-1])

    def work() -> None:
        # Not malloc, which would reuse memory that earlier tests freed.
        held = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for start in range(0, len(held), mmap.PAGESIZE):
            held[start] = 1
        before, deadline = len(samples), time.monotonic() + 60
        while len(samples) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        held.close()

    assert 60 << 20 < convert.measured(work)["anonymous"] < 200 << 20
