"""Whether what ranks send each other is what the others expect. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from recipes.rehearsal.job import Message, RankJob, Rehearsed

Shapes = list[tuple[list[int], str]]


def unmatched(found: Sequence[tuple[RankJob, Rehearsed]]) -> Iterator[str]:
    """Compares the pipeline stages of a stage that were rehearsed, each with the next of them.

    Between two that are not neighbours, all pass on what they get in the same shape. What the last
    of three or more tells the first goes past the others, and is left out.
    """
    whole = [(job, one) for job, one in found if one.error is None]
    for (job, one), (other, after) in pairwise(whole):
        ranks = job.world // job.config.get("pipeline_model_parallel_size", 1)
        if job.name != other.name or job.rank // ranks == other.rank // ranks:
            continue
        ways = (
            (job, _passed(one.sent, ranks), other, _passed(after.expected, ranks)),
            (other, _passed(after.sent, -ranks), job, _passed(one.expected, -ranks)),
        )
        for sender, sent, receiver, expected in ways:
            if sent != expected:
                yield (
                    f"{job.name}: rank {sender.rank} sends {_words(sent)}, but rank "
                    f"{receiver.rank} expects {_words(expected)}"
                )


def _passed(messages: Sequence[Message], ranks: int) -> Shapes:
    """Those to the neighbour that is so many ranks away."""
    return [(m.shape, m.dtype) for m in messages if m.destination - m.source == ranks]


def _words(shapes: Shapes) -> str:
    kinds = sorted({f"{shape} {dtype.removeprefix('torch.')}" for shape, dtype in shapes})
    return f"{len(shapes)} of {' and '.join(kinds)}" if shapes else "nothing"
