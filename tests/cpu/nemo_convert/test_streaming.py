"""Streamed saves read a few weights ahead, in order; read and write errors are raised."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_convert import hf
from nemo_convert.streaming import (
    AHEAD,
    Index,
    _prefetch,
    _shards_by_index,
    _SourcePlanner,
    _without_checksums,
)
from recipes.core.errors import RecipeError

KEYS: list[tuple[str, Index]] = [("a", (0,)), ("a", (1,)), ("b", (0,)), ("b", (1,))]
"""(key, index) of four weights: those of two layers under each of two keys."""


def make_weight(key: str, index: Index) -> Tensor:
    """Returns a weight [2, 3] filled with the position of (key, index) in ``KEYS``."""
    return torch.full((2, 3), KEYS.index((key, index))).bfloat16()


def test_a_few_weights_are_read_ahead() -> None:
    started = {key: Event() for key in KEYS}

    def source(key: str, index: Index) -> Tensor:
        started[key, index].set()
        return make_weight(key, index)

    for number, (key, tensor) in enumerate(_prefetch(source, KEYS)):
        assert key == KEYS[number]
        assert tensor.tolist() == [[number] * 3] * 2
        for following in KEYS[number + 1 : number + 1 + AHEAD]:  # none after the last weight
            assert started[following].wait(60)  # seconds
        assert not any(started[later].is_set() for later in KEYS[number + 1 + AHEAD :])


def test_error_of_the_source_is_raised_when_its_weight_is_requested() -> None:
    def source(key: str, index: Index) -> Tensor:
        if (key, index) == KEYS[1]:
            raise RecipeError("missing weight", "")
        return make_weight(key, index)

    weights = _prefetch(source, KEYS)
    assert next(weights)[0] == KEYS[0]
    with pytest.raises(RecipeError, match="missing weight"):
        next(weights)


def test_planner_refuses_weights_in_another_order_than_planned() -> None:
    planner = _SourcePlanner(make_weight, {"a": 1, "b": 1})  # one leading axis: the layer
    planner._weights = _prefetch(make_weight, KEYS)  # as ``finish_plan`` does

    def write_item(key: str, index: Index) -> Any:
        """Returns those fields of a ``WriteItem`` that the planner reads, for one weight."""
        chunk = SimpleNamespace(offsets=torch.Size([*index, 0, 0]), sizes=torch.Size([1, 2, 3]))
        properties = SimpleNamespace(dtype=torch.float32)
        return SimpleNamespace(
            index=SimpleNamespace(fqn=key),
            tensor_data=SimpleNamespace(chunk=chunk, properties=properties),
        )

    first = planner.resolve_data(write_item(*KEYS[0]))
    assert first.shape == (1, 2, 3)
    assert first.dtype == torch.float32
    with pytest.raises(RuntimeError, match="where the plan has"):
        planner.resolve_data(write_item(*KEYS[2]))  # KEYS[1] is due
    planner.close()


def test_checksums_are_off_only_within_the_context() -> None:
    def fail() -> None:
        with _without_checksums():
            assert not torch.serialization.get_crc32_options()
            raise RecipeError("the disk is full", "")

    assert torch.serialization.get_crc32_options()
    with pytest.raises(RecipeError):
        fail()
    assert torch.serialization.get_crc32_options()  # on again, although an error was raised


@pytest.mark.parametrize("failing_shard", [0, 1, 2])
def test_failed_write_of_a_shard_raises(tmp_path: Path, failing_shard: int) -> None:
    (tmp_path / f"shard-{failing_shard}").mkdir()  # a folder where a file must be written
    tensors = {name: torch.zeros(4) for name in "abc"}
    # Each tensor has 16 bytes, so each gets its own shard.
    with pytest.raises(SafetensorError):
        hf.write_weights(iter(tensors.items()), tmp_path, shard_bytes=16)


def test_weights_are_read_as_written(tmp_path: Path) -> None:
    """The weights have several dtypes. Some are not contiguous, share a storage or are empty."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8)
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    first, second = torch.arange(8.0).reshape(4, 2).split(2)
    tensors |= {"first": first, "second": second, "transposed": first.T}
    tensors |= {"scalar": torch.tensor(0.5), "empty": torch.empty(0, 4)}
    hf.write_weights(iter(tensors.items()), tmp_path)
    weights = hf.Weights(tmp_path)
    assert weights.names() == set(tensors)
    for name, tensor in tensors.items():
        stored = weights.read(name)
        assert stored.dtype == tensor.dtype
        assert torch.equal(stored.float(), tensor.float()), name
        assert weights.shape(name) == tensor.shape


def test_read_weight_is_independent_of_its_file(tmp_path: Path) -> None:
    hf.write_weights(iter([("ones", torch.ones(1000))]), tmp_path)
    ones = hf.Weights(tmp_path).read("ones")
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))  # overwrites the file with zeros
    assert ones.sum() == 1000


def test_shards_are_found_by_layer_and_expert() -> None:
    """A stack of 2 layers and 3 experts has weights [4, 5], each in two shards of 2 rows.

    The shards of layer 1 have all of its experts.
    """
    sizes = {0: [1, 1, 2, 5], 1: [1, 3, 2, 5]}
    offsets = [[0, e, row, 0] for e in range(3) for row in (0, 2)] + [[1, 0, r, 0] for r in (0, 2)]
    chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(sizes[o[0]])) for o in offsets]
    stored = TensorStorageMetadata(TensorProperties(), torch.Size([2, 3, 4, 5]), chunks)
    shards = _shards_by_index(stored, 2)
    assert shards.keys() == {(layer, expert) for layer in range(2) for expert in range(3)}
    assert shards[0, 1] == chunks[2:4]
    assert shards[1, 0] == shards[1, 2] == chunks[6:]
    assert _shards_by_index(stored, 0) == {(): chunks}
