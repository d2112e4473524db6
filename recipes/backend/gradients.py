"""Gradients whose scaling is deferred to the optimizer.

Megatron multiplies all gradients by a factor twice per step: by one over the number of tokens, and
to clip them. Each is a pass over memory. A gradient with the attribute ``pending_scale`` notes the
factor instead, and ``FusedAdamW`` applies it while it reads the gradient.
"""

from __future__ import annotations

from typing import Any


def pending_scale(gradient: Any) -> float | None:
    """Returns the factor that a gradient still lacks; ``None`` where nothing is deferred."""
    return getattr(gradient, "pending_scale", None)


def scale_gradient(gradient: Any, factor: float) -> None:
    """Multiplies a gradient in place, or notes the factor where scaling is deferred."""
    pending = pending_scale(gradient)
    if pending is None:
        gradient.mul_(factor)
    else:
        gradient.pending_scale = pending * factor


def clip_by_total_norm(original: object) -> Any:
    """Replaces Megatron's clipping, which accepts ``torch.cuda.FloatTensor`` only."""

    def clip_grad_by_total_norm_fp32(
        parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False
    ) -> None:
        coefficient = max_norm / (total_norm + 1.0e-6)  # as in Megatron; false for NaN below
        if coefficient < 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    scale_gradient(parameter.grad, coefficient)

    return clip_grad_by_total_norm_fp32
