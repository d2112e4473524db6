"""Torch_dist checkpoints a weight or two at a time, however large the model.

Megatron-Core writes and reads whole state dicts. Its plan of a checkpoint (keys, shards, metadata)
is kept here; only where a shard's bytes come from or go to is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import product
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
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_convert.trust import read_description
from recipes.core.errors import RecipeError

Place = tuple[int, ...]
"""Where on a key's leading axes (layer, expert) a weight is."""
Where = tuple[str, Place]
"""A key and a place: one weight."""
Source = Callable[[str, Place], Tensor]
"""Gives the weight of a key at a place."""


class StreamedSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's strategy for one rank, with weights from a source rather than from the model.

    Args:
        source: Called from a thread, a weight ahead of what is written; the model's own memory is
            never touched.
        leading: Number of leading axes of each key.
    """

    def __init__(self, source: Source, leading: dict[str, int]) -> None:
        super().__init__("torch_dist", 1)
        self.source, self.leading = source, leading

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        """Writes the shards that the state dict describes."""
        described, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        with _without_checksums(), closing(_SourcePlanner(self.source, self.leading)) as planner:
            # Nothing is copied ahead: where there is a GPU, that goes by size and not in order.
            writer = FileSystemWriter(checkpoint_dir, per_thread_copy_ahead=0)
            dcp.save(
                mcore_to_pyt_state_dict(described, False), storage_writer=writer, planner=planner
            )


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Leaves out torch's CRC32 of each record, a third to a half of the writer's CPU time.

    torch.load does not compare it, unzip does; a stage's manifest has a SHA-256 of every file.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _SourcePlanner(MCoreSavePlanner):  # type: ignore[misc]
    def __init__(self, source: Source, leading: dict[str, int]) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._source, self._leading = source, leading
        self._weights = _one_ahead(source, [])
        self._at: Where | None = None
        self._weight: Tensor = torch.empty(0)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Begins with the weights, in the order in which they are written."""
        plan: SavePlan = super().finish_plan(new_plan)
        wanted = [where for item in plan.items if (where := self._where(item))]
        self._weights = _one_ahead(self._source, list(dict.fromkeys(wanted)))
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The part of a weight that a shard holds; parts of one weight follow each other."""
        if (wanted := self._where(write_item)) is None:
            return super().resolve_data(write_item)
        if wanted != self._at:
            self._at, self._weight = next(self._weights, (None, self._weight))
            if wanted != self._at:
                raise RuntimeError(f"{wanted} is written where the plan has {self._at}")
        axes, found = self._leading[wanted[0]], write_item.tensor_data
        part = _box(self._weight, found.chunk.offsets[axes:], found.chunk.sizes[axes:])
        return part.reshape(found.chunk.sizes).to(found.properties.dtype)

    def close(self) -> None:
        """Lets go of the thread and of what it made."""
        self._weights.close()

    def _where(self, item: WriteItem) -> Where | None:
        """The weight that it is a part of; ``None`` for what is not in the source."""
        key, found = item.index.fqn, item.tensor_data
        if found is None or key not in self._leading:
            return None
        return key, tuple(found.chunk.offsets[: self._leading[key]])


def _one_ahead(
    source: Source, wanted: Sequence[Where]
) -> Generator[tuple[Where, Tensor], None, None]:
    """Weights in order. A thread reads and merges the next one while one is written."""
    if not wanted:
        return
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(source, *wanted[0])
        for where, following in zip(wanted, [*wanted[1:], None], strict=True):
            made = coming.result()
            if following:
                coming = maker.submit(source, *following)
            yield where, made


def read_weights(folder: Path, leading: dict[str, int]) -> Iterator[tuple[str, Place, Tensor]]:
    """Yields (key, place, weight) of those keys that a checkpoint has."""
    reader = FileSystemReader(folder)
    metadata = read_description(folder)
    shards = _Shards(reader, metadata)
    for key, axes in leading.items():
        if (stored := metadata.state_dict_metadata.get(key)) is None:
            continue
        for place in product(*map(range, stored.size[:axes])):
            yield key, place, _read(shards, key, stored, place)


class _Shards:
    """The tensors of a checkpoint's files."""

    def __init__(self, reader: FileSystemReader, metadata: Metadata) -> None:
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.folder, self._reader = Path(reader.path), reader

    def box(self, item: ReadItem) -> Tensor:
        """The part of a shard that is wanted, read from its first to its last number.

        Each shard is an uncompressed archive of its own, somewhere in its file.
        """
        where = self._reader.storage_data[item.storage_index]
        path = self.folder / where.relative_path
        with path.open("rb") as file, FakeTensorMode():  # gives where the data is, and reads none
            shard = torch.load(self._reader._slice_file(file, where), weights_only=True)
            part = _box(shard, item.storage_offsets, item.lengths)
            first = part.storage_offset()
            count = 1 + sum((n - 1) * s for n, s in zip(part.shape, part.stride(), strict=True))
        begins = where.offset + shard.untyped_storage()._checkpoint_offset
        start, size = begins + first * part.itemsize, count * part.itemsize
        data = torch.from_numpy(np.fromfile(path, np.uint8, size, offset=start)).view(part.dtype)
        return data.as_strided(part.shape, part.stride())


def _read(shards: _Shards, key: str, stored: Any, place: Place) -> Tensor:
    inner = stored.size[len(place) :]
    sizes = torch.Size([1] * len(place) + list(inner))
    wanted = ChunkStorageMetadata(torch.Size([*place, *[0] * len(inner)]), sizes)
    items = create_read_items_for_chunk_list(key, stored, [wanted])
    if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
        raise RecipeError(
            f"{shards.folder} has only a part of {key}.", "the checkpoint is incomplete"
        )
    if len(items) == 1:
        return shards.box(items[0]).reshape(inner)
    tensor = torch.empty(sizes, dtype=stored.properties.dtype)
    for item in items:
        _box(tensor, item.dest_offsets, item.lengths).copy_(shards.box(item))
    return tensor.view(inner)


def _box(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    places = zip(offsets, sizes, strict=True)
    return tensor[tuple(slice(start, start + size) for start, size in places)]
