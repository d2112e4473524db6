"""Prompts, what became of them, and what several timings say together. Torch-free."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from recipes.engines.results import Spread
from recipes.planning.roofline import RequestShape

FIRST_ORDINARY_TOKEN = 3
"""The lowest ids are special tokens in most vocabularies."""


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


@dataclass(frozen=True)
class Generation:
    """How a batch of prompts was continued."""

    tokens: list[list[int]]
    """New ones [batch, new]; empty where the backend does not give them."""
    timing: Timing
    drafted: int = 0
    """Tokens that another model proposed."""
    accepted: int = 0
    """Of them, those that this one would have written."""


def random_prompts(shape: RequestShape, vocabulary: int, seed: int) -> list[list[int]]:
    """Tokens [batch, prompt], other ones for every seed: engines remember prompts."""
    draw, ordinary = random.Random(seed), range(FIRST_ORDINARY_TOKEN, vocabulary)
    return [
        [draw.choice(ordinary) for _ in range(shape.prompt_tokens)] for _ in range(shape.batch_size)
    ]


def spread(values: Iterable[float]) -> Spread:
    """Median, lowest and highest."""
    found = sorted(values)
    return Spread(median(found), found[0], found[-1])
