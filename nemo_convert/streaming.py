"""Reads and writes torch_dist checkpoints with at most three weights in memory.

Megatron-Core reads and writes whole state dicts. This module writes checkpoints of the same layout
(keys, shards, metadata), but gets each tensor from a function just before it writes the tensor.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_convert.trust import explain_damage, read_metadata, require_tensors
from recipes.core.errors import RecipeError

Index = tuple[int, ...]
"""Layer and expert of a weight. A checkpoint stacks the weights of all layers and experts under one
key; layer and expert are the indices on the leading axes of the stack."""
Source = Callable[[str, Index], Tensor]
"""Function that returns the weight of a key at an index. Several threads may call it at once."""
AHEAD = 2
"""Number of weights that threads read while another weight is written.

With two threads, one reads from the disk while the other merges weights of Hugging Face. With one,
the conversion of a 7B model takes 1.1 to 1.5 times as long.
"""


class StreamedSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's save strategy for one rank, with weights from a source instead of the model.

    Args:
        source: Returns the weights. Threads call it, ``AHEAD`` weights ahead of the writer. Of the
            state dict that is saved, only the names, shapes and dtypes are used.
        leading_axes: Number of leading axes (layer, expert) of the stack under each key.
    """

    def __init__(self, source: Source, leading_axes: dict[str, int]) -> None:
        super().__init__("torch_dist", 1)  # Megatron's format and its version
        self.source, self.leading_axes = source, leading_axes

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        """Writes the tensors that a sharded state dict describes, with values from the source."""
        # True: only the main replica of each tensor is kept.
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        planner = _SourcePlanner(self.source, self.leading_axes)
        with _without_checksums(), closing(planner):
            # 0, because a writer that copies ahead requests tensors in an order unlike the plan's.
            writer = FileSystemWriter(checkpoint_dir, per_thread_copy_ahead=0)
            tensors = mcore_to_pyt_state_dict(by_key, False)  # False: for saving, not for loading
            try:
                dcp.save(tensors, storage_writer=writer, planner=planner)
            except CheckpointException as error:  # wraps the error that the source raised
                cause, _ = error.failures[0]
                raise cause from error


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Turns off torch's CRC32 checksums, which take a third to a half of the writer's CPU time.

    torch.load does not check them, and a stage's manifest has a SHA-256 of every file.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _SourcePlanner(MCoreSavePlanner):  # type: ignore[misc]
    """Planner of ``dcp.save`` that takes the data of each tensor from a source."""

    def __init__(self, source: Source, leading_axes: dict[str, int]) -> None:
        # Megatron's save strategy passes the same values.
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._source, self._leading_axes = source, leading_axes
        self._weights = _prefetch(source, [])  # empty until ``finish_plan``
        # ((key, index), weight) of the weight that is being written.
        self._current: tuple[tuple[str, Index] | None, Tensor] = (None, torch.empty(0))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Sets the order in which weights are read to that in which the plan writes them."""
        plan: SavePlan = super().finish_plan(new_plan)
        keys = [key for item in plan.items if (key := self._key(item))]
        # A weight of several blocks has several items, but is read once.
        self._weights = _prefetch(self._source, list(dict.fromkeys(keys)))
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Returns the block of a weight that ``write_item`` writes.

        The blocks of a weight are written one after the other, so only one weight is kept.
        """
        if (key := self._key(write_item)) is None:
            return super().resolve_data(write_item)
        if key != self._current[0]:
            # After the last weight, next() returns the old pair, and the comparison below fails.
            self._current = next(self._weights, self._current)
            if key != self._current[0]:
                raise RuntimeError(f"writer requests {key} where the plan has {self._current[0]}")
        # The weight has no leading axes. In the target block, each leading axis has size 1.
        axes, target = self._leading_axes[key[0]], write_item.tensor_data
        block = _block(self._current[1], target.chunk.offsets[axes:], target.chunk.sizes[axes:])
        return block.reshape(target.chunk.sizes).to(target.properties.dtype)

    def close(self) -> None:
        """Stops the threads that read ahead, and releases the weights that they have read."""
        self._weights.close()

    def _key(self, item: WriteItem) -> tuple[str, Index] | None:
        """Returns an item's key and index; ``None`` for an item that is not from the source."""
        key, data = item.index.fqn, item.tensor_data
        if data is None or key not in self._leading_axes:
            return None
        return key, tuple(data.chunk.offsets[: self._leading_axes[key]])


