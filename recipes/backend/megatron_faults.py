"""Mends faults of Megatron-Core 0.15.3 in training, which later versions do not have."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from recipes.backend.patches import Patch, apply, wrap


@cache
def mend() -> None:
    """Applies ``MENDED`` once. Raises ``RecipeError`` if Megatron is not the expected version."""
    apply(MENDED)


def _without_padding(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Removes padding from ``param_index_map`` while a checkpoint gets the optimizer's state.

    Megatron gathers the state of all buckets without the padding at their ends, but this map has
    the range of each parameter with padding. So every parameter after a padded bucket would be
    stored with another parameter's state.
    """
    maps = [buffer.param_index_map for buffer in self.buffers]
    for buffer in self.buffers:
        padding_before, padding = [], 0  # elements of padding in earlier buckets: list, running sum
        for bucket in buffer.buckets:
            padding_before.append(padding)
            padding += bucket.grad_data.numel() - bucket.numel_unpadded
        buffer.param_index_map = {
            weight: (start - padding_before[bucket], end - padding_before[bucket], bucket)
            for weight, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        return original(self, *args, **kwargs)
    finally:
        for buffer, index_map in zip(self.buffers, maps, strict=True):
            buffer.param_index_map = index_map


def _wait_for_gradients(original: Callable[..., Any], self: Any) -> None:
    """Starts the reduction of gradients only after the hooks that add gradients have run.

    NeMo wraps the model on a side stream, so the hooks run on this stream. With several instances
    of the optimizer, Megatron's communication stream waits only for the default stream.
    """
    if self.ddp_config.num_distributed_optimizer_instances > 1:
        torch.cuda.default_stream().wait_stream(torch.cuda.current_stream())
    original(self)


def _copy_to_pageable_memory(original: Callable[..., Any], buckets: Any, *_: Any) -> Any:
    """Copies weights to pageable memory before a forked process writes the weights to disk.

    Megatron copies weights to pinned memory without keeping a reference. PyTorch then reuses this
    memory, which the forked process shares, before the weights are written.
    """
    return original(buckets, non_blocking=False)


MENDED = (
    Patch(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_param_state_fully_reshardable",
        "checkpoints have shifted optimizer states (NVIDIA/Megatron-LM pull request 5077)",
        "e888c7cccb71",
        wrap(_without_padding),
    ),
    Patch(
        "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync",
        "gradients are reduced before they are complete (NVIDIA/Megatron-LM pull request 3693)",
        "87b697030080",
        wrap(_wait_for_gradients),
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.preload_tensors",
        "weights change while they are written (NVIDIA/Megatron-LM pull request 2288)",
        "df5b267188bb",
        lambda original: staticmethod(wrap(_copy_to_pageable_memory)(original)),
    ),
)
