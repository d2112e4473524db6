"""Results of rehearsals, and a check that ranks agree on their messages. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from recipes.rehearsal.job import RankJob


@dataclass(frozen=True)
class Message:
    """A tensor that a rank sends to another rank, or receives from it."""

    source: int
    destination: int
    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class RehearsalResult:
    """What one rank of a stage did in a rehearsal."""

    seconds: float = 0
    error: str | None = None
    """End of the traceback, if the stage failed."""
    peak: dict[str, int] = field(default_factory=dict)
    """Bytes of each kind of tensor when the total was highest."""
    sent: list[Message] = field(default_factory=list)
    expected: list[Message] = field(default_factory=list)
    """Messages that the rank waits for."""


def mismatches(results: Sequence[tuple[RankJob, RehearsalResult]]) -> Iterator[str]:
    """Compares the messages of each rehearsed pipeline stage with those of the next one.

    The two need not be neighbours, since all stages pass on tensors of the same shape. Messages
    between the first and the last of several stages are not compared.
    """
    complete = [(job, result) for job, result in results if result.error is None]
    for (job, result), (next_job, next_result) in pairwise(complete):
        ranks = job.world // job.config.get("pipeline_model_parallel_size", 1)
        if job.name != next_job.name or job.rank // ranks == next_job.rank // ranks:
            continue
        forward = (job, result.sent, next_job, next_result.expected, ranks)
        backward = (next_job, next_result.sent, job, result.expected, -ranks)
        for sender, sent, receiver, expected, distance in (forward, backward):
            sent_types, expected_types = _types(sent, distance), _types(expected, distance)
            if sent_types != expected_types:
                yield (
                    f"{job.name}: rank {sender.rank} sends {_summary(sent_types)}, but rank "
                    f"{receiver.rank} expects {_summary(expected_types)}"
                )


def _types(messages: Sequence[Message], distance: int) -> list[str]:
    """Returns shape and dtype of the messages to the rank at this distance."""
    return [
        f"{m.shape} {m.dtype.removeprefix('torch.')}"
        for m in messages
        if m.destination - m.source == distance
    ]


def _summary(types: Sequence[str]) -> str:
    return f"{len(types)} of {' and '.join(sorted({*types}))}" if types else "nothing"
