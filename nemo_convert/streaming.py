"""Torch_dist checkpoints one weight at a time, however large the model.

Megatron-Core writes and reads whole state dicts. Its plan of a checkpoint (keys, shards, metadata)
is kept here; only where a shard's bytes come from or go to is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from recipes.errors import RecipeError

Place = tuple[int, ...]
"""Where on a key's leading axes (layer, expert) a weight is."""
Source = Callable[[str, Place], Tensor]
"""Gives the weight of a key at a place."""


class StreamedSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's strategy for one rank, with weights from a source rather than from the model.

    Args:
        source: Called while a shard is being written; the model's own memory is never touched.
        leading: Number of leading axes of each key.
    """

    def __init__(self, source: Source, leading: dict[str, int]) -> None:
        super().__init__("torch_dist", 1)
        self._source, self._leading = source, leading

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        """Writes the shards that the state dict describes."""
        described, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp.save(
            mcore_to_pyt_state_dict(described, False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=_SourcePlanner(self._source, self._leading),
        )


class _SourcePlanner(MCoreSavePlanner):  # type: ignore[misc]
    def __init__(self, source: Source, leading: dict[str, int]) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._source, self._leading = source, leading
        self._place: Any = None
        self._weight: Tensor = torch.empty(0)

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The part of a weight that a shard holds; parts of one weight follow each other."""
        key, found = write_item.index.fqn, write_item.tensor_data
        if found is None or key not in self._leading:
            return super().resolve_data(write_item)
        axes, chunk = self._leading[key], found.chunk
        if (place := (key, tuple(chunk.offsets[:axes]))) != self._place:
            self._weight, self._place = self._source(*place), place
        inner = zip(chunk.offsets[axes:], chunk.sizes[axes:], strict=True)
        part = self._weight[tuple(slice(start, start + size) for start, size in inner)]
        return part.reshape(chunk.sizes).to(found.properties.dtype)


def read_weights(folder: Path, leading: dict[str, int]) -> Iterator[tuple[str, Place, Tensor]]:
    """Yields (key, place, weight) of those keys that a checkpoint has."""
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    for key, axes in leading.items():
        if (stored := metadata.state_dict_metadata.get(key)) is None:
            continue
        for place in product(*map(range, stored.size[:axes])):
            yield key, place, _read(reader, key, stored, place)


class _Part(DefaultLoadPlanner):  # type: ignore[misc]
    """Reads into one tensor whatever the plan says."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def lookup_tensor(self, index: Any) -> Tensor:
        """The tensor to read into."""
        return self._tensor


def _read(reader: FileSystemReader, key: str, stored: Any, place: Place) -> Tensor:
    inner = stored.size[len(place) :]
    sizes = torch.Size([1] * len(place) + list(inner))
    wanted = ChunkStorageMetadata(torch.Size([*place, *[0] * len(inner)]), sizes)
    items = create_read_items_for_chunk_list(key, stored, [wanted])
    if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
        raise RecipeError(
            f"{reader.path} has only a part of {key}.", "the checkpoint is incomplete"
        )
    tensor = torch.empty(sizes, dtype=stored.properties.dtype)
    reader.read_data(LoadPlan(items), _Part(tensor)).wait()
    return tensor.view(inner)
