"""Packs several questions with their choices into a sequence, and splits packs over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

import torch
from torch import Tensor
from torch.nn.functional import pad

from recipes.core.errors import RecipeError

Request = tuple[object, list[int], list[int]]
"""A request of lm-eval: an id, and the tokens of context and continuation."""
MIN_SHARED_TOKENS = 64
"""Consecutive questions share a prefix if at least this many of their first tokens are equal."""


@dataclass(frozen=True)
class Question:
    """A context and the continuations to score after it."""

    context: tuple[int, ...]
    requests: list[int]
    """Index of the request of each continuation."""
    continuations: list[list[int]]

    def __len__(self) -> int:
        """Returns the number of input tokens; a continuation's last token is not an input."""
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)


def truncated_context(context: list[int], continuation: list[int], max_length: int) -> list[int]:
    """Returns the last tokens of a context that fit before a continuation; at least one, as HFLM.

    Raises:
        RecipeError: The continuation itself is too long.
    """
    if len(continuation) > max_length:
        raise RecipeError(
            f"a benchmark's answer has {len(continuation)} tokens, but the model accepts at most "
            f"{max_length}",
            "leave out the task, whose answers are too long for the model",
        )
    # The last token is never an input, so one more token fits.
    return context[max(0, len(context) + len(continuation) - max_length - 1) :]


def group_by_context(requests: Iterable[Request], max_length: int) -> list[Question]:
    """Groups requests by context. If a context is too long, its first tokens are dropped."""
    questions: dict[tuple[int, ...], Question] = {}
    for number, (_, context, continuation) in enumerate(requests):
        key = tuple(truncated_context(context, continuation, max_length))
        question = questions.setdefault(key, Question(key, [], []))
        question.requests.append(number)
        question.continuations.append(continuation)
    return list(questions.values())


def share_prefixes(
    questions: Iterable[Question], pass_tokens: int
) -> Iterator[tuple[tuple[int, ...], list[Question]]]:
    """Finds prefixes that consecutive questions share, such as few-shot examples.

    A prefix takes an additional forward pass, so it is shared only if that saves at least
    ``pass_tokens`` tokens.

    Yields:
        Each prefix and its questions, whose contexts then start after it; last, an empty prefix and
        all other questions.
    """
    groups: list[list[Question]] = []
    for question in questions:
        if not groups or len(_common_prefix([groups[-1][-1], question])) < MIN_SHARED_TOKENS:
            groups.append([])
        groups[-1].append(question)
    unshared: list[Question] = []
    for group in groups:
        prefix = _common_prefix(group)
        if len(prefix) * (len(group) - 1) < pass_tokens:
            unshared += group
            continue
        yield prefix, [replace(q, context=q.context[len(prefix) :]) for q in group]
    yield (), unshared


def packs_of_rank(
    requests: Iterable[Request], max_length: int, pass_tokens: int, rank: int, ranks: int
) -> Iterator[tuple[tuple[int, ...], list[list[Question]]]]:
    """Splits the packs of all requests over ranks; yields prefixes and the packs of ``rank``.

    Every rank forms the same packs, so a score does not depend on the number of ranks. A rank gets
    consecutive packs, so that few prefixes are processed on two ranks.
    """
    questions = group_by_context(requests, max_length)
    groups = [
        (prefix, list(split_into_packs(group, pass_tokens)))
        for prefix, group in share_prefixes(questions, pass_tokens)
    ]
    total = sum(pack_tokens(pack) for _, packs in groups for pack in packs)
    tokens_before = 0  # tokens of all earlier packs
    for prefix, packs in groups:
        rank_packs = []
        for pack in packs:
            # Ranks have equal ranges of all tokens. A pack is in the range in which it starts.
            if tokens_before * ranks // total == rank:
                rank_packs.append(pack)
            tokens_before += pack_tokens(pack)
        if rank_packs:
            yield prefix, rank_packs


def pack_tokens(pack: Iterable[Question]) -> int:
    """Returns the number of a pack's tokens."""
    return sum(map(len, pack))


def _common_prefix(questions: Iterable[Question]) -> tuple[int, ...]:
    """Returns the first tokens that all contexts share, without the last token of any context.

    That token remains in its question, because its logits predict the continuations.
    """
    return tuple(commonprefix([question.context[:-1] for question in questions]))


def split_into_packs(questions: Iterable[Question], tokens: int) -> Iterator[list[Question]]:
    """Yields packs of consecutive questions with up to ``tokens`` tokens together."""
    pack: list[Question] = []
    size = 0
    for question in questions:
        if pack and size + len(question) > tokens:
            yield pack
            pack, size = [], 0
        pack.append(question)
        size += len(question)
    if pack:
        yield pack


def pack_layout(pack: Iterable[Question]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Returns a pack's tokens, and for each token its position and (question, segment) numbers.

    Segment 0 is a question's context; each continuation is a further segment that starts at the
    position after the context. A continuation's last token is left out: it predicts nothing.
    """
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[tuple[int, int]] = []
    for number, question in enumerate(pack):
        segment_tokens = [list(question.context), *(c[:-1] for c in question.continuations)]
        for segment, ids in enumerate(segment_tokens):
            first = len(question.context) if segment else 0
            tokens += ids
            positions += range(first, first + len(ids))
            segments += [(number, segment)] * len(ids)
    return tokens, positions, segments


def scored_positions(pack: Iterable[Question]) -> tuple[list[int], list[int]]:
    """Returns the indices of the pack's tokens whose logits are needed, and their target tokens.

    The context's last token predicts the first token of every continuation.
    """
    rows: list[int] = []
    targets: list[int] = []
    start = 0
    for question in pack:
        last = start + len(question.context) - 1
        start = last + 1
        for continuation in question.continuations:
            rows += [last, *range(start, start + len(continuation) - 1)]
            targets += continuation
            start += len(continuation) - 1
    return rows, targets


def attention_bias(
    segments: Sequence[tuple[int, int]], dtype: torch.dtype, prefix_tokens: int = 0
) -> Tensor:
    """Returns the attention bias [1, 1, n, prefix_tokens + n] of n tokens after a shared prefix.

    The bias is 0 where a token attends, and the dtype's minimum elsewhere. A token attends to the
    prefix, to itself, and to earlier tokens of its question's context and of its continuation.
    """
    question, segment = torch.tensor(segments).T
    same_segment = (segment[:, None] == segment) | (segment == 0)
    visible = (question[:, None] == question) & same_segment
    # No token of the prefix is hidden.
    hidden = pad(~(visible & torch.ones_like(visible).tril()), (prefix_tokens, 0))
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[
        None, None
    ]
