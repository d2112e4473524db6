"""Results of conversions. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParityResult:
    """Result of the parity gate, which compares two models' logits with a reference's."""

    parity_max_logit_difference: float
    """Largest absolute difference of a logit of NeMo or transformers from the reference."""
    parity_tokens: int
    """Number of compared tokens."""


@dataclass(frozen=True)
class ImportResult(ParityResult):
    """Result of a conversion from a Hugging Face folder."""

    licence: str
    """The licence in the model card, or ``unknown``."""
    hub_commit: str | None = None
    """Commit of a hub model; ``None`` for another source. If the hub id has no commit, this is the
    newest commit at the time of the download."""


@dataclass(frozen=True)
class GgufResult:
    """Properties of an exported GGUF file, the format of llama.cpp."""

    architecture: str
    """llama.cpp's name of the architecture."""
    type: str
    """Storage type of the matrices, such as ``f16`` or ``q8_0``."""
    tensors: int
    bytes: int
    """Size of the file."""
