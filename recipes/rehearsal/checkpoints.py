"""Checkpoints that are not there: what is asked of one is held to its model's shape.

A training's own, which it is taken up from, is held to what was saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    dict_list_map_outplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from nemo_convert import nemo, streaming
from nemo_convert.families import FAMILIES

READ = ShardedBase, LocalNonpersistentObject
HEAD = "output_layer.weight"
"""Is not stored where it is the embedding."""


class CheckpointError(Exception):
    """A weight that the checkpoint has not, or not in this shape."""


@dataclass
class _Saved:
    """What a training saved."""

    metadata: Any
    """How its optimizer's state is split."""
    common: Any
    """What is neither a tensor nor a rank's own."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)

    def beside(self, state: Any) -> Any:
        """What was read, with a copy of what is common: itself would hold on to all of it."""
        return merge(dict_list_map_outplace(lambda item: item, self.common), state)


_saved: dict[Path, _Saved] = {}


def stand_in() -> None:
    """Replaces reading and writing of checkpoints, for good."""
    dist_checkpointing.load = _load
    dist_checkpointing.save = _save
    dist_checkpointing.load_content_metadata = lambda folder, **kwargs: (
        saved.metadata if (saved := _saved.get(Path(folder))) else None
    )
    setattr(streaming, "read_weights", _read_weights)
    setattr(nemo, "read_description", lambda weights: None)
    dist_checkpointing.load_tensors_metadata = _metadata
    dist_checkpointing.load_common_state_dict = lambda *args, **kwargs: {}


def _load(sharded_state_dict: Any, checkpoint_dir: str, *args: object, **kwargs: object) -> Any:
    """The tensors that were asked for, as they are; all of them are in the checkpoint."""
    state = sharded_state_dict
    factories, _ = extract_matching_values(
        state, lambda item: isinstance(item, ShardedTensorFactory), return_lists_as_dicts=True
    )
    apply_factories(state)
    saved = _saved.get(Path(checkpoint_dir))
    if saved:  # as Megatron takes no more from what is asked with
        state, _ = extract_matching_values(state, lambda item: isinstance(item, READ))
    stored = saved.shapes if saved else _stored(Path(checkpoint_dir).parent)
    for item in nested_values(state):
        if isinstance(item, ShardedTensor):
            _require_stored(item, stored)

    def read(item: Any) -> Any:
        if isinstance(item, ShardedTensor):
            if item.data is None:
                item.init_data("cpu")
            return item.data
        if isinstance(item, ShardedObject):
            return saved.objects[item.unique_key] if saved else None
        return item.unwrap() if isinstance(item, LocalNonpersistentObject) else item

    dict_list_map_inplace(read, state)
    return apply_factory_merges(saved.beside(state) if saved else state, factories)


def _stored(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Global shapes in a checkpoint of weights, by key."""
    arch = nemo.architecture_of(checkpoint)
    rows = FAMILIES[arch.hf_architecture].weights
    return {
        f"module.{row.stored}": (*row.counts(arch).values(), *row.shape(arch))
        for row in rows
        if not (arch.tied_embeddings and row.megatron == HEAD)
    }


def _metadata(checkpoint_dir: str, *args: object) -> dict[str, ShardedTensor]:
    """What a checkpoint says of its tensors."""
    checkpoint = Path(checkpoint_dir).parent
    dtype = getattr(torch, nemo.read_config(checkpoint)["torch_dtype"])
    return {
        key: ShardedTensor.from_rank_offsets(key, torch.empty(shape, dtype=dtype, device="meta"))
        for key, shape in _stored(checkpoint).items()
    }


def _read_weights(
    weights: Path, leading: Mapping[str, int]
) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
    """One weight after the other, as ``streaming.read_weights`` gives them."""
    for key, item in _metadata(str(weights)).items():
        axes = leading[key]
        for place in product(*(range(size) for size in item.global_shape[:axes])):
            yield key, place, torch.empty(item.global_shape[axes:], dtype=item.dtype)


def _require_stored(item: ShardedTensor, stored: dict[str, tuple[int, ...]]) -> None:
    if item.key not in stored:
        raise CheckpointError(f"{item.key} is not in a checkpoint of this model")
    wanted, found = tuple(item.global_shape), stored[item.key]
    if item.allow_shape_mismatch:  # a vocabulary, which each layout pads to another length
        wanted, found = wanted[1:], found[1:]
    if wanted != found:
        raise CheckpointError(f"{item.key} is {stored[item.key]} in the checkpoint, not {wanted}")


def _save(
    sharded_state_dict: Any,
    checkpoint_dir: str,
    sharded_strategy: Any = None,
    content_metadata: Any = None,
    **kwargs: Any,
) -> AsyncRequest | None:
    """Checks what would be written; of a training's it keeps what it is taken up with."""
    apply_factories(sharded_state_dict)
    items = [i for i in nested_values(sharded_state_dict) if isinstance(i, ShardedTensor)]
    for item in items:
        item.validate_metadata_integrity()
        if isinstance(sharded_strategy, streaming.StreamedSave):
            _require_source(item, sharded_strategy)
    if not kwargs.get("async_sharded_save"):
        return None
    sharded, common = extract_matching_values(
        sharded_state_dict, lambda item: isinstance(item, ShardedBase)
    )
    kept = _saved[Path(checkpoint_dir)] = _Saved(content_metadata, common)
    kept.shapes = {item.key: tuple(item.global_shape) for item in items}
    objects = (item for item in nested_values(sharded) if isinstance(item, ShardedObject))
    kept.objects = {item.unique_key: item.data for item in objects}
    save_config(CheckpointingConfig("torch_dist"), str(checkpoint_dir))
    return AsyncRequest(None, (), [])


def _require_source(item: ShardedTensor, save: streaming.StreamedSave) -> None:
    """Makes each of the weights that a shard holds, as a conversion would while it writes."""
    axes = save.leading.get(item.key)
    if axes is None:
        return
    sizes = ((1,) * item.prepend_axis_num + tuple(item.local_shape))[:axes]
    first, wanted = item.global_offset[:axes], tuple(item.global_shape[axes:])
    for place in product(*(range(f, f + n) for f, n in zip(first, sizes, strict=True))):
        found = tuple(save.source(item.key, place).shape)
        if found != wanted:
            raise CheckpointError(f"{item.key} at {place} is made {found}, not {wanted}")
