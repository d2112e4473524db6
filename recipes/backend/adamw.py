"""AdamW for machines without TransformerEngine, and deferred scaling of gradients.

Megatron scales all gradients twice per step: by 1 / number of tokens, and by the clipping
coefficient. Each scaling reads and writes all gradients. Deferred scaling avoids this memory
traffic. A gradient tensor then has the attribute ``pending_scale``, the product of the factors that
are not applied yet. ``FusedAdamW`` multiplies by this product while it reads the gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import AdamW, adamw

BLOCK = 1 << 22
"""Number of gradient elements that are converted to float32 at a time. A block takes 16 MB."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""PyTorch's names of Adam's moments in the state of a parameter."""


def pending_scale(gradient: Any) -> float | None:
    """Returns the pending factor of a gradient; ``None`` if scaling is not deferred."""
    return getattr(gradient, "pending_scale", None)


def scale_gradient(gradient: Any, factor: float) -> None:
    """Multiplies a gradient in place, or stores the factor if scaling is deferred."""
    pending = pending_scale(gradient)
    if pending is None:
        gradient.mul_(factor)
    else:
        gradient.pending_scale = pending * factor


def clip_by_total_norm(original: object) -> Any:
    """Replaces ``original``, Megatron's clipping, which accepts only float32 tensors on CUDA."""

    def clip_grad_by_total_norm_fp32(
        parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False
    ) -> None:
        # Megatron's formula. If the norm is NaN, the comparison is false: nothing is scaled.
        coefficient = max_norm / (total_norm + 1.0e-6)
        if coefficient < 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    scale_gradient(parameter.grad, coefficient)

    return clip_grad_by_total_norm_fp32


class FusedAdamW(AdamW):
    """PyTorch's fused AdamW kernel with one step count per parameter group.

    PyTorch has a step count per parameter, TransformerEngine's ``FusedAdam`` has one per group.
    Megatron's distributed optimizer can save and load a reshardable state only with one count per
    group. The arguments are those of AdamW.

    Raises:
        ValueError: ``adam_w_mode`` is false; only decoupled weight decay is implemented.
    """

    def __init__(self, params: Any, adam_w_mode: bool = True, **settings: Any) -> None:
        if not adam_w_mode:
            raise ValueError(
                "decoupled_weight_decay=false is not supported by FusedAdamW: set it to true"
            )
        super().__init__(params, **settings)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the state without AdamW's method, which expects a step count per parameter."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates parameters with gradients. Frees gradients whose scaling is deferred."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight].update({name: torch.zeros_like(weight) for name in MOMENTS})
            for weight in weights:
                if pending_scale(weight.grad) is not None:
                    self._update_in_blocks(weight, group)
                    weight.grad = None  # frees the gradient before the next update needs memory
            # One call updates all parameters whose gradients' scaling is not deferred.
            if remaining := [weight for weight in weights if weight.grad is not None]:
                moments = [[self.state[weight][name] for weight in remaining] for name in MOMENTS]
                _run_kernel(remaining, [weight.grad for weight in remaining], moments, group)

    def _update_in_blocks(self, weight: Tensor, group: dict[str, Any]) -> None:
        """Updates a parameter from a gradient with deferred scaling. The gradient may be bfloat16.

        Converts blocks to float32, so there is no float32 copy of the whole gradient. Blocks are
        views, so the kernel writes into the parameter and its moments.
        """
        assert weight.grad is not None
        scale = pending_scale(weight.grad)
        # The kernel divides the gradient by this number. For scale 0, division by infinity gives 0.
        inverse_scale = torch.tensor(1 / scale if scale else math.inf)
        tensors = (weight, weight.grad, *(self.state[weight][name] for name in MOMENTS))
        blocks_of_tensors = [tensor.view(-1).split(BLOCK) for tensor in tensors]
        for block, gradient, *moments in zip(*blocks_of_tensors):
            moment_lists = [[moment] for moment in moments]
            _run_kernel([block], [gradient.float()], moment_lists, group, inverse_scale)


def _run_kernel(
    weights: list[Tensor],
    gradients: list[Any],
    moments: list[list[Tensor]],
    group: dict[str, Any],
    inverse_scale: Tensor | None = None,
) -> None:
    """Runs PyTorch's fused kernel, which writes into ``weights`` and ``moments``.

    Args:
        weights: Parameters, or blocks of them.
        gradients: The gradient of each weight.
        moments: One list for each name in ``MOMENTS``, with a tensor for each weight.
        group: The parameter group, with the hyperparameters and the step count.
        inverse_scale: Number by which gradients are divided; ``None`` for 1.
    """
    # The kernel increments the count of previous steps in place, so each call gets new tensors.
    previous_steps, device = group["step"] - 1.0, weights[0].device
    adamw(
        weights,
        gradients,
        *moments,
        [],  # state of amsgrad, which is off
        list(torch.full((len(weights),), previous_steps, device=device).unbind()),
        fused=True,
        grad_scale=inverse_scale,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
