"""Distillation losses on vocabulary-parallel logits.

Megatron's own KL (ModelOpt's ``LogitsKLLoss``) lacks the T² factor and holds several float32 copies
of the whole batch's logits. This one computes value and gradient together, a few tokens at a time,
so that no full-vocabulary float32 tensor of a batch ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce
from torch.nn.modules.loss import _Loss

CHUNK_TOKENS = 64
"""Tokens at a time: 64 rows of a 49k vocabulary in float32 are 12 MB, about what a cache holds."""


def _log_softmax(logits: Tensor, group: ProcessGroup | None) -> Tensor:
    """Log-probabilities [n, vocabulary/tp] of float32 logits; a group holds the other columns."""
    if group is None:
        return torch.log_softmax(logits, dim=-1)
    peak = logits.amax(dim=-1, keepdim=True)
    all_reduce(peak, ReduceOp.MAX, group)
    shifted = logits - peak
    total = shifted.exp().sum(dim=-1, keepdim=True)
    all_reduce(total, group=group)
    return shifted - total.log()


class _ForwardKL(torch.autograd.Function):
    """T²·KL(teacher ‖ student) per token, with the gradient computed in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, group: ProcessGroup | None
    ) -> Tensor:
        losses = torch.empty(len(student), dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(student) if student.requires_grad else None
        for start in range(0, len(student), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            log_q = _log_softmax(student[rows].float() / temperature, group)
            log_p = _log_softmax(teacher[rows].float() / temperature, group)
            p = log_p.exp()
            losses[rows] = (p * log_p.sub_(log_q)).sum(dim=-1)
            if gradient is not None:
                # d/dlogits of T²·KL is T·(q − p).
                gradient[rows] = log_q.exp_().sub_(p).mul_(temperature)
        if group is not None:
            all_reduce(losses, group=group)
        ctx.save_for_backward(gradient)
        return losses.mul_(temperature**2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0].unsqueeze(-1).to(gradient.dtype)), None, None, None


class LogitsKL(_Loss):
    """Forward KL on logits, in the form that ModelOpt's ``DistillationModel`` calls.

    Args:
        temperature: Softens both distributions; the loss is scaled by its square (Hinton et al.,
            arXiv:1503.02531), so its gradient does not shrink with it.
        group: Tensor-parallel group, or ``None`` for whole vocabularies.
    """

    def __init__(self, temperature: float = 1.0, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self._temperature, self._group = temperature, group

    def forward(
        self, student: Tensor | tuple[Tensor, ...], teacher: Tensor | tuple[Tensor, ...]
    ) -> Tensor:
        """Per-token loss [batch, sequence] of logits [sequence, batch, vocabulary/tp].

        Megatron's output layer returns (logits, bias).
        """
        student_logits = student[0] if isinstance(student, tuple) else student
        teacher_logits = teacher[0] if isinstance(teacher, tuple) else teacher
        length, batch, vocabulary = student_logits.shape
        losses = _ForwardKL.apply(
            student_logits.reshape(-1, vocabulary),
            teacher_logits.detach().reshape(-1, vocabulary),
            self._temperature,
            self._group,
        )
        return losses.view(length, batch).t()


@torch.no_grad()
def cross_entropy(logits: Tensor, labels: Tensor, group: ProcessGroup | None) -> Tensor:
    """Mean loss of logits [sequence, batch, vocabulary/tp] for labels [batch, sequence]."""
    flat, targets = logits.reshape(-1, logits.shape[-1]), labels.t().reshape(-1)
    first = 0 if group is None else group.rank() * flat.shape[-1]
    total = torch.zeros((), device=flat.device)
    for start in range(0, len(flat), CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        log_p = _log_softmax(flat[rows].float(), group)
        local = targets[rows] - first
        mine = (local >= 0) & (local < flat.shape[-1])
        picked = log_p.gather(1, local.clamp(0, flat.shape[-1] - 1).unsqueeze(1)).squeeze(1)
        total -= (picked * mine).sum()
    if group is not None:
        all_reduce(total, group=group)
    return total / len(flat)
