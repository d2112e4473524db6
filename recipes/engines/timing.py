"""Classes of a speed measurement: models, requests, timings, workers. Does not import torch."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Self

from nemo_convert.architecture import Architecture
from recipes.engines.results import Spread
from recipes.planning.transformer import Storage

FIRST_ORDINARY_TOKEN = 3
"""Lowest token id in random prompts. Lower ids are special tokens in most vocabularies."""


@dataclass(frozen=True)
class TimedModel:
    """A model to measure in one backend."""

    role: str
    """``teacher`` or ``student``."""
    backend: str
    storage: Storage
    """Types of weights and KV cache."""
    path: Path
    """Engine or Hugging Face folder that the backend loads."""
    folder: Path
    """Hugging Face folder of the model; equal to ``path`` if the backend is transformers."""
    architecture: Architecture
    tensor_parallel_size: int = 1


@dataclass(frozen=True)
class RequestShape:
    """Size of a batch of requests, which all have the same lengths."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int

    @property
    def context(self) -> float:
        """Mean number of tokens that a new token attends to."""
        return self.prompt_tokens + self.new_tokens / 2


@dataclass(frozen=True)
class Timing:
    """Times of a batch of requests, from its start. All requests start and end together."""

    first_seconds: float
    """Time to the first new token."""
    total_seconds: float
    """Time to the last new token."""

    def decode_rate(self, shape: RequestShape) -> float:
        """Returns the batch's new tokens per second, after each sequence's first new token."""
        tokens = shape.batch_size * (shape.new_tokens - 1)
        return tokens / (self.total_seconds - self.first_seconds)

    def throughput(self, shape: RequestShape) -> float:
        """Returns the tokens per second of the whole batch, including the prompts' tokens."""
        tokens = shape.batch_size * (shape.prompt_tokens + shape.new_tokens)
        return tokens / self.total_seconds


@dataclass(frozen=True)
class Generation:
    """The continuation of a batch of prompts. ``Worker.generate`` returns only its timing."""

    tokens: list[list[int]]
    """New tokens [batch, new]."""
    timing: Timing


class Worker:
    """Base class of workers. A worker runs one model.

    Use a worker in a ``with`` block. The end of the block stops the worker's processes.
    """

    needs_warm_up: bool = True
    """Whether the first batch of each shape is slower, and therefore not counted."""
    load_seconds: float = 0.0
    """Time to load the model."""
    peak_memory_bytes: int = 0
    """Peak memory up to the last batch."""

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Times the continuation of one batch of prompts, each by ``new_tokens`` tokens."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Does nothing. Workers with processes override this."""


def random_prompts(shape: RequestShape, vocabulary: int, seed: int) -> list[list[int]]:
    """Returns random tokens [batch, prompt] below ``vocabulary``.

    Each batch needs a different seed, because engines cache the keys and values of prompts.
    """
    generator = random.Random(seed)
    token_ids = range(FIRST_ORDINARY_TOKEN, vocabulary)
    return [generator.choices(token_ids, k=shape.prompt_tokens) for _ in range(shape.batch_size)]


def spread(values: Iterable[float]) -> Spread:
    """Returns the median, the lowest and the highest value."""
    ordered = sorted(values)
    return Spread(median(ordered), ordered[0], ordered[-1])
