"""Questions laid out for forward passes: nothing is read twice, and nothing is padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

import torch
from torch import Tensor
from torch.nn.functional import pad

ALIKE = 64
"""First tokens that two questions share where the same examples stand before both."""


@dataclass(frozen=True)
class Prompt:
    """A context and the continuations to be scored behind it."""

    context: tuple[int, ...]
    requests: list[int]
    """Numbers of the requests that ask for it, one a continuation."""
    continuations: list[list[int]]

    def __len__(self) -> int:
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)


def group(requests: Iterable[tuple[object, list[int], list[int]]], max_length: int) -> list[Prompt]:
    """Requests by their context, which is cut at its start where the whole is too long."""
    questions: dict[tuple[int, ...], Prompt] = {}
    for number, (_, context, continuation) in enumerate(requests):
        # As HFLM does it: the last token is never an input, so one more fits.
        cut = max(0, len(context) + len(continuation) - max_length - 1)
        key = tuple(context[cut:])
        question = questions.setdefault(key, Prompt(key, [], []))
        question.requests.append(number)
        question.continuations.append(continuation)
    return list(questions.values())


def shared(
    questions: Iterable[Prompt], pass_tokens: int
) -> Iterator[tuple[tuple[int, ...], list[Prompt]]]:
    """What many questions in a row begin with, and what is left of each; last, all others whole.

    Nothing is shared that would not save a pass of ``pass_tokens``.
    """
    runs: list[list[Prompt]] = []
    for question in questions:
        if not runs or len(_beginning([runs[-1][-1], question])) < ALIKE:
            runs.append([])
        runs[-1].append(question)
    whole: list[Prompt] = []
    for run in runs:
        common = _beginning(run)
        if len(common) * (len(run) - 1) < pass_tokens:
            whole += run
            continue
        yield common, [replace(q, context=q.context[len(common) :]) for q in run]
    yield (), whole


def _beginning(questions: Iterable[Prompt]) -> tuple[int, ...]:
    """First tokens that are the same in all; each keeps its last, behind which it is scored."""
    return tuple(commonprefix([question.context[:-1] for question in questions]))


def packs(questions: Iterable[Prompt], tokens: int) -> Iterator[list[Prompt]]:
    """Questions in order, as many together as fit into so many tokens."""
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
    """Tokens of a pack, the position of each in its own sequence, and what each belongs to.

    Returns:
        Tokens, positions, and pairs of the question's number and the continuation's (0 is the
        context). The last token of a continuation predicts nothing and is left out.
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
    """Places whose logits are needed, and the token that each must predict."""
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
    """What is added to attention scores [1, 1, n, before + n]: 0 to see, the least number not to.

    A token sees what stands before it in its question's context and in its own continuation, and
    all of the ``before`` tokens that all questions begin with.
    """
    question, piece = torch.tensor(segments).T
    same = (question[:, None] == question) & ((piece[:, None] == piece) | (piece == 0))
    hidden = pad(~(same & torch.ones_like(same).tril()), (before, 0))
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[
        None, None
    ]
