"""What one generation took, and what several of them say together. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from recipes.engines.results import Spread
from recipes.planning.roofline import RequestShape

FIRST_ORDINARY_TOKEN = 3
"""Prompts are random tokens; the lowest ids are special ones in most vocabularies."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a batch of requests that start together and end together."""

    first_seconds: float
    """To the first new token."""
    total_seconds: float
    """To the last one."""

    def decode_rate(self, shape: RequestShape) -> float:
        """New tokens a second after the first, of the whole batch."""
        tokens = shape.batch_size * (shape.new_tokens - 1)
        return tokens / (self.total_seconds - self.first_seconds)

    def throughput(self, shape: RequestShape) -> float:
        """Tokens a second from beginning to end, read and written, of the whole batch."""
        tokens = shape.batch_size * (shape.prompt_tokens + shape.new_tokens)
        return tokens / self.total_seconds


def spread(values: Iterable[float]) -> Spread:
    """Median, lowest and highest."""
    found = sorted(values)
    return Spread(median(found), found[0], found[-1])
