"""Distillation losses on vocabulary-parallel logits: forward and reverse KL, JSD, whole or top-k.

ModelOpt's losses (``modelopt/torch/distill/plugins/megatron.py``) lack the T² factor, hold several
float32 copies of the whole batch's logits, and renormalise the top-k, so that the mass beyond it
teaches nothing. Here value and gradient are computed together, a few tokens at a time, so that no
full-vocabulary float32 tensor of a batch ever exists; and beyond the top-k all tokens are one
outcome with their whole mass, or a few that were drawn stand for them.

Under tensor parallelism every rank of ``group`` holds equally many columns, in the order of ranks,
as Megatron's output layer gives them; ``None`` stands for whole vocabularies.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup, all_gather, all_reduce
from torch.nn.functional import softplus

from recipes.core.compiled import compilable
from recipes.core.errors import RecipeError
from recipes.distillation.settings import DRAWN_LOSS
from recipes.planning.buffers import LOSS_CHUNK_BYTES

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": LOSS_CHUNK_BYTES}
"""A float32 buffer of a chunk: about what a CPU's cache holds; on a GPU, what is planned with."""
LOG_ZERO = -1e30
"""Stands for log 0 where it is multiplied by 0, which -inf would turn into NaN."""


@dataclass(frozen=True)
class LogitsLoss:
    """Which divergence of student q from teacher p, per token and scaled by T².

    The scale keeps gradients as large at any temperature (Hinton et al., arXiv:1503.02531).
    """

    kind: str = "forward_kl"
    temperature: float = 1.0
    """Divides the logits of both."""
    beta: float = 0.5
    """For ``jsd``: the teacher's weight in the mixture m = beta·p + (1 - beta)·q. The loss is
    beta·KL(p ‖ m) + (1 - beta)·KL(q ‖ m), the generalised JSD of GKD (Agarwal et al.,
    arXiv:2306.13649)."""
    top_k: int | None = None
    """Tokens of the teacher that count one by one; all others are one outcome."""
    chunk_bytes: int | None = None
    """Size of one float32 buffer; ``None`` suits the device."""


class TopK(NamedTuple):
    """The teacher's likeliest tokens: all that a cache of its logits needs to hold."""

    indices: Tensor
    """Ids in the whole vocabulary [n, k], int64, likeliest first."""
    log_probs: Tensor
    """Log-probabilities [n, k + 1], float32; last, the log of all other tokens' mass together."""
    draws: Tensor | None = None
    """Ids [n, draws] of the other tokens, int64, drawn by their probabilities; each stands for an
    equal part of that mass. Without any, all others are one outcome."""
    rest_entropy: Tensor | None = None
    """What the other tokens add to the entropy, -Σ p·log p, [n, 1], float32; of draws."""

    def each(self, change: Callable[[Tensor], Tensor]) -> TopK:
        """The same of every tensor that is there."""
        return TopK(*(None if tensor is None else change(tensor) for tensor in self))


