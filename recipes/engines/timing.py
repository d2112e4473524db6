"""Contenders of a benchmark, random prompts, and the timings of requests. Torch-free."""

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
"""The lowest ids are special tokens in most vocabularies."""


@dataclass(frozen=True)
class Contender:
    """One model in one backend."""

    role: str
    backend: str
    precision: str
    model: Path
    """Engine or Hugging Face folder that is loaded."""
    folder: Path
    """Hugging Face folder of the same model."""
    architecture: Architecture
    group_size: int | None = None
    tensor_parallel_size: int = 1

    @property
    def storage(self) -> Storage:
        """The backend's default types of weights and KV cache."""
        compressed = 1 if self.backend == "openvino" else 2
        kv_bytes = 4 if self.precision == "fp32" else compressed
        return Storage(self.precision, self.group_size, kv_bytes)

    def disk_bytes(self) -> int:
        """Returns the size of the loaded files."""
        return sum(file.stat().st_size for file in self.model.rglob("*") if file.is_file())


@dataclass(frozen=True)
class RequestShape:
    """A batch of equal requests."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int

    @property
    def context(self) -> float:
        """Mean number of tokens before a decoding step."""
        return self.prompt_tokens + self.new_tokens / 2


@dataclass(frozen=True)
class Timing:
    """Seconds of a batch of requests that start and end together."""

    first_seconds: float
    """Time to the first new token."""
    total_seconds: float
    """Time to the last new token."""

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


class Worker:
    """Runs one contender; a context manager that stops the contender's processes."""

    load_seconds: float = 0.0
    peak_memory_bytes: int = 0

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Continues one batch of prompts."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stops nothing by default."""


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
