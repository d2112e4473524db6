"""Distillation losses on vocabulary-parallel logits: forward KL, reverse KL and JSD.

A loss is over the whole vocabulary, or over the teacher's top-k tokens and the tail, which is all
other tokens. The tail counts as one class, or a few sampled tokens represent it. Values and
gradients are computed together, a chunk of tokens at a time, so no float32 tensor of a whole
batch's logits exists. Each of the tp ranks in ``group`` has logits [n, vocabulary/tp] of n tokens.

ModelOpt's losses (``modelopt/torch/distill/plugins/megatron.py``) hold several float32 tensors of
a whole batch's logits. They lack the factor T², and they renormalise the top-k, which ignores the
tail's probability.

Gradients: let z be the student's logits, T the temperature, q = softmax(z / T), and p the teacher's
probabilities, computed in the same way. Because ∂q_i / ∂(z_j / T) = q_i·(δ_ij - q_j), a loss f(q)
with the partial derivatives g_i = ∂f / ∂q_i has

    ∂f / ∂(z_j / T) = q_j·(g_j - Σ_i q_i·g_i).                                               (1)

A constant added to all g_i cancels, because Σ_i q_i = 1. The comments in each divergence below
state f, g (without indices) and the gradient (1). The loss is T²·f, which gives gradients of about
the same size at any T (Hinton et al., arXiv:1503.02531). The derivative of z / T by z is 1 / T, so
∂(T²·f) / ∂z_j is (1) times T.
"""

from __future__ import annotations

import math
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
    split_tail,
    sum_columns,
    top_k,
)


@dataclass(frozen=True)
class LogitsLoss:
    """Settings of the KD loss: per token, T² times a divergence between teacher p and student q."""

    divergence: str = "forward_kl"
    """One of ``LOGITS_LOSSES``."""
    temperature: float = 1.0
    """T, which divides the logits of both models."""
    beta: float = 0.5
    """For ``jsd``: the teacher's weight in m = beta·p + (1 - beta)·q. The loss is
    beta·KL(p ‖ m) + (1 - beta)·KL(q ‖ m), the generalised JSD of GKD (Agarwal et al.,
    arXiv:2306.13649)."""
    top_k: int | None = None
    """Number of the teacher's likeliest tokens that stay separate classes. All other tokens become
    one class. ``None`` keeps all tokens separate."""


Divergence = tuple[Tensor, Callable[[], Tensor]]
"""A divergence f [n, 1], and a function that returns the gradient (1) [n, classes]. Classes are
tokens, or the top-k and the tail. The function can be called only once, because it overwrites its
own inputs."""


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
    # f = β·Σ p·log(p / m) + (1 - β)·Σ q·log(q / m) with m = β·p + (1 - β)·q. Since m depends on q,
    # g has the additional term -(1 - β)·(β·p + (1 - β)·q) / m = -(1 - β), a constant that cancels.
    # Up to constants, g = (1 - β)·log(q / m). The gradient is (1 - β)·q·(log(q / m) - KL(q ‖ m)).
    q, p = log_q.exp(), log_p.exp()
    log_ratio = log_p.sub_(log_q)
    # log(m / q) = log(β·p/q + 1 - β) = softplus(log(p/q) + logit β) + log(1 - β), where
    # logit β = log(β / (1 - β)). This form does not overflow or lose digits by cancellation.
    log_1_minus_beta = math.log1p(-loss.beta)
    logit_beta = math.log(loss.beta) - log_1_minus_beta
    log_m_over_q = softplus(log_ratio + logit_beta).add_(log_1_minus_beta)
    student_kl = -sum_columns(q * log_m_over_q, group)  # KL(q ‖ m)
    teacher_kl = sum_columns(log_ratio.sub_(log_m_over_q).mul_(p), group)  # KL(p ‖ m)
    value = loss.beta * teacher_kl + (1 - loss.beta) * student_kl
    # With log(q / m) = -log_m_over_q, the gradient is (β - 1)·q·(log_m_over_q + KL(q ‖ m)).
    return value, lambda: log_m_over_q.add_(student_kl).mul_(q).mul_(loss.beta - 1)


DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}
"""Maps each of ``LOGITS_LOSSES`` to its function. The functions overwrite their arguments log p and
log q [n, classes]."""


