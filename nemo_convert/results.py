"""What a conversion proves. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParityResult:
    """How far the logits of one fixed text are from those before the conversion."""

    parity_max_logit_difference: float
    parity_tokens: int


@dataclass(frozen=True)
class ImportResult(ParityResult):
    """A conversion from a Hugging Face folder."""

    licence: str
    """As the folder gives it, or ``unknown``."""
    hub_commit: str | None = None
    """Of a model on a hub: what was newest, unless its id named one."""


@dataclass(frozen=True)
class GgufResult:
    """A file for llama.cpp."""

    architecture: str
    """As llama.cpp calls it."""
    type: str
    """Of its matrices."""
    tensors: int
    bytes: int
