"""The faults of Megatron-Core that ``megatron_faults`` mends do not occur."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nemo_convert import nemo
from recipes.backend.cpu_speed import speed_patches
from recipes.backend.megatron_faults import _wait_for_gradients, mend
from recipes.backend.without_cuda import enable


@pytest.mark.parametrize("speed_set", [[], ["shared_optimizer_state"]])
def test_a_checkpoint_has_the_state_of_each_parameter(speed_set: list[str]) -> None:
    """The gradient buffer has several buckets with padding at their ends."""
    enable()
    mend()
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    nemo.initialize(nemo.Parallelism())
    torch.manual_seed(1)
    layers = (nn.Linear(10, 33, bias=False, dtype=torch.bfloat16) for _ in range(4))
    model = nn.Sequential(*layers)
    settings = {"use_distributed_optimizer": True, "overlap_param_gather": True}
    ddp = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        DistributedDataParallelConfig(bucket_size=300, overlap_grad_reduce=True, **settings),
        model,
    )
    buckets = ddp.buffers[0].buckets
    assert len(buckets) > 1
    assert all(bucket.grad_data.numel() > bucket.numel_unpadded for bucket in buckets)
    optimizer_config = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, **settings
    )
    optimizer = get_megatron_optimizer(optimizer_config, [ddp])
    for weight in model.parameters():
        weight.main_grad.normal_()
    optimizer.step()
    weights = dict(model.named_parameters())
    model_state = {
        name: ShardedTensor.from_rank_offsets(name, weight) for name, weight in weights.items()
    }
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }
    with speed_patches(speed_set):
        state = optimizer.sharded_state_dict(model_state, metadata=metadata)
    [adam] = optimizer.chained_optimizers
    stored = {
        item["param"].key.rpartition("param.")[2]: item for item in state["param_state"].values()
    }
    assert stored.keys() == weights.keys()
    for name, item in stored.items():
        expected = adam._get_main_param_and_optimizer_states(weights[name])
        for key in ("param", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                item[key].data.flatten(), expected[key].flatten(), rtol=0, atol=0
            )


@pytest.mark.parametrize(("instances", "calls"), [(1, ["reduce"]), (2, ["wait", "reduce"])])
def test_a_reduction_waits_for_the_stream_of_the_gradients(
    instances: int, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: made.append("wait"))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    config = SimpleNamespace(num_distributed_optimizer_instances=instances)
    group = SimpleNamespace(ddp_config=config)
    _wait_for_gradients(lambda group: made.append("reduce"), group)
    assert made == calls


def test_weights_are_copied_to_pageable_memory() -> None:
    mend()
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    copies: list[Any] = []
    weight = SimpleNamespace(to=lambda device, non_blocking: copies.append((device, non_blocking)))
    writer = object.__new__(FileSystemWriterAsync)
    writer.preload_tensors([("file", "key", ([], [("item", weight)]))], True)
    assert copies == [("cpu", False)]