def _top_k_divergence(
    teacher: TopK, log_q: Tensor, loss: LogitsLoss, group: ProcessGroup | None
) -> Divergence:
    """Computes the divergence over k + 1 classes: the teacher's top-k tokens, and the tail.

    The returned gradient is for all logits [n, vocabulary/tp]. The logit of the tail's class is
    u = log Σ exp(z / T) over the tail, so ∂u / ∂(z_j / T) = q_j / q_tail: a token j of the tail
    gets the fraction q_j / q_tail of the class's gradient.
    """
    student = split_tail(log_q, teacher.indices, group)
    log_probs = student.log_probs.clamp(min=LOG_ZERO)
    log_tail = log_probs[:, -1:].clone()  # log q_tail; the divergence overwrites ``log_probs``
    # Every rank has all k + 1 classes, so the divergence runs without communication.
    teacher_log_probs = teacher.log_probs.clamp(min=LOG_ZERO)
    divergence = DIVERGENCES[loss.divergence]
    value, compute_class_gradient = divergence(teacher_log_probs, log_probs, loss, None)

    def gradient() -> Tensor:
        class_gradient = compute_class_gradient()
        # q_j / q_tail. ``student.tail`` is log q of each token, but -inf for top-k tokens. So the
        # fraction of top-k tokens is 0.
        tail_fractions = student.tail.sub_(log_tail).exp_()
        token_gradient = tail_fractions.mul_(class_gradient[:, -1:])
        top_k_gradient = class_gradient[:, :-1] * student.is_local
        return token_gradient.scatter_add_(1, student.columns, top_k_gradient)

    return value, gradient


def _sampled_forward_kl(
    teacher: TopK, draws: Tensor, tail_entropy: Tensor, log_q: Tensor, group: ProcessGroup | None
) -> Divergence:
    """Computes the forward KL from a teacher whose tail is represented by samples.

    p is replaced by an estimate p̂, which is exact for the top-k and gives each sample an equal
    fraction of the tail's probability. E[p̂] = p. The cross-entropy -Σ p̂·log q and its gradient
    q - p̂ are linear in p̂, so they are unbiased estimates. The entropy of p is exact, because
    ``tail_entropy`` [n, 1] is exact. Sparse Logit Sampling (arXiv:2503.16870) has no exact top-k:
    it samples all tokens, which gives estimates with more variance.
    """
    log_probs = teacher.log_probs.clamp(min=LOG_ZERO)
    log_p, log_tail = log_probs[:, :-1], log_probs[:, -1:]
    count = draws.shape[1]
    p_hat = torch.cat([log_p.exp(), (log_tail.exp() / count).expand(-1, count)], dim=1)
    tokens = torch.cat([teacher.indices, draws], 1)
    columns, is_local = local_columns(tokens, log_q.shape[-1], group)
    selected_log_q = select(log_q, columns, is_local, group)
    cross_entropy = -(p_hat * selected_log_q).sum(dim=-1, keepdim=True)
    entropy = tail_entropy - (log_p.exp() * log_p).sum(dim=-1, keepdim=True)  # -Σ p·log p
    value = cross_entropy - entropy
    return value, lambda: log_q.exp_().scatter_add_(1, columns, -p_hat * is_local)


class LossTargets(NamedTuple):
    """Targets and weights of the loss for n rows of the student's logits."""

    teacher: Tensor | TopK
    """The teacher's logits [n, vocabulary/tp], or its top-k tokens [n, …]. The log-probabilities of
    the top-k are at the loss's temperature."""
    labels: Tensor | None = None
    """Ids [n] of the next tokens; ``None`` omits the LM loss."""
    weights: tuple[float, float] = (1.0, 0.0)
    """Weights of the KD loss and of the LM (next-token) loss, in this order."""

    def at(self, rows: slice) -> LossTargets:
        """Returns the targets of these rows of the logits."""
        teacher, labels = self.teacher, self.labels
        return self._replace(
            teacher=teacher.map(lambda t: t[rows]) if isinstance(teacher, TopK) else teacher[rows],
            labels=None if labels is None else labels[rows],
        )


