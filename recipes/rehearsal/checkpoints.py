"""Replaces reading and writing of NeMo checkpoints by checks of the tensors' keys and shapes.

The tensors of a rehearsal are fake: they have no values. The shapes in a model's checkpoint follow
from the architecture. The state in a training run's checkpoint is kept in memory, for resuming.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
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
from torch.distributed.checkpoint.metadata import Metadata

from nemo_convert import nemo, streaming
from nemo_convert.families import FAMILIES
from recipes.backend.patches import Patch, apply, constant, patches, replace_with

Shape = tuple[int, ...]
OUTPUT_WEIGHT = "output_layer.weight"
"""Key of the output head. A head that is tied to the embedding is not stored."""


class CheckpointError(Exception):
    """A tensor is not in the checkpoint, or has another shape there."""


@dataclass(frozen=True)
class _SavedRun:
    """The checkpoint of a training run, without values of its tensors."""

    metadata: Any
    """Sharding of the optimizer's state."""
    common: Any
    """State that is the same on all ranks."""
    shapes: Mapping[str, Shape]
    """Global shapes of the tensors, by key."""
    objects: Mapping[str, Any]
    """Values of the ``ShardedObject`` items, by unique key."""


_saved_runs: dict[Path, _SavedRun] = {}
"""Checkpoints that training runs of this process have saved, by folder."""


def install() -> None:
    """Replaces reading and writing of checkpoints for the rest of the process."""
    apply(PATCHES)


def _load_content_metadata(folder: str, **kwargs: object) -> Any:
    """Returns a training run's metadata; ``None`` for a model's checkpoint."""
    saved = _saved_runs.get(Path(folder))
    return saved.metadata if saved else None


def _load(sharded_state_dict: Any, checkpoint_dir: str, *args: object, **kwargs: object) -> Any:
    """Fills a state dict with fake tensors, after comparing the shapes with the checkpoint."""
    state = sharded_state_dict
    # As in Megatron, a factory splits a tensor before loading, and merges the shards afterwards.
    factories, _ = extract_matching_values(
        state, lambda item: isinstance(item, ShardedTensorFactory), return_lists_as_dicts=True
    )
    apply_factories(state)
    saved = _saved_runs.get(Path(checkpoint_dir))
    if saved:
        # As in Megatron, only items of these types are loaded. All others are in the common state.
        types = ShardedBase, LocalNonpersistentObject
        state, _ = extract_matching_values(state, lambda item: isinstance(item, types))
    stored = saved.shapes if saved else _stored_shapes(Path(checkpoint_dir).parent)

    def load_item(item: Any) -> Any:
        if isinstance(item, ShardedTensor):
            _require_stored(item, stored)
            if item.data is None:
                item.init_data("cpu")
            return item.data
        if isinstance(item, ShardedObject):
            return saved.objects[item.unique_key] if saved else None
        return item.unwrap() if isinstance(item, LocalNonpersistentObject) else item

    dict_list_map_inplace(load_item, state)
    if saved:
        # ``merge`` writes into its first argument, so the saved state is copied.
        state = merge(dict_list_map_outplace(lambda item: item, saved.common), state)
    return apply_factory_merges(state, factories)


def _stored_shapes(checkpoint: Path) -> dict[str, Shape]:
    """Returns the global shapes of the weights in a model's checkpoint, by key."""
    arch = nemo.architecture_of(checkpoint)
    return {  # the weights of all layers and experts are stacked under one key
        weight.checkpoint_key: (*weight.stack_sizes(arch).values(), *weight.shape(arch))
        for weight in FAMILIES[arch.hf_architecture].weights
        if not (arch.tied_embeddings and weight.megatron == OUTPUT_WEIGHT)
    }


def _load_tensors_metadata(checkpoint_dir: str, *args: object) -> dict[str, ShardedTensor]:
    """Returns the tensors of a model's checkpoint by key. They have shapes but no storage."""
    checkpoint = Path(checkpoint_dir).parent
    dtype = getattr(torch, nemo.read_config(checkpoint)["torch_dtype"])
    return {
        key: ShardedTensor.from_rank_offsets(key, torch.empty(shape, dtype=dtype, device="meta"))
        for key, shape in _stored_shapes(checkpoint).items()
    }


