"""Packs several questions with their choices into one sequence, and splits packs over ranks.

A *pack* is a list of questions that one forward pass processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

import torch
from torch import Tensor
from torch.nn.functional import pad

from recipes.core.errors import RecipeError

Request = tuple[object, list[int], list[int]]
"""A request of lm-eval: an id, the tokens of the context, and the tokens of the continuation."""
MIN_SHARED_TOKENS = 64
"""Consecutive questions form a group if at least this many of their first tokens are equal. Fewer
may be equal because all questions start with the same words, such as "Question:"."""


@dataclass(frozen=True)
class Question:
    """A context and the continuations to score after it."""

    context: tuple[int, ...]
    """Tokens before every continuation."""
    requests: list[int]
    """Index of the request of each continuation."""
    continuations: list[list[int]]
    """Tokens of each continuation."""

    def __len__(self) -> int:
        """Returns the number of input tokens.

        A continuation's last token is not an input, because it predicts nothing.
        """
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)


def truncated_context(context: list[int], continuation: list[int], max_length: int) -> list[int]:
    """Returns the last tokens of a context that fit before a continuation.

    ``max_length`` is the number of input tokens that the model accepts. At least one token of the
    context remains, as in lm-eval's ``HFLM``. Raises ``RecipeError`` if the continuation itself is
    longer than ``max_length``.
    """
    if len(continuation) > max_length:
        raise RecipeError(
            f"a benchmark's answer has {len(continuation)} tokens, but the model accepts at most "
            f"{max_length}",
            "remove this benchmark from the stage's tasks",
        )
    # The continuation's last token is never an input, so one more token of the context fits.
    return context[max(0, len(context) + len(continuation) - max_length - 1) :]


def group_by_context(requests: Iterable[Request], max_length: int) -> list[Question]:
    """Groups requests whose contexts are the same after ``truncated_context``.

    Raises ``RecipeError`` if a context is empty.
    """
    questions: dict[tuple[int, ...], Question] = {}
    for index, (_, context, continuation) in enumerate(requests):
        key = tuple(truncated_context(context, continuation, max_length))
        if not key:  # no token predicts the first token of the continuation
            raise RecipeError(
                f"item {index} of a benchmark has an empty prompt, and the tokenizer has no BOS "
                "token",
                "remove this benchmark from the stage's tasks",
            )
        question = questions.setdefault(key, Question(key, [], []))
        question.requests.append(index)
        question.continuations.append(continuation)
    return list(questions.values())


def _common_prefix(questions: Iterable[Question]) -> tuple[int, ...]:
    """Returns the first tokens that all contexts share, but never the whole of a context.

    A context's last token stays in its question, because it predicts the continuations' first
    tokens.
    """
    # Despite its module, ``commonprefix`` compares sequences of any type item by item.
    return tuple(commonprefix([question.context[:-1] for question in questions]))


def share_prefixes(
    questions: Iterable[Question], pass_tokens: int
) -> Iterator[tuple[tuple[int, ...], list[Question]]]:
    """Yields pairs of a prefix, such as few-shot examples, and the consecutive questions with it.

    The contexts of the yielded questions start after the prefix. The last pair is an empty prefix
    and all questions without a shared prefix. A prefix takes an additional forward pass. So it is
    shared only if sharing saves at least ``pass_tokens``, the tokens of a forward pass.
    """
    # A question joins the group of the previous question if both start with the same tokens.
    groups: list[list[Question]] = []
    for question in questions:
        if not groups or len(_common_prefix([groups[-1][-1], question])) < MIN_SHARED_TOKENS:
            groups.append([])
        groups[-1].append(question)
    unshared: list[Question] = []
    for group in groups:
        prefix = _common_prefix(group)
        saved_tokens = len(prefix) * (len(group) - 1)  # the prefix of all questions but one
        if saved_tokens >= pass_tokens:
            yield prefix, [replace(q, context=q.context[len(prefix) :]) for q in group]
        else:
            unshared += group
    yield (), unshared


def split_into_packs(questions: Iterable[Question], max_tokens: int) -> Iterator[list[Question]]:
    """Yields packs of consecutive questions.

    A pack has up to ``max_tokens`` input tokens, or is a single longer question.
    """
    pack: list[Question] = []
    size = 0
    for question in questions:
        if pack and size + len(question) > max_tokens:
            yield pack
            pack, size = [], 0
        pack.append(question)
        size += len(question)
    if pack:
        yield pack


def pack_tokens(pack: Iterable[Question]) -> int:
    """Returns the number of a pack's input tokens."""
    return sum(map(len, pack))


