"""FusedAdamW has the updates of PyTorch's AdamW and the state of TransformerEngine's FusedAdam."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from nemo_convert import nemo
from recipes.backend import adamw
from recipes.backend.adamw import FusedAdamW, scale_gradient
from recipes.backend.without_cuda import enable

SETTINGS = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.2, "eps": 1e-3}


def test_updates_equal_adamw_and_continue_from_a_saved_state() -> None:
    torch.manual_seed(0)
    shapes = ((5,), (3, 4), (2,))
    weights = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    copies = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    fused, reference = FusedAdamW(weights, **SETTINGS), AdamW(copies, **SETTINGS)
    for step in range(1, 5):
        # The last weight has no gradient, so it must not change.
        for weight, copy in zip(weights[:-1], copies[:-1], strict=True):
            weight.grad = torch.randn(weight.shape)
            copy.grad = weight.grad.clone()
        fused.step()
        reference.step()
        # Like TransformerEngine, it counts steps per parameter group, not per parameter.
        assert all("step" not in fused.state[weight] for weight in weights)
        assert fused.param_groups[0]["step"] == step
        # A new optimizer continues from the saved state.
        saved_state = fused.state_dict()
        fused = FusedAdamW(weights, **SETTINGS)
        fused.load_state_dict(saved_state)
    for weight, copy in zip(weights, copies, strict=True):
        torch.testing.assert_close(weight, copy, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("block", [2, 1 << 22])  # three blocks and one block for 5 elements
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pending_scales_are_applied_and_the_gradients_freed(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "BLOCK", block)
    torch.manual_seed(2)
    weight, expected = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    weight.grad_dtype = None  # else PyTorch refuses a bfloat16 gradient here
    fused, reference = FusedAdamW([weight], **SETTINGS), AdamW([expected], **SETTINGS)
    for _ in range(3):
        gradient = torch.randn(5).to(dtype)
        expected.grad = gradient.float() * 0.3  # 0.5 * 0.6
        gradient.pending_scale = 1.0  # type: ignore[attr-defined]  # defers scaling
        scale_gradient(gradient, 0.5)
        scale_gradient(gradient, 0.6)
        weight.grad = gradient
        fused.step()
        reference.step()
        assert weight.grad is None
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


def test_coupled_weight_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="decoupled_weight_decay"):
        FusedAdamW([nn.Parameter(torch.ones(1))], adam_w_mode=False)


def test_megatron_uses_fused_adamw() -> None:
    """Without the patch Megatron would use PyTorch's unfused AdamW, which takes 5 times as long."""
    enable()
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    nemo.initialize(nemo.Parallelism())
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), nn.Linear(2, 2))
    chained = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), [wrapped])
    assert type(chained.chained_optimizers[0].optimizer) is FusedAdamW