def _lm_loss(
    log_q: Tensor, labels: Tensor, needs_gradient: bool, group: ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """Computes -log q [n, 1] of labels [n], and the gradient [n, vocabulary/tp] for the logits.

    The gradient is q - 1 at the label and q elsewhere; ``None`` if it is not needed.
    """
    columns, is_local = local_columns(labels.unsqueeze(1), log_q.shape[-1], group)
    value = -select(log_q, columns, is_local, group)
    if not needs_gradient:
        return value, None
    return value, log_q.exp().scatter_add_(1, columns, -is_local.to(log_q))


def _chunk_losses(
    student: Tensor,
    targets: LossTargets,
    loss: LogitsLoss,
    group: ProcessGroup | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Computes KD losses [n, 1] without T², and LM losses [n, 1] (``None`` without labels).

    If needed, the gradient of their weighted sum overwrites the logits ``student``. The gradient is
    not a separate output argument: the compiler would check if it shares memory with ``student``.
    """
    teacher, temperature = targets.teacher, loss.temperature
    lm_loss = lm_gradient = None
    log_q = log_softmax(student, temperature, group)
    if targets.labels is not None:
        # The LM loss uses temperature 1.
        log_q_at_1 = log_q if temperature == 1 else log_softmax(student, 1.0, group)
        lm_loss, lm_gradient = _lm_loss(log_q_at_1, targets.labels, needs_gradient, group)
        del log_q_at_1  # frees memory
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
    scale = temperature * kd_weight  # the gradient (1) times T, see the module's docstring
    gradient = kd_gradient() if scale == 1 else kd_gradient().mul_(scale)
    if lm_gradient is not None:
        gradient.add_(lm_gradient, alpha=lm_weight)
    student.copy_(gradient)
    return kd_loss, lm_loss


_compiled_chunk_losses = compilable(_chunk_losses)


@compilable
def _scale_rows(gradient: Tensor, weights: Tensor) -> Tensor:
    """Multiplies each row of a gradient [n, vocabulary/tp] by its weight [n, 1], in place.

    Compiling helps, because PyTorch's eager bfloat16 multiplication on a CPU is four times slower
    than memory bandwidth allows.
    """
    return gradient.mul_(weights.to(gradient.dtype))


class _Distillation(torch.autograd.Function):
    """KD and LM losses per token. The forward pass also computes their weighted sum's gradient."""

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
        # A compiled kernel cannot include collectives.
        compute_losses = _compiled_chunk_losses if group is None else _chunk_losses
        for rows in chunks(logits):
            # ``logits[rows]`` is a view, so the gradient overwrites these rows of ``logits``.
            kd_loss, lm_loss = compute_losses(
                logits[rows], targets.at(rows), loss, group, needs_gradient
            )
            losses[0, rows] = kd_loss
            if lm_loss is not None:
                losses[1, rows] = lm_loss
        ctx.save_for_backward(logits if needs_gradient else None)  # ``logits`` is the gradient now
        losses = losses.squeeze(-1)
        losses[0] *= loss.temperature**2
        ctx.mark_non_differentiable(losses)
        kd_weight, lm_weight = targets.weights
        return kd_weight * losses[0] + lm_weight * losses[1], losses

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The saved gradient is scaled in place, so that there is no second copy. Autograd then
        # refuses a second backward pass, because a saved tensor has changed.
        (gradient,) = ctx.saved_tensors
        return _scale_rows(gradient, grads[0].unsqueeze(-1)), None, None, None, None


def combined_loss(
    student: Tensor,
    targets: LossTargets,
    loss: LogitsLoss,
    group: ProcessGroup | None = None,
    reuse_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Computes the KD loss, the LM loss, and one gradient of their weighted sum.

    The student's logits [n, vocabulary/tp] must be finite. ``reuse_logits`` overwrites the logits
    with the gradient, which saves memory. Only one backward pass is possible.

    Returns:
        The weighted sum per token [n], which is differentiable; and the KD and LM losses [2, n],
        which are not differentiable. The LM loss is 0 without labels.

    Raises:
        RecipeError: The shapes differ, or the loss cannot use samples of the teacher's tail.
    """
    teacher = targets.teacher
    if isinstance(teacher, TopK):
        if teacher.draws is not None and loss.divergence != TAIL_DRAWS_LOSS:
            raise RecipeError(
                f"the loss {loss.divergence} would be biased, because the cached teacher has "
                "samples of the tokens outside its top-k.",
                f"use {TAIL_DRAWS_LOSS}, or a teacher that was cached with tail_draws=0",
            )
        teacher_shape, student_shape = teacher.indices.shape[:1], student.shape[:1]  # only n
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


def distillation_loss(
    student: Tensor,
    teacher: Tensor | TopK,
    loss: LogitsLoss,
    group: ProcessGroup | None = None,
    reuse_logits: bool = False,
) -> Tensor:
    """Computes the KD loss per token [n] in float32, equal on all ranks.

    ``teacher`` is logits [n, vocabulary/tp] or a top-k, as in ``LossTargets``. The other arguments
    and the errors are those of ``combined_loss``.
    """
    return combined_loss(student, LossTargets(teacher), loss, group, reuse_logits)[0]


def token_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    group: ProcessGroup | None = None,
    reuse_logits: bool = False,
) -> Tensor:
    """Computes the LM loss per token [n], float32, of logits [n, vocabulary/tp] for labels [n].

    ``reuse_logits`` overwrites the logits with the gradient.
    """
    # The LM loss is the forward KL from a teacher that gives the label a probability of 1, and all
    # other tokens, the tail, a probability of 0.
    log_probs = torch.tensor([0.0, -math.inf], dtype=torch.float32, device=logits.device)
    teacher = TopK(labels.unsqueeze(1), log_probs.expand(len(labels), 2))
    return distillation_loss(logits, teacher, LogitsLoss(), group, reuse_logits)
