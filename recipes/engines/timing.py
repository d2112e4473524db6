"""Random prompts, and the timings of requests. Torch-free."""

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
    """Seconds of a batch of requests that start and end together."""

    first_seconds: float
    """To the first new token."""
    total_seconds: float
    """To the last one."""

    def decode_rate(self, shape: RequestShape) -> float:
        """Returns new tokens per second after the first, of the whole batch."""
        tokens = shape.batch_size * (shape.new_tokens - 1)
        return tokens / (self.total_seconds - self.first_seconds)

    def throughput(self, shape: RequestShape) -> float:
        """Returns tokens per second, prompt and new ones, of the whole batch."""
        tokens = shape.batch_size * (shape.prompt_tokens + shape.new_tokens)
        return tokens / self.total_seconds


@dataclass(frozen=True)
class Generation:
    """The continuation of a batch of prompts."""

    tokens: list[list[int]]
    """New tokens [batch, new]."""
    timing: Timing


def random_prompts(shape: RequestShape, vocabulary: int, seed: int) -> list[list[int]]:
    """Returns tokens [batch, prompt] that differ by seed, since engines cache prompts."""
    draw, ordinary = random.Random(seed), range(FIRST_ORDINARY_TOKEN, vocabulary)
    return [
        [draw.choice(ordinary) for _ in range(shape.prompt_tokens)] for _ in range(shape.batch_size)
    ]


def spread(values: Iterable[float]) -> Spread:
    """Returns median, lowest and highest."""
    ordered = sorted(values)
    return Spread(median(ordered), ordered[0], ordered[-1])
