"""Weights on their way into files: in order, one ahead of the writer, and no failure is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from nemo_convert import hf
from nemo_convert.streaming import (
    Place,
    Where,
    _one_ahead,
    _SourcePlanner,
    _without_checksums,
)
from recipes.core.errors import RecipeError

WANTED: list[Where] = [("a", (0,)), ("a", (1,)), ("b", (0,)), ("b", (1,))]


@pytest.fixture
def begun() -> dict[Where, Event]:
    """Is set once a weight is being made."""
    return {where: Event() for where in WANTED}


@pytest.fixture
def source(begun: dict[Where, Event]) -> Callable[[str, Place], Tensor]:
    def make(key: str, place: Place) -> Tensor:
        begun[key, place].set()
        return torch.full((2, 3), WANTED.index((key, place))).bfloat16()

    return make


def test_one_weight_is_made_while_another_is_written(
    source: Callable[[str, Place], Tensor], begun: dict[Where, Event]
) -> None:
    for number, (where, made) in enumerate(_one_ahead(source, WANTED)):
        assert where == WANTED[number]
        assert made.tolist() == [[number] * 3] * 2
        for ahead in WANTED[number + 1 : number + 2]:
            assert begun[ahead].wait(60)
        assert not any(begun[later].is_set() for later in WANTED[number + 2 :])


def test_a_refused_weight_is_raised_where_it_is_wanted(
    source: Callable[[str, Place], Tensor],
) -> None:
    def refuse(key: str, place: Place) -> Tensor:
        if (key, place) == WANTED[1]:
            raise RecipeError("a weight is not there", "")
        return source(key, place)

    weights = _one_ahead(refuse, WANTED)
    assert next(weights)[0] == WANTED[0]
    with pytest.raises(RecipeError, match="not there"):
        next(weights)


def test_another_order_than_the_plans_is_refused(source: Callable[[str, Place], Tensor]) -> None:
    planner = _SourcePlanner(source, {"a": 1, "b": 1})
    planner._weights = _one_ahead(source, WANTED)

    def item(key: str, place: Place) -> Any:
        chunk = SimpleNamespace(offsets=torch.Size([*place, 0, 0]), sizes=torch.Size([1, 2, 3]))
        properties = SimpleNamespace(dtype=torch.float32)
        return SimpleNamespace(
            index=SimpleNamespace(fqn=key),
            tensor_data=SimpleNamespace(chunk=chunk, properties=properties),
        )

    first = planner.resolve_data(item(*WANTED[0]))
    assert first.shape == (1, 2, 3)
    assert first.dtype == torch.float32
    with pytest.raises(RuntimeError, match="where the plan has"):
        planner.resolve_data(item(*WANTED[2]))
    planner.close()


def test_checksums_are_left_out_only_there() -> None:
    def fail() -> None:
        with _without_checksums():
            assert not torch.serialization.get_crc32_options()
            raise RecipeError("the disk is full", "")

    assert torch.serialization.get_crc32_options()
    with pytest.raises(RecipeError):
        fail()
    assert torch.serialization.get_crc32_options()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_shard_that_cannot_be_written_raises(tmp_path: Path, failing: int) -> None:
    (tmp_path / f"shard-{failing}").mkdir()
    tensors = {name: torch.zeros(4) for name in "abc"}
    with pytest.raises(SafetensorError):
        hf.write_weights(iter(tensors.items()), tmp_path, shard_bytes=16)


def test_weights_are_read_as_written(tmp_path: Path) -> None:
    """Of every dtype, contiguous or not, as parts of one storage, and empty."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8)
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    first, second = torch.arange(8.0).reshape(4, 2).split(2)
    tensors |= {"first": first, "second": second, "transposed": first.T}
    tensors |= {"scalar": torch.tensor(0.5), "empty": torch.empty(0, 4)}
    hf.write_weights(iter(tensors.items()), tmp_path)
    weights = hf.Weights(tmp_path)
    assert weights.names() == set(tensors)
    for name, tensor in tensors.items():
        read = weights.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read.float(), tensor.float()), name
        assert weights.shape(name) == tensor.shape


def test_read_weight_is_independent_of_its_file(tmp_path: Path) -> None:
    hf.write_weights(iter([("ones", torch.ones(1000))]), tmp_path)
    read = hf.Weights(tmp_path).read("ones")
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert read.sum() == 1000
