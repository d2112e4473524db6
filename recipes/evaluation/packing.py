"""Packs questions into forward passes, without padding and with shared prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

import torch
from torch import Tensor
from torch.nn.functional import pad

ALIKE = 64
"""Shared first tokens from which two questions are taken to have the same examples."""


@dataclass(frozen=True)
class Prompt:
    """A context and the continuations to score after it."""

    context: tuple[int, ...]
    requests: list[int]
    """Number of the request of each continuation."""
    continuations: list[list[int]]

    def __len__(self) -> int:
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)


def group(requests: Iterable[tuple[object, list[int], list[int]]], max_length: int) -> list[Prompt]:
    """Groups requests by context, truncated at its start where the whole is too long."""
    questions: dict[tuple[int, ...], Prompt] = {}
    for number, (_, context, continuation) in enumerate(requests):
        # As in HFLM: the last token is never an input, so one more fits.
        cut = max(0, len(context) + len(continuation) - max_length - 1)
        key = tuple(context[cut:])
        question = questions.setdefault(key, Prompt(key, [], []))
        question.requests.append(number)
        question.continuations.append(continuation)
    return list(questions.values())


def shared(
    questions: Iterable[Prompt], pass_tokens: int
) -> Iterator[tuple[tuple[int, ...], list[Prompt]]]:
    """Yields prefixes of consecutive questions with the remainders, then all other questions.

    A prefix is shared only if that saves a pass of ``pass_tokens``.
    """
    runs: list[list[Prompt]] = []
    for question in questions:
        if not runs or len(_common_prefix([runs[-1][-1], question])) < ALIKE:
            runs.append([])
        runs[-1].append(question)
    unshared: list[Prompt] = []
    for run in runs:
        prefix = _common_prefix(run)
        if len(prefix) * (len(run) - 1) < pass_tokens:
            unshared += run
            continue
        yield prefix, [replace(q, context=q.context[len(prefix) :]) for q in run]
    yield (), unshared


def _common_prefix(questions: Iterable[Prompt]) -> tuple[int, ...]:
    """Returns the common first tokens; each question keeps its last, after which scoring starts."""
    return tuple(commonprefix([question.context[:-1] for question in questions]))


def packs(questions: Iterable[Prompt], tokens: int) -> Iterator[list[Prompt]]:
    """Yields packs of consecutive questions of up to ``tokens`` tokens."""
    pack: list[Prompt] = []
    size = 0
    for question in questions:
        if pack and size + len(question) > tokens:
            yield pack
            pack, size = [], 0
        pack.append(question)
        size += len(question)
    if pack:
        yield pack


def lay_out(pack: Iterable[Prompt]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Returns a pack's tokens, their positions, and pairs of question and segment numbers.

    Segment 0 is the context. The last token of a continuation predicts nothing and is left out.
    """
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[tuple[int, int]] = []
    for number, question in enumerate(pack):
        start = len(question.context)
        pieces = [list(question.context), *(c[:-1] for c in question.continuations)]
        for piece, ids in enumerate(pieces):
            first = start if piece else 0
            tokens += ids
            positions += range(first, first + len(ids))
            segments += [(number, piece)] * len(ids)
    return tokens, positions, segments


def scored(pack: Iterable[Prompt]) -> tuple[list[int], list[int]]:
    """Returns the positions whose logits are needed, and their target tokens."""
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
    segments: Sequence[tuple[int, int]], dtype: torch.dtype, before: int = 0
) -> Tensor:
    """Returns the attention bias [1, 1, n, before + n]: 0 where a token attends, else the minimum.

    A token attends to the ``before`` tokens of the shared prefix, and to earlier tokens of its
    question's context and its own continuation.
    """
    question, piece = torch.tensor(segments).T
    same = (question[:, None] == question) & ((piece[:, None] == piece) | (piece == 0))
    hidden = pad(~(same & torch.ones_like(same).tril()), (before, 0))
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[
        None, None
    ]
