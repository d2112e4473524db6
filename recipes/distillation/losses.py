"""Distillation losses on vocabulary-parallel logits: forward KL, reverse KL and JSD.

A loss is over the whole vocabulary, or over the teacher's top-k tokens and the tail, which is all
other tokens. The tail counts as one outcome, or a few samples represent it. Values and gradients
are computed together, a chunk of tokens at a time, so no float32 tensor of a whole batch's logits
exists. ModelOpt's losses (``modelopt/torch/distill/plugins/megatron.py``) differ in three points:
they hold several such tensors, they lack the factor T², and they ignore the tail's probability,
since they renormalise the top-k.

The module ``vocabulary`` explains shapes and ``group``.

Gradients: let z be the student's logits, T the temperature and q = softmax(z / T). From
∂q_i / ∂(z_j / T) = q_i·(δ_ij - q_j), a loss f(q) with the partial derivatives g_i = ∂f / ∂q_i has

    ∂f / ∂(z_j / T) = q_j·(g_j - Σ_i q_i·g_i),                                               (1)

where a constant added to all g_i cancels. Comments in each divergence below state g, without index,
and the gradient (1). The loss is T²·f, so that gradients have about the same size at any T (Hinton
et al., arXiv:1503.02531). The inner derivative of z / T is 1 / T, so ∂(T²·f) / ∂z_j is (1) times T.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup
from torch.nn.functional import softplus

from recipes.core.compiled import compilable
from recipes.core.errors import RecipeError
from recipes.distillation.settings import TAIL_DRAWS_LOSS
from recipes.distillation.vocabulary import (
    LOG_ZERO,
    TopK,
    chunks,
    local_columns,
    log_softmax,
    select,
    split,
    sum_columns,
    top_k,
)


@dataclass(frozen=True)
class LogitsLoss:
    """Settings of the KD loss: a divergence of student q from teacher p per token, times T²."""

    divergence: str = "forward_kl"
    """One of ``LOGITS_LOSSES``."""
    temperature: float = 1.0
    """T, which divides the logits of both models."""
    beta: float = 0.5
    """For ``jsd``: the teacher's weight in m = beta·p + (1 - beta)·q. The loss is
    beta·KL(p ‖ m) + (1 - beta)·KL(q ‖ m), the generalised JSD of GKD (Agarwal et al.,
    arXiv:2306.13649)."""
    top_k: int | None = None
    """Number of the teacher's likeliest tokens that stay separate outcomes. All other tokens become
    one outcome. ``None`` keeps all tokens separate."""


Divergence = tuple[Tensor, Callable[[], Tensor]]
"""A divergence f [n, 1] without T², and a function that returns the gradient (1) [n, outcomes]. The
function overwrites tensors that it needs, so it can be called only once."""


def _forward_kl(
    log_p: Tensor, log_q: Tensor, loss: LogitsLoss, group: ProcessGroup | None
) -> Divergence:
    # f = Σ p·(log p - log q), g = -p / q, Σ q·g = -1: the gradient is q - p.
    p = log_p.exp()
    value = sum_columns(log_p.sub_(log_q).mul_(p), group)
    return value, lambda: log_q.exp_().sub_(p)


def _reverse_kl(
    log_p: Tensor, log_q: Tensor, loss: LogitsLoss, group: ProcessGroup | None
) -> Divergence:
    # f = Σ q·(log q - log p), g = log(q / p) + 1, Σ q·g = f + 1: the gradient is
    # q·(log(q / p) - f).
    q = log_q.exp()
    log_ratio = log_q.sub_(log_p)
    value = sum_columns(q * log_ratio, group)
    return value, lambda: log_ratio.sub_(value).mul_(q)


def _jsd(log_p: Tensor, log_q: Tensor, loss: LogitsLoss, group: ProcessGroup | None) -> Divergence:
    # f = β·Σ p·log(p / m) + (1 - β)·Σ q·log(q / m) with m = β·p + (1 - β)·q. The derivatives by m
    # add -(1 - β)·(β·p + (1 - β)·q) / m to g, which is a constant and cancels. What remains is
    # g = (1 - β)·log(q / m), up to a constant. The gradient is (1 - β)·q·(log(q / m) - KL(q ‖ m)).
    q, p = log_q.exp(), log_p.exp()
    log_ratio = log_p.sub_(log_q)
    # log(m / q) = log(β·p/q + 1 - β) = softplus(log(p/q) + logit β) + log(1 - β), where
    # logit β = log(β / (1 - β)). This form neither overflows nor cancels.
    log_1_beta = math.log1p(-loss.beta)
    log_m_q = softplus(log_ratio + (math.log(loss.beta) - log_1_beta)).add_(log_1_beta)
    student_kl = -sum_columns(q * log_m_q, group)  # KL(q ‖ m)
    teacher_kl = sum_columns(log_ratio.sub_(log_m_q).mul_(p), group)  # KL(p ‖ m)
    value = loss.beta * teacher_kl + (1 - loss.beta) * student_kl
    # log(q / m) is -log_m_q, so the signs of both factors are swapped.
    return value, lambda: log_m_q.add_(student_kl).mul_(q).mul_(loss.beta - 1)


DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}
"""The function of each of ``LOGITS_LOSSES``; all may overwrite the log-probabilities."""


def _top_k_divergence(
    teacher: TopK, log_q: Tensor, loss: LogitsLoss, group: ProcessGroup | None
) -> Divergence:
    """Computes the divergence over the teacher's top-k and the tail as k + 1 outcomes.

    The gradient is that of all logits [n, vocabulary/tp]. The logit of the tail's outcome is
    u = log Σ_tail exp(z / T), so ∂u / ∂(z_j / T) = q_j / q_tail: a token of the tail gets
    q_j / q_tail of the outcome's gradient.
    """
    student = split(log_q, teacher.indices, group)
    log_probs = student.log_probs.clamp(min=LOG_ZERO)
    log_tail = log_probs[:, -1:].clone()  # the divergence overwrites ``log_probs``
    # Every rank has all k + 1 outcomes, so sums over them need no communication.
    teacher_log_probs = teacher.log_probs.clamp(min=LOG_ZERO)
    divergence = DIVERGENCES[loss.divergence]
    value, outcome_gradient = divergence(teacher_log_probs, log_probs, loss, None)

    def gradient() -> Tensor:
        outcomes = outcome_gradient()
        # q_j / q_tail times the tail's gradient; 0 for top-k tokens, as their ``tail`` is log 0.
        all_tokens = student.tail.sub_(log_tail).exp_().mul_(outcomes[:, -1:])
        return all_tokens.scatter_add_(1, student.columns, outcomes[:, :-1] * student.is_local)

    return value, gradient


def _sampled_forward_kl(
    teacher: TopK, draws: Tensor, tail_entropy: Tensor, log_q: Tensor, group: ProcessGroup | None
) -> Divergence:
    """Computes the forward KL from a teacher whose tail is represented by samples.

    p is replaced by an estimate p̂, which is exact for the top-k and gives each sample an equal
    fraction of the tail's mass. E[p̂] = p. The cross-entropy -Σ p̂·log q and its gradient q - p̂ are
    linear in p̂, so they are unbiased. The entropy of p is stored, not estimated. Sparse Logit
    Sampling (arXiv:2503.16870) samples all tokens; with an exact top-k the variance is lower.
    """
    log_p, log_tail = teacher.log_probs.clamp(min=LOG_ZERO).split(
        [teacher.indices.shape[1], 1], dim=1
    )
    count = draws.shape[1]
    p = torch.cat([log_p.exp(), (log_tail.exp() / count).expand(-1, count)], dim=1)  # p̂
    tokens = torch.cat([teacher.indices, draws], 1)
    columns, is_local = local_columns(tokens, log_q.shape[-1], group)
    cross = (p * select(log_q, columns, is_local, group)).sum(dim=-1, keepdim=True)  # Σ p̂·log q
    entropy = tail_entropy - (log_p.exp() * log_p).sum(dim=-1, keepdim=True)  # -Σ p·log p
    return -entropy - cross, lambda: log_q.exp_().scatter_add_(1, columns, -p * is_local)


class LossTargets(NamedTuple):
    """Targets and weights of the loss for n rows of the student's logits."""

    teacher: Tensor | TopK
    """The teacher's logits [n, vocabulary/tp], or its top-k at the loss's temperature."""
    labels: Tensor | None = None
    """Ids [n] of the next tokens; ``None`` omits the LM loss."""
    weights: tuple[float, float] = (1.0, 0.0)
    """Weight of the KD loss, and weight of the LM (next-token) loss."""

    def at(self, rows: slice) -> LossTargets:
        """Returns the targets of some rows."""
        take = operator.itemgetter(rows)
        teacher = self.teacher
        return self._replace(
            teacher=teacher.map(take) if isinstance(teacher, TopK) else take(teacher),
            labels=None if self.labels is None else take(self.labels),
        )


