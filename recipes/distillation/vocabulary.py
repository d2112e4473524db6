"""Operations on vocabulary-parallel logits: log-softmax, sums, top-k, samples of the tail.

The tail is all tokens outside the top-k. Logits have the shape [n, vocabulary/tp] for n positions
of a text. ``group`` is the process group of the tensor-parallel ranks. Each rank holds
vocabulary/tp columns, in the order of ranks, as in Megatron's output layer. ``group=None`` means
tp=1: this rank has the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather, all_reduce

from recipes.core.errors import RecipeError
from recipes.planning.transformer import LOSS_CHUNK_BYTES

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": LOSS_CHUNK_BYTES}
"""Largest size in bytes of a chunk's float32 logits, by device type. A CPU's cache holds 4 MB."""
LOG_ZERO = -1e30
"""Replaces log 0 where it is multiplied by 0, because -inf·0 is NaN."""


class TopK(NamedTuple):
    """The teacher's likeliest tokens and their log-probabilities, as a logit cache stores them."""

    indices: Tensor
    """Ids in the whole vocabulary [n, k], int64, the likeliest first."""
    log_probs: Tensor
    """Log-probabilities [n, k + 1], float32. The last column is for the tail as a whole."""
    draws: Tensor | None = None
    """Ids [n, draws] of tokens sampled from the tail, int64. Each sample represents an equal
    fraction of the tail's probability. ``None`` makes the whole tail count as one token."""
    tail_entropy: Tensor | None = None
    """-Σ p·log p over the tail [n, 1], float32; ``None`` without samples."""

    def map(self, function: Callable[[Tensor], Tensor]) -> TopK:
        """Applies a function to every tensor, and returns the results as a new ``TopK``."""
        return TopK(*(None if tensor is None else function(tensor) for tensor in self))

    @classmethod
    def concatenate(cls, items: Sequence[TopK]) -> TopK:
        """Concatenates the tensors of each field along their first dimension."""
        fields = zip(*items, strict=True)
        return cls(*(None if tensors[0] is None else torch.cat(tensors) for tensors in fields))


