"""Results of conversions. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParityResult:
    """Largest difference of a model's logits from the reference, on the parity gate's text."""

    parity_max_logit_difference: float
    parity_tokens: int


@dataclass(frozen=True)
class ImportResult(ParityResult):
    """Result of a conversion from a Hugging Face folder."""

    licence: str
    """From the model card, or ``unknown``."""
    hub_commit: str | None = None
    """Commit of a hub model. If the id names no commit: the newest at the time of the download."""


@dataclass(frozen=True)
class GgufResult:
    """A GGUF file, the format of llama.cpp."""

    architecture: str
    """llama.cpp's name of the architecture."""
    type: str
    """Type of the matrices."""
    tensors: int
    bytes: int