def _lm_loss(
    log_q: Tensor, labels: Tensor, needs_gradient: bool, group: ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """Computes -log q of the labels [n, 1], and the gradient: q - 1 at the label, q elsewhere."""
    columns, is_local = local_columns(labels.unsqueeze(1), log_q.shape[-1], group)
    value = -select(log_q, columns, is_local, group)
    if not needs_gradient:
        return value, None
    return value, log_q.exp().scatter_add_(1, columns, -is_local.to(log_q))


def _compute_chunk(
    losses: Tensor,
    student: Tensor,
    targets: LossTargets,
    loss: LogitsLoss,
    group: ProcessGroup | None,
    needs_gradient: bool,
) -> None:
    """Writes a chunk's KD and LM losses to ``losses`` [2, n, 1], and the gradient to ``student``.

    This is a separate function, so that a chunk's buffers are freed before the next chunk.
    """
    # A compiled kernel cannot include collectives.
    chunk_losses = _compiled_chunk_losses if group is None else _chunk_losses
    kd_loss, lm_loss = chunk_losses(student, targets, loss, group, needs_gradient)
    losses[0] = kd_loss
    if lm_loss is not None:
        losses[1] = lm_loss


def _chunk_losses(
    student: Tensor,
    targets: LossTargets,
    loss: LogitsLoss,
    group: ProcessGroup | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Computes KD losses [n, 1] without T², and LM losses [n, 1].

    Overwrites ``student`` with the gradient of the weighted sum. The gradient is not written to
    another argument, because the compiler would have to check whether the two share memory.
    """
    teacher, temperature = targets.teacher, loss.temperature
    lm_loss = lm_gradient = None
    log_q = log_softmax(student, temperature, group)
    if targets.labels is not None:
        # The LM loss uses temperature 1.
        unscaled = log_q if temperature == 1 else log_softmax(student, 1.0, group)
        lm_loss, lm_gradient = _lm_loss(unscaled, targets.labels, needs_gradient, group)
        del unscaled
    if not isinstance(teacher, TopK) and loss.top_k is not None:
        teacher = top_k(teacher, loss.top_k, temperature, group)
    if isinstance(teacher, TopK):
        if teacher.draws is None or teacher.tail_entropy is None:
            kd_loss, kd_gradient = _top_k_divergence(teacher, log_q, loss, group)
        else:
            samples = teacher.draws, teacher.tail_entropy
            kd_loss, kd_gradient = _sampled_forward_kl(teacher, *samples, log_q, group)
    else:
        log_p = log_softmax(teacher, temperature, group)
        kd_loss, kd_gradient = DIVERGENCES[loss.divergence](log_p, log_q, loss, group)
    if not needs_gradient:
        return kd_loss, lm_loss
    kd_weight, lm_weight = targets.weights
    scale = temperature * kd_weight  # T² of the loss, 1/T of the inner derivative
    gradient = kd_gradient() if scale == 1 else kd_gradient().mul_(scale)
    if lm_gradient is not None:
        gradient.add_(lm_gradient, alpha=lm_weight)
    student.copy_(gradient)
    return kd_loss, lm_loss


_compiled_chunk_losses = compilable(_chunk_losses)


@compilable
def _scale_rows(gradient: Tensor, weights: Tensor) -> Tensor:
    """Multiplies each row of a gradient [n, vocabulary/tp] by its weight [n, 1], in place.

    On a CPU, PyTorch's eager bfloat16 multiplication is four times slower than memory bandwidth
    allows, so this is compiled.
    """
    return gradient.mul_(weights.to(gradient.dtype))


class _Distillation(torch.autograd.Function):
    """Losses per token. The forward pass also computes the gradient of their weighted sum."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx,
        student: Tensor,
        targets: LossTargets,
        loss: LogitsLoss,
        group: ProcessGroup | None,
        reuse_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        losses = torch.zeros(2, len(student), 1, dtype=torch.float32, device=student.device)
        needs_gradient = ctx.needs_input_grad[0]
        must_copy = needs_gradient and not reuse_logits
        logits = student.detach().clone() if must_copy else student.detach()
        for rows in chunks(logits):
            chunk = losses[:, rows], logits[rows], targets.at(rows)
            _compute_chunk(*chunk, loss, group, needs_gradient)
        ctx.save_for_backward(logits if needs_gradient else None)
        losses = losses.squeeze(-1)
        losses[0] *= loss.temperature**2
        ctx.mark_non_differentiable(losses)
        kd_weight, lm_weight = targets.weights
        return kd_weight * losses[0] + lm_weight * losses[1], losses

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The logits' gradient is scaled in place, so that it is in memory only once. Autograd then
        # refuses a second backward pass, because the saved tensor has changed.
        (gradient,) = ctx.saved_tensors
        return _scale_rows(gradient, grads[0].unsqueeze(-1)), None, None, None, None


def distillation_loss(
    student: Tensor,
    teacher: Tensor | TopK,
    loss: LogitsLoss,
    group: ProcessGroup | None = None,
    reuse_logits: bool = False,
) -> Tensor:
    """Computes the KD loss per token [n] in float32, equal on all ranks.

    Only one backward pass is possible.

    Args:
        student: Finite logits [n, vocabulary/tp] of any float type.
        teacher: The teacher's logits in the same shape, or its top-k at the loss's temperature.
        loss: The divergence.
        group: Tensor-parallel ranks.
        reuse_logits: Overwrites the student's logits with the gradient, which saves memory.

    Raises:
        RecipeError: The shapes differ.
    """
    return combined_loss(student, LossTargets(teacher), loss, group, reuse_logits)[0]


def combined_loss(
    student: Tensor,
    targets: LossTargets,
    loss: LogitsLoss,
    group: ProcessGroup | None = None,
    reuse_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Computes the KD loss, the LM loss, and one gradient of their weighted sum.

    Arguments are those of ``distillation_loss``.

    Returns:
        The weighted sum per token [n], which is differentiable; and the KD and LM losses [2, n],
        which are not differentiable. The LM loss is 0 without labels.
    """
    teacher = targets.teacher
    if isinstance(teacher, TopK):
        if teacher.draws is not None and loss.divergence != TAIL_DRAWS_LOSS:
            raise RecipeError(
                f"{loss.divergence} with samples of the teacher's tail would be biased.",
                f"use {TAIL_DRAWS_LOSS}, or a teacher without draws",
            )
        teacher_shape, student_shape = teacher.indices.shape[:1], student.shape[:1]
    else:
        targets = targets._replace(teacher=teacher.detach())
        teacher_shape, student_shape = teacher.shape, student.shape
    if teacher_shape != student_shape:
        raise RecipeError(
            f"the teacher's logits {list(teacher_shape)} do not fit the student's "
            f"{list(student_shape)}.",
            "teacher and student need the same tokens, vocabulary and padded vocabulary size",
        )
    result: tuple[Tensor, Tensor] = _Distillation.apply(student, targets, loss, group, reuse_logits)
    return result


def token_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    group: ProcessGroup | None = None,
    reuse_logits: bool = False,
) -> Tensor:
    """Computes the LM loss per token [n], float32, of logits [n, vocabulary/tp] for labels [n].

    This is the forward KL from a teacher that gives the label a probability of 1.
    ``reuse_logits`` is that of ``distillation_loss``.
    """
    log_probs = torch.tensor([0.0, -math.inf], dtype=torch.float32, device=logits.device)
    teacher = TopK(labels.unsqueeze(1), log_probs.expand(len(labels), 2))
    return distillation_loss(logits, teacher, LogitsLoss(), group, reuse_logits)