def _prefetch(
    source: Source, keys: Sequence[tuple[str, Index]]
) -> Generator[tuple[tuple[str, Index], Tensor], None, None]:
    """Yields ((key, index), weight) in the order of ``keys``; threads read ``AHEAD`` ahead."""
    remaining = iter(keys)
    with ThreadPoolExecutor(AHEAD) as threads:
        futures = deque(threads.submit(source, *key) for key in islice(remaining, AHEAD))
        for key in keys:
            weight = futures.popleft().result()
            if (later := next(remaining, None)) is not None:
                futures.append(threads.submit(source, *later))
            yield key, weight


def read_weights(folder: Path, leading_axes: dict[str, int]) -> Iterator[tuple[str, Index, Tensor]]:
    """Yields (key, index, weight) for each key of ``leading_axes`` that a checkpoint has."""
    reader = FileSystemReader(folder)
    metadata = read_metadata(folder)
    require_tensors(metadata, leading_axes, folder)
    with explain_damage(folder / ".metadata"):
        reader.set_up_storage_reader(metadata, is_coordinator=True)
    for key, axes in leading_axes.items():
        if (stored := metadata.state_dict_metadata.get(key)) is None:
            continue
        shards_by_index = _shards_by_index(stored, axes)
        # All (layer, expert) of the stack; one empty index if the tensor is not a stack.
        for index in product(*map(range, stored.size[:axes])):
            shards = replace(stored, chunks=shards_by_index.get(index, []))
            with explain_damage(folder):
                weight = _read_slice(reader, key, shards, index)
            yield key, index, weight


def _shards_by_index(
    stored: TensorStorageMetadata, axes: int
) -> dict[Index, list[ChunkStorageMetadata]]:
    """Maps each (layer, expert) of a stack to the shards that have values of it.

    Without this map, PyTorch searches all shards for each weight: minutes for thousands of experts.
    """
    shards: dict[Index, list[ChunkStorageMetadata]] = {}
    for chunk in stored.chunks:
        starts_and_sizes = zip(chunk.offsets[:axes], chunk.sizes[:axes], strict=True)
        ranges = [range(start, start + size) for start, size in starts_and_sizes]
        for index in product(*ranges):
            shards.setdefault(index, []).append(chunk)
    return shards


def _read_slice(
    reader: FileSystemReader, key: str, stored: TensorStorageMetadata, index: Index
) -> Tensor:
    """Reads the weight at ``index`` from the shards ``stored.chunks``."""
    inner_shape = stored.size[len(index) :]
    # The chunk is the region of the stacked tensor that this weight takes.
    offsets = torch.Size([*index, *[0] * len(inner_shape)])
    sizes = torch.Size([1] * len(index) + list(inner_shape))
    chunk = ChunkStorageMetadata(offsets, sizes)
    items = create_read_items_for_chunk_list(key, stored, [chunk])
    if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
        what = f"{reader.path} is incomplete: it does not have all shards of {key}."
        raise RecipeError(what, "copy or convert the checkpoint again")
    if len(items) == 1:
        return _read_item(reader, items[0]).reshape(inner_shape)
    tensor = torch.empty(sizes, dtype=stored.properties.dtype)
    for item in items:
        _block(tensor, item.dest_offsets, item.lengths).copy_(_read_item(reader, item))
    return tensor.view(inner_shape)


def _read_item(reader: FileSystemReader, item: ReadItem) -> Tensor:
    """Reads a block of a shard without reading the rest of the shard.

    A shard is a section of a file: an uncompressed archive of torch.save. So one range of bytes in
    the file has all values of the block.
    """
    location = reader.storage_data[item.storage_index]
    path = Path(reader.path) / location.relative_path
    with explain_damage(path):
        if location.offset + location.length > path.stat().st_size:
            raise EOFError("the file is too short")  # torch.load would state an unclear reason
        with path.open("rb") as file, FakeTensorMode():  # so torch.load reads only offsets
            shard = torch.load(reader._slice_file(file, location), weights_only=True)
        block = _block(shard, item.storage_offsets, item.lengths)
        # Number of elements in the file from the block's first to its last. The elements between
        # the block's rows count too: they are read, and as_strided skips them.
        steps = zip(block.shape, block.stride(), strict=True)
        count = 1 + sum((size - 1) * stride for size, stride in steps)
        start = location.offset + shard.untyped_storage()._checkpoint_offset
        start += block.storage_offset() * block.itemsize
        data = torch.from_numpy(np.fromfile(path, np.uint8, count * block.itemsize, offset=start))
        return data.view(block.dtype).as_strided(block.shape, block.stride())


def _block(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Returns a view of the block that starts at ``offsets`` and has the shape ``sizes``."""
    starts_and_sizes = zip(offsets, sizes, strict=True)
    return tensor[tuple(slice(start, start + size) for start, size in starts_and_sizes)]