def _chunks(logits: Tensor, chunk_bytes: int | None) -> Iterator[slice]:
    """Rows of logits [n, vocabulary/tp] at a time; the same on all ranks, which meet in each."""
    size = CHUNK_BYTES[logits.device.type] if chunk_bytes is None else chunk_bytes
    step = max(1, size // (4 * logits.shape[-1]))
    return (slice(start, start + step) for start in range(0, len(logits), step))


def _gather(part: Tensor, group: ProcessGroup) -> Tensor:
    """Columns of all ranks side by side, on every rank."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    all_gather(parts, part, group)
    return torch.cat(parts, dim=-1)


def _total(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum [n, 1] over the outcomes of all ranks."""
    total = values.sum(dim=-1, keepdim=True)
    if group is not None:
        all_reduce(total, group=group)
    return total


def _log_sum_exp(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Log [n, 1] of the mass of all ranks' columns; -inf where there is none."""
    local = values.logsumexp(dim=-1, keepdim=True)
    return local if group is None else _gather(local, group).logsumexp(dim=-1, keepdim=True)


def _log_softmax(logits: Tensor, temperature: float, group: ProcessGroup | None) -> Tensor:
    """A new float32 tensor of log-probabilities [n, vocabulary/tp]."""
    scaled = logits.to(torch.float32, copy=True)
    if temperature != 1:
        scaled /= temperature
    if group is None:
        return scaled.log_softmax(dim=-1)
    return scaled.sub_(_log_sum_exp(scaled, group))


class _Buckets(NamedTuple):
    """A distribution seen through chosen tokens; their k + 1 outcomes are alike on all ranks."""

    log_probs: Tensor  # [n, k + 1], the tail last
    rest: Tensor  # [n, vocabulary/tp] log-probabilities of this rank, -inf for the chosen
    columns: Tensor  # [n, k] where the chosen are on this rank; anywhere for another rank's
    here: Tensor  # [n, k] whether this rank has them


def _place(indices: Tensor, width: int, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Columns of tokens on this rank, anywhere for another's; and whether each is on this rank."""
    columns = indices if group is None else indices - group.rank() * width
    here = (columns >= 0) & (columns < width)
    return columns.clamp(0, width - 1), here


def _gather_columns(
    values: Tensor, columns: Tensor, here: Tensor, group: ProcessGroup | None
) -> Tensor:
    """Values [n, vocabulary/tp] of tokens that each are on one rank, on every rank."""
    chosen = values.gather(1, columns).masked_fill_(~here, 0)
    if group is not None:
        all_reduce(chosen, group=group)
    return chosen


def _bucket(log_probs: Tensor, indices: Tensor, group: ProcessGroup | None) -> _Buckets:
    """Splits log-probabilities [n, vocabulary/tp], which it overwrites, at the chosen tokens."""
    columns, here = _place(indices, log_probs.shape[-1], group)
    chosen = _gather_columns(log_probs, columns, here, group)
    erase = torch.zeros_like(chosen).masked_fill_(here, -math.inf)
    rest = log_probs.scatter_add_(1, columns, erase)
    # Summed over what is left: 1 - sum(chosen) would drown a small tail in rounding.
    return _Buckets(torch.cat([chosen, _log_sum_exp(rest, group)], 1), rest, columns, here)


@torch.no_grad()
def top_k(
    logits: Tensor,
    k: int,
    temperature: float,
    group: ProcessGroup | None = None,
    chunk_bytes: int | None = None,
    places: Tensor | None = None,
) -> TopK:
    """The likeliest tokens of logits [n, vocabulary/tp] of any float type; alike on all ranks.

    With ``places`` [n, draws] in [0, 1), the same on all ranks, also those of the others that are
    there in the order of the vocabulary, each of them as wide as its probability.
    """
    width = logits.shape[-1]
    vocabulary = width if group is None else width * group.size()
    if not 1 <= k <= vocabulary:
        raise RecipeError(f"top_k is {k}.", f"from 1 to the vocabulary, {vocabulary}")
    indices = torch.empty(len(logits), k, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(len(logits), k + 1, dtype=torch.float32, device=logits.device)
    draws = None if places is None else torch.empty_like(places, dtype=torch.int64)
    entropy = None if places is None else torch.empty_like(log_probs[:, :1])
    for rows in _chunks(logits, chunk_bytes):
        every = _log_softmax(logits[rows], temperature, group)
        values, ids = every.topk(min(k, width), dim=-1)
        if group is not None:
            values, ids = _gather(values, group), _gather(ids + group.rank() * width, group)
            ids = ids.gather(1, values.topk(k, dim=-1).indices)
        indices[rows] = ids
        found = _bucket(every, ids, group)
        log_probs[rows] = found.log_probs
        if places is not None and draws is not None and entropy is not None:
            draws[rows], entropy[rows] = _draw(found.rest, places[rows], group)
    return TopK(indices, log_probs, draws, entropy)


def _draw(rest: Tensor, places: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Ids [n, draws] at places of log-probabilities [n, vocabulary/tp], and -Σ p·log p [n, 1]."""
    probs = rest.exp()
    entropy = -_total(probs * rest.clamp(min=LOG_ZERO), group)
    mass = probs.cumsum(dim=-1)
    parts = mass[:, -1:] if group is None else _gather(mass[:, -1:].contiguous(), group)
    ends = parts.cumsum(dim=-1)  # of each rank's columns
    places = places.to(rest) * ends[:, -1:]
    owners = torch.searchsorted(ends, places, right=True).clamp_(max=ends.shape[-1] - 1)
    rank = 0 if group is None else group.rank()
    # Rounding must not lead past the last token that has a mass.
    inside = (places - (ends - parts)[:, rank, None]).minimum(parts[:, rank, None] * (1 - 1e-6))
    ids = torch.searchsorted(mass, inside.clamp_(min=0), right=True).clamp_(max=rest.shape[-1] - 1)
    ids = (ids + rank * rest.shape[-1]).masked_fill_(owners != rank, 0)
    if group is not None:
        all_reduce(ids, group=group)
    return ids, entropy


Divergence = tuple[Tensor, Callable[[], Tensor]]
"""Divergence [n, 1] of log-probabilities [n, outcomes], without T², and what computes its slope
[n, outcomes] along each outcome's logit: for a slope g along q, that is q·(g - Σ q·g)."""


def _forward_kl(
    log_p: Tensor, log_q: Tensor, loss: LogitsLoss, group: ProcessGroup | None
) -> Divergence:
    p = log_p.exp()
    value = _total(log_p.sub_(log_q).mul_(p), group)
    return value, lambda: log_q.exp_().sub_(p)


def _reverse_kl(
    log_p: Tensor, log_q: Tensor, loss: LogitsLoss, group: ProcessGroup | None
) -> Divergence:
    q = log_q.exp()
    ratio = log_q.sub_(log_p)
    value = _total(q * ratio, group)
    return value, lambda: ratio.sub_(value).mul_(q)


def _jsd(log_p: Tensor, log_q: Tensor, loss: LogitsLoss, group: ProcessGroup | None) -> Divergence:
    q, p = log_q.exp(), log_p.exp()
    ratio = log_p.sub_(log_q)
    # log(m / q) = log(beta·p/q + 1 - beta), in a form that neither overflows nor cancels.
    logit, offset = math.log(loss.beta) - math.log1p(-loss.beta), math.log1p(-loss.beta)
    mixed = softplus(ratio + logit).add_(offset)
    to_student = -_total(q * mixed, group)
    to_teacher = _total(ratio.sub_(mixed).mul_(p), group)
    value = loss.beta * to_teacher + (1 - loss.beta) * to_student
    # g is (1 - beta)·log(q / m).
    return value, lambda: mixed.add_(to_student).mul_(q).mul_(loss.beta - 1)


DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}
"""What each of ``LOGITS_LOSSES`` computes; all may overwrite the log-probabilities."""


def _bucketed(
    known: TopK, log_q: Tensor, loss: LogitsLoss, group: ProcessGroup | None
) -> Divergence:
    """The divergence from the teacher's top-k; slopes of all [n, vocabulary/tp] logits."""
    student = _bucket(log_q, known.indices, group)
    log_probs = student.log_probs.clamp(min=LOG_ZERO)
    tail = log_probs[:, -1:].clone()
    # The outcomes' own sums need no group: every rank has all outcomes.
    theirs = known.log_probs.clamp(min=LOG_ZERO)
    value, outcomes = DIVERGENCES[loss.kind](theirs, log_probs, loss, None)

    def slope() -> Tensor:
        slopes = outcomes()
        # A token of the tail has the tail's slope times its share of the tail.
        every = student.rest.sub_(tail).exp_().mul_(slopes[:, -1:])
        return every.scatter_add_(1, student.columns, slopes[:, :-1] * student.here)

    return value, slope


def _drawn(
    known: TopK, draws: Tensor, rest_entropy: Tensor, log_q: Tensor, group: ProcessGroup | None
) -> Divergence:
    """The forward KL from a teacher of whose tail a few tokens were drawn.

    Linear in the teacher's probabilities, so that in the mean over draws value and slope are those
    of the whole vocabulary (Sparse Logit Sampling, arXiv:2503.16870, draws all tokens; here the
    likeliest are exact, and only what they leave varies).
    """
    log_p, tail = known.log_probs.clamp(min=LOG_ZERO).split([known.indices.shape[1], 1], dim=1)
    number = draws.shape[1]
    p = torch.cat([log_p.exp(), (tail.exp() / number).expand(-1, number)], dim=1)
    columns, here = _place(torch.cat([known.indices, draws], 1), log_q.shape[-1], group)
    taught = (p * _gather_columns(log_q, columns, here, group)).sum(dim=-1, keepdim=True)
    entropy = rest_entropy - (log_p.exp() * log_p).sum(dim=-1, keepdim=True)
    return -entropy - taught, lambda: log_q.exp_().scatter_add_(1, columns, -p * here)


class LossTargets(NamedTuple):
    """Targets of the loss for rows of the student's logits."""

    teacher: Tensor | TopK
    """Its logits [n, vocabulary/tp], or its top-k at the loss's temperature."""
    labels: Tensor | None = None
    """Ids [n] of the next tokens in the vocabulary, where the text counts, too."""
    weights: tuple[float, float] = (1.0, 0.0)
    """Of the divergence from the teacher, and of the next-token loss."""

    def at(self, rows: slice) -> LossTargets:
        """Those of some rows."""
        take = operator.itemgetter(rows)
        teacher = self.teacher
        return self._replace(
            teacher=teacher.each(take) if isinstance(teacher, TopK) else take(teacher),
            labels=None if self.labels is None else take(self.labels),
        )


def _next_token(
    log_q: Tensor, labels: Tensor, sloped: bool, group: ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """Loss [n, 1] of log-probabilities [n, vocabulary/tp], and its slope if that is wanted."""
    columns, here = _place(labels.unsqueeze(1), log_q.shape[-1], group)
    value = -_gather_columns(log_q, columns, here, group)
    return value, log_q.exp().scatter_add_(1, columns, -here.to(log_q)) if sloped else None


def _write(
    losses: Tensor,
    student: Tensor,
    targets: LossTargets,
    loss: LogitsLoss,
    group: ProcessGroup | None,
    sloped: bool,
) -> None:
    """Fills in a chunk's losses [2, n, 1], and the gradient where its logits are.

    On return its buffers are free: in the caller's loop they would live on beside the next ones.
    """
    # Between ranks a chain is cut by what they send.
    of_chunk = _fused if group is None else _of_chunk
    taught, told = of_chunk(student, targets, loss, group, sloped)
    losses[0] = taught
    if told is not None:
        losses[1] = told


def _of_chunk(
    student: Tensor,
    targets: LossTargets,
    loss: LogitsLoss,
    group: ProcessGroup | None,
    sloped: bool,
) -> tuple[Tensor, Tensor | None]:
    """Divergences [n, 1] without T² and next-token losses; logits become the slopes of their sum.

    One tensor is both, or a compiler would have to be told where the two are the same memory.
    """
    teacher, temperature = targets.teacher, loss.temperature
    following = following_slope = None
    log_q = _log_softmax(student, temperature, group)
    if targets.labels is not None:
        own = log_q if temperature == 1 else _log_softmax(student, 1.0, group)
        following, following_slope = _next_token(own, targets.labels, sloped, group)
        del own
    if not isinstance(teacher, TopK) and loss.top_k is not None:
        teacher = top_k(teacher, loss.top_k, temperature, group, loss.chunk_bytes)
    if isinstance(teacher, TopK):
        if teacher.draws is None or teacher.rest_entropy is None:
            value, slope = _bucketed(teacher, log_q, loss, group)
        else:
            rest = teacher.draws, teacher.rest_entropy
            value, slope = _drawn(teacher, *rest, log_q, group)
    else:
        log_p = _log_softmax(teacher, temperature, group)
        value, slope = DIVERGENCES[loss.kind](log_p, log_q, loss, group)
    if not sloped:
        return value, following
    taught_weight, told_weight = targets.weights
    scale = temperature * taught_weight  # of T² the inner derivative, 1/T, leaves T
    slopes = slope() if scale == 1 else slope().mul_(scale)
    if following_slope is not None:
        slopes.add_(following_slope, alpha=told_weight)
    student.copy_(slopes)
    return value, following


_fused = compilable(_of_chunk)


@compilable
def _weigh(gradient: Tensor, weights: Tensor) -> Tensor:
    """A gradient [n, vocabulary/tp], in place, by what each of its rows counts [n, 1].

    PyTorch's own product in bfloat16 is four times slower on a CPU than memory is.
    """
    return gradient.mul_(weights.to(gradient.dtype))


class _Distillation(torch.autograd.Function):
    """Losses per token, with the gradient of their weighted sum computed in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx,
        student: Tensor,
        targets: LossTargets,
        loss: LogitsLoss,
        group: ProcessGroup | None,
        reuse: bool,
    ) -> tuple[Tensor, Tensor]:
        losses = torch.zeros(2, len(student), 1, dtype=torch.float32, device=student.device)
        sloped = ctx.needs_input_grad[0]
        logits = student.detach().clone() if sloped and not reuse else student.detach()
        for rows in _chunks(logits, loss.chunk_bytes):
            _write(losses[:, rows], logits[rows], targets.at(rows), loss, group, sloped)
        ctx.save_for_backward(logits if sloped else None)
        losses = losses.squeeze(-1)
        losses[0] *= loss.temperature**2
        ctx.mark_non_differentiable(losses)
        taught, told = targets.weights
        return taught * losses[0] + told * losses[1], losses

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # In place, to hold the logits' gradient once. A second backward is an error of autograd,
        # which sees that what was saved has changed.
        (gradient,) = ctx.saved_tensors
        return _weigh(gradient, grads[0].unsqueeze(-1)), None, None, None, None


def distillation_loss(
    student: Tensor,
    teacher: Tensor | TopK,
    loss: LogitsLoss,
    group: ProcessGroup | None = None,
    reuse_logits: bool = False,
) -> Tensor:
    """Loss per token [n], float32, alike on all ranks of the group; differentiable once.

    ``student`` are finite logits [n, vocabulary/tp] of any float type, ``teacher`` its logits of
    the same shape, or its top-k, made at the loss's temperature. ``reuse_logits`` lets the
    gradient overwrite the student's, to hold one tensor less. Refuses shapes that do not
    fit.
    """
    return combined_loss(student, LossTargets(teacher), loss, group, reuse_logits)[0]


def combined_loss(
    student: Tensor,
    targets: LossTargets,
    loss: LogitsLoss,
    group: ProcessGroup | None = None,
    reuse_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """The divergence from a teacher and the next-token loss, with one gradient of both.

    As ``distillation_loss``, but returns the weighted sum per token [n], which alone is
    differentiable, and the two losses [2, n], of which one that does not count may be 0.
    """
    teacher = targets.teacher
    if isinstance(teacher, TopK):
        if teacher.draws is not None and loss.kind != DRAWN_LOSS:
            raise RecipeError(
                f"{loss.kind} from draws of the teacher would not be what it is in the mean.",
                f"use {DRAWN_LOSS}, or a teacher without draws",
            )
        found, wanted = teacher.indices.shape[:1], student.shape[:1]
    else:
        targets = targets._replace(teacher=teacher.detach())
        found, wanted = teacher.shape, student.shape
    if found != wanted:
        raise RecipeError(
            f"the teacher's logits {list(found)} do not fit the student's {list(wanted)}.",
            "teacher and student need the same tokens, vocabulary and padding of it",
        )
    both: tuple[Tensor, Tensor] = _Distillation.apply(student, targets, loss, group, reuse_logits)
    return both


def token_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    group: ProcessGroup | None = None,
    chunk_bytes: int | None = None,
    reuse_logits: bool = False,
) -> Tensor:
    """Next-token loss [n], float32, of logits [n, vocabulary/tp] for ids [n] in the vocabulary.

    It is the forward KL of a teacher that is sure of the label, with ``distillation_loss``'s way to
    hold one tensor less.
    """
    log_probs = torch.tensor([0.0, -math.inf], dtype=torch.float32, device=logits.device)
    sure = TopK(labels.unsqueeze(1), log_probs.expand(len(labels), 2))
    loss = LogitsLoss(chunk_bytes=chunk_bytes)
    return distillation_loss(logits, sure, loss, group, reuse_logits)
