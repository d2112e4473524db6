"""Whether what ranks send each other is what the others expect. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from recipes.rehearsal.job import Job, Message, Rehearsed

Shapes = list[tuple[list[int], str]]


def unmatched(found: Sequence[tuple[Job, Rehearsed]]) -> Iterator[str]:
    """Compares the pipeline stages of a stage that were rehearsed, each with the next of them.

    Between two that are not neighbours, all pass on what they get in the same shape.
    """
    whole = [(job, one) for job, one in found if one.error is None]
    for (job, one), (other, after) in pairwise(whole):
        if job.name != other.name or not one.sent:
            continue
        ways = (
            (job, _onward(one.sent), other, _onward(after.expected)),
            (other, _back(after.sent), job, _back(one.expected)),
        )
        for sender, sent, receiver, expected in ways:
            if sent != expected:
                yield (
                    f"{job.name}: rank {sender.rank} sends {_words(sent)}, but rank "
                    f"{receiver.rank} expects {_words(expected)}"
                )


def _onward(messages: Sequence[Message]) -> Shapes:
    return [(m.shape, m.dtype) for m in messages if m.destination > m.source]


def _back(messages: Sequence[Message]) -> Shapes:
    return [(m.shape, m.dtype) for m in messages if m.destination < m.source]


def _words(shapes: Shapes) -> str:
    kinds = sorted({f"{shape} {dtype.removeprefix('torch.')}" for shape, dtype in shapes})
    return f"{len(shapes)} of {' and '.join(kinds)}" if shapes else "nothing"
