"""Reads the tensors of a torch_dist checkpoint that a rank of a parallel model needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_convert.trust import read_metadata, require_tensors


def read_sharded(state: dict[str, Any], weights: Path) -> dict[str, Any]:
    """Reads the tensors of a sharded state dict from the directory ``weights``.

    As in NeMo's trainer, each data-parallel rank reads a fraction of the tensors, and the ranks
    exchange them. So each tensor is read once from the file system, not once per replica.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
    )

    # A checkpoint stores the tensors that a factory builds, possibly under other keys.
    tensors_by_name = {
        name: item.build() if isinstance(item, ShardedTensorFactory) else item
        for name, item in state.items()
    }
    keys = {item.key for item in nested_values(tensors_by_name)}
    require_tensors(read_metadata(weights), keys, weights)  # Megatron would load harmful pickles
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(weights)),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    tensors: dict[str, Any] = dist_checkpointing.load(state, str(weights), strategy)
    return tensors