def _read_weights(
    weights: Path, stack_axes: Mapping[str, int]
) -> Iterator[tuple[str, Shape, torch.Tensor]]:
    """Yields (key, index in the stack under this key, weight without values).

    Args:
        weights: Folder of the weights in a model's checkpoint.
        stack_axes: Number of axes (layer, expert) by which the weights under each key are stacked.
    """
    for key, stack in _load_tensors_metadata(str(weights)).items():
        axes = stack_axes[key]
        for index in product(*map(range, stack.global_shape[:axes])):
            yield key, index, torch.empty(stack.global_shape[axes:], dtype=stack.dtype)


def _require_stored(item: ShardedTensor, stored: Mapping[str, Shape]) -> None:
    """Raises ``CheckpointError`` unless the tensor's key and global shape are stored."""
    if item.key not in stored:
        raise CheckpointError(f"{item.key} is not in a checkpoint of this model")
    # Axis 0 of a tensor with ``allow_shape_mismatch`` is the padded vocabulary. Its size depends on
    # the tensor-parallel size, so Megatron allows another size of this axis.
    first_axis = 1 if item.allow_shape_mismatch else 0
    shape, stored_shape = tuple(item.global_shape), stored[item.key]
    if shape[first_axis:] != stored_shape[first_axis:]:
        raise CheckpointError(
            f"{item.key} is {stored_shape} in the checkpoint, but must be {shape}"
        )


def _save(
    sharded_state_dict: Any,
    checkpoint_dir: str,
    sharded_strategy: Any = None,
    content_metadata: Any = None,
    **kwargs: Any,
) -> AsyncRequest | None:
    """Checks the tensors to save. Keeps the state of a training run, so that the run can resume.

    Returns a request without work for an asynchronous save; ``None`` for a synchronous save.
    """
    apply_factories(sharded_state_dict)
    items = nested_values(sharded_state_dict)
    tensors = [item for item in items if isinstance(item, ShardedTensor)]
    for tensor in tensors:
        tensor.validate_metadata_integrity()
        if isinstance(sharded_strategy, streaming.StreamedSave):
            _require_converted_shapes(tensor, sharded_strategy)
    if not kwargs.get("async_sharded_save"):  # only training saves asynchronously
        return None
    sharded, common = extract_matching_values(
        sharded_state_dict, lambda item: isinstance(item, ShardedBase)
    )
    objects = (item for item in nested_values(sharded) if isinstance(item, ShardedObject))
    _saved_runs[Path(checkpoint_dir)] = _SavedRun(
        content_metadata,
        common,
        shapes={tensor.key: tuple(tensor.global_shape) for tensor in tensors},
        objects={item.unique_key: item.data for item in objects},
    )
    # Writes ``metadata.json``, by which Megatron recognizes a checkpoint.
    save_config(CheckpointingConfig("torch_dist"), str(checkpoint_dir))
    return AsyncRequest(None, (), [])


def _require_converted_shapes(item: ShardedTensor, save: streaming.StreamedSave) -> None:
    """Checks that each weight in a shard has, after conversion, the shape that its key requires."""
    axes = save.leading_axes.get(item.key)  # number of axes that stack layers and experts
    if axes is None:  # weights under this key do not come from a conversion
        return
    # The prepended axes, in which a shard has size 1, are missing in ``local_shape``.
    sizes = ((1,) * item.prepend_axis_num + tuple(item.local_shape))[:axes]
    starts, expected = item.global_offset[:axes], tuple(item.global_shape[axes:])
    ranges = (range(start, start + size) for start, size in zip(starts, sizes, strict=True))
    for index in product(*ranges):
        shape = tuple(save.source(item.key, index).shape)
        if shape != expected:
            raise CheckpointError(
                f"{item.key} at {index} is {shape} after conversion, but must be {expected}"
            )


NO_VALUES, NO_FILES = "tensors have no values", "nothing was written to the disk"
PATCHES = (
    *patches(
        "megatron.core.dist_checkpointing:",
        ("load", NO_VALUES, "05ca3c94389b", replace_with(_load)),
        ("save", NO_VALUES, "977482f07f35", replace_with(_save)),
        ("load_content_metadata", NO_FILES, "06ea7b873631", replace_with(_load_content_metadata)),
        ("load_tensors_metadata", NO_FILES, "3f26dd3969d3", replace_with(_load_tensors_metadata)),
        ("load_common_state_dict", NO_FILES, "6b40653e2673", constant({})),
    ),
    Patch("nemo_convert.streaming:read_weights", NO_VALUES, "", replace_with(_read_weights)),
    Patch("nemo_convert.sharded:read_metadata", NO_FILES, "", constant(Metadata({}))),
    Patch("nemo_convert.convert:different_shapes", NO_FILES, "", constant([])),
)