def chunks(logits: Tensor) -> Iterator[slice]:
    """Yields one slice of rows for each chunk of logits [n, vocabulary/tp].

    The slices depend only on shape and device type. So they are the same on all tensor-parallel
    ranks, which communicate in each chunk.
    """
    row_bytes = 4 * logits.shape[-1]  # in float32
    rows = max(1, CHUNK_BYTES[logits.device.type] // row_bytes)
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def gather(shard: Tensor, group: ProcessGroup) -> Tensor:
    """Concatenates the shards [n, columns] of all ranks to [n, ranks · columns], on every rank."""
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    all_gather(shards, shard, group)
    return torch.cat(shards, dim=-1)


def sum_columns(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sums [n, columns] over the columns of all ranks; returns [n, 1]."""
    result = values.sum(dim=-1, keepdim=True)
    if group is not None:
        all_reduce(result, group=group)
    return result


def log_sum_exp(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Computes log Σ exp [n, 1] over the columns of all ranks; -inf if all values are -inf."""
    local = values.logsumexp(dim=-1, keepdim=True)
    return local if group is None else gather(local, group).logsumexp(dim=-1, keepdim=True)


def log_softmax(logits: Tensor, temperature: float, group: ProcessGroup | None) -> Tensor:
    """Computes log softmax(logits / temperature) [n, vocabulary/tp] in a new float32 tensor."""
    scaled = logits.to(torch.float32, copy=True)
    if temperature != 1:
        scaled /= temperature
    if group is None:
        return scaled.log_softmax(dim=-1)
    return scaled.sub_(log_sum_exp(scaled, group))


class Split(NamedTuple):
    """A distribution, split into k selected tokens and a tail of all other tokens."""

    log_probs: Tensor  # [n, k + 1], the tail last; equal on all ranks
    tail: Tensor  # [n, vocabulary/tp] this rank's log-probabilities, -inf for selected tokens
    columns: Tensor  # [n, k] columns of the selected tokens; arbitrary if not on this rank
    is_local: Tensor  # [n, k] whether a selected token is on this rank


def local_columns(indices: Tensor, width: int, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Finds tokens, as ids in the whole vocabulary [n, k], in this rank's ``width`` columns.

    Returns:
        The tokens' columns [n, k], arbitrary for tokens of other ranks; and whether each token is
        on this rank [n, k].
    """
    columns = indices if group is None else indices - group.rank() * width
    is_local = (columns >= 0) & (columns < width)
    return columns.clamp(0, width - 1), is_local


def select(values: Tensor, columns: Tensor, is_local: Tensor, group: ProcessGroup | None) -> Tensor:
    """Returns the values [n, k] of k tokens a row, from ``values`` [n, vocabulary/tp] of all ranks.

    ``columns`` and ``is_local`` are the results of ``local_columns`` for these tokens.
    """
    # Each token is on one rank. The other ranks add 0 to the sum over ranks.
    selected = values.gather(1, columns).masked_fill_(~is_local, 0)
    if group is not None:
        all_reduce(selected, group=group)
    return selected


def split_tail(log_probs: Tensor, indices: Tensor, group: ProcessGroup | None) -> Split:
    """Splits log-probabilities [n, vocabulary/tp] into the tokens ``indices`` [n, k] and a tail.

    The tail overwrites ``log_probs``.
    """
    columns, is_local = local_columns(indices, log_probs.shape[-1], group)
    selected = select(log_probs, columns, is_local, group)
    # Adding -inf removes a selected token from the tail. At arbitrary columns, 0 is added.
    offsets = torch.zeros_like(selected).masked_fill_(is_local, -math.inf)
    tail = log_probs.scatter_add_(1, columns, offsets)
    log_tail = log_sum_exp(tail, group)  # 1 - sum(selected) would round a small tail to 0
    return Split(torch.cat([selected, log_tail], 1), tail, columns, is_local)


@torch.no_grad()
def top_k(
    logits: Tensor,
    k: int,
    temperature: float,
    group: ProcessGroup | None = None,
    quantiles: Tensor | None = None,
) -> TopK:
    """Finds the k likeliest tokens of logits [n, vocabulary/tp]; the result is equal on all ranks.

    With ``quantiles`` [n, draws] in [0, 1), equal on all ranks, this also samples the tail. A
    sample is the first token, by id, whose cumulative fraction of the tail exceeds the quantile.

    Raises:
        RecipeError: ``k`` is below 1, or above the size of the vocabulary.
    """
    width = logits.shape[-1]
    vocabulary = width if group is None else width * group.size()
    if not 1 <= k <= vocabulary:
        raise RecipeError(
            f"invalid top_k={k}: must be from 1 to the size of the vocabulary, {vocabulary}.",
            "set top_k lower" if k > 1 else "set top_k to 1 or more",
        )
    chunk_results = []
    for rows in chunks(logits):
        all_log_probs = log_softmax(logits[rows], temperature, group)
        values, ids = all_log_probs.topk(min(k, width), dim=-1)
        if group is not None:
            # The candidates are the top-k of each rank. The ids of a rank start at rank · width.
            values, ids = gather(values, group), gather(ids + group.rank() * width, group)
            ids = ids.gather(1, values.topk(k, dim=-1).indices)
        split = split_tail(all_log_probs, ids, group)
        samples = () if quantiles is None else _sample(split.tail, quantiles[rows], group)
        chunk_results.append(TopK(ids, split.log_probs, *samples))
    return TopK.concatenate(chunk_results)


def _sample(tail: Tensor, quantiles: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Samples tokens from a tail at quantiles [n, draws] of the tail's probability mass.

    Each quantile selects the first rank at which the cumulative mass of the ranks exceeds the
    quantile, and then, in the same way, a column of this rank. ``tail`` [n, vocabulary/tp] has
    log-probabilities, -inf for tokens outside the tail.

    Returns:
        Ids [n, draws], and the tail's entropy -Σ p·log p [n, 1].
    """
    probs = tail.exp()
    entropy = -sum_columns(probs * tail.clamp(min=LOG_ZERO), group)
    cumulative = probs.cumsum(dim=-1)
    local_mass = cumulative[:, -1:]
    masses = local_mass if group is None else gather(local_mass.contiguous(), group)  # [n, ranks]
    ends = masses.cumsum(dim=-1)  # cumulative mass after the last column of each rank
    starts = ends - masses  # cumulative mass before the first column of each rank
    targets = quantiles.to(tail) * ends[:, -1:]  # cumulative mass of the selected tokens
    target_ranks = torch.searchsorted(ends, targets, right=True).clamp_(max=ends.shape[-1] - 1)
    rank = 0 if group is None else group.rank()
    rank_start, rank_mass = starts[:, rank, None], masses[:, rank, None]
    # Slightly less than the rank's mass: otherwise rounding could select a column without mass.
    local_targets = (targets - rank_start).minimum(rank_mass * (1 - 1e-6)).clamp_(min=0)
    columns = torch.searchsorted(cumulative, local_targets, right=True)
    columns = columns.clamp_(max=tail.shape[-1] - 1)
    # A sample of another rank gets the id 0 here. So the sum over ranks has the ids of all samples.
    ids = (columns + rank * tail.shape[-1]).masked_fill_(target_ranks != rank, 0)
    if group is not None:
        all_reduce(ids, group=group)
    return ids, entropy
