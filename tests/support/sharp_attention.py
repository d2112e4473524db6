"""Changes tiny models so that their greedy tokens depend on the prompt."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file


def sharpen_attention(folder: Path) -> None:
    """Scales the queries of a tiny model up. Otherwise its tokens would not depend on RoPE."""
    weights = load_file(folder / "model.safetensors")
    scaled = {name: (8 if "q_proj" in name else 1) * value for name, value in weights.items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