def packs_of_rank(
    requests: Iterable[Request], max_length: int, pass_tokens: int, rank: int, ranks: int
) -> Iterator[tuple[tuple[int, ...], list[list[Question]]]]:
    """Yields pairs of a shared prefix and the packs of rank ``rank`` that follow it.

    Every rank forms the same packs, so a score does not depend on the number of ranks. A rank gets
    consecutive packs, so that few prefixes are processed on two ranks.

    ``requests`` must be the same on every rank. The model accepts ``max_length`` input tokens. A
    pack has up to ``pass_tokens`` input tokens, or is a single longer question.
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
            # All tokens are divided into one range per rank. A pack belongs to the rank in whose
            # range its first token is.
            if tokens_before * ranks // total == rank:
                rank_packs.append(pack)
            tokens_before += pack_tokens(pack)
        if rank_packs:
            yield prefix, rank_packs


def pack_layout(pack: Iterable[Question]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Returns a pack's input tokens, their positions, and their (question, segment) numbers.

    Segment 0 is a question's context, whose first position is 0. Each continuation is a further
    segment that starts at the position after the context.
    """
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[tuple[int, int]] = []
    for number, question in enumerate(pack):
        continuation_inputs = [ids[:-1] for ids in question.continuations]
        for segment, ids in enumerate([list(question.context), *continuation_inputs]):
            first_position = len(question.context) if segment else 0
            tokens += ids
            positions += range(first_position, first_position + len(ids))
            segments += [(number, segment)] * len(ids)
    return tokens, positions, segments


def scored_positions(pack: Iterable[Question]) -> tuple[list[int], list[int]]:
    """Returns the indices in ``pack_layout`` whose logits are needed, and their target tokens.

    A context's last token predicts the first token of every continuation, so its index is returned
    once per continuation.
    """
    rows: list[int] = []
    targets: list[int] = []
    start = 0  # index of the next segment's first token
    for question in pack:
        start += len(question.context)
        last_of_context = start - 1
        for continuation in question.continuations:
            end = start + len(continuation) - 1
            rows += [last_of_context, *range(start, end)]
            targets += continuation
            start = end
    return rows, targets


def attention_bias(
    segments: Sequence[tuple[int, int]], dtype: torch.dtype, prefix_tokens: int = 0
) -> Tensor:
    """Returns the attention bias [1, 1, n, prefix_tokens + n] of n tokens after a shared prefix.

    A token attends to the prefix, to itself, and to earlier tokens of its question's context and of
    its own continuation. For these the bias is 0, for others the minimum of the model's ``dtype``.
    ``segments`` has the n tokens' (question, segment) numbers from ``pack_layout``.
    """
    question, segment = torch.tensor(segments).T
    # Rows are tokens that attend, columns are tokens that they attend to. Segment 0 is the context.
    same_segment = (segment[:, None] == segment) | (segment == 0)
    visible = (question[:, None] == question) & same_segment
    causal = torch.ones_like(visible).tril()
    # ``pad`` adds columns of False on the left: no token of the prefix is hidden.
    hidden = pad(~(visible & causal), (prefix_tokens, 0))
    bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    return bias[None, None]  # for all sequences and heads
