"""Lists variants of Hugging Face folders with other RoPE settings and sliding windows."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_convert.families import LLAMA3_ROPE
from tests.support.folder_changes import ABSENT, Variant, edit_config


def variants_of_rope() -> Iterator[Variant]:
    """Yields all variants. Those without a ``refusal`` must be converted exactly."""
    yield from _exact_rope_and_windows()
    yield from _refused_rope()


def _exact_rope_and_windows() -> Iterator[Variant]:
    for rope in (
        {"rope_type": "default"},  # the theta is at the top level
        {"rope_theta": 5000.0, "rope_type": "default", "factor": 1.0},
        {"rope_theta": 5000.0, "rope_type": "default", "partial_rotary_factor": None},
    ):
        yield Variant(f"new rope {rope}", edit_config(rope_parameters=rope, rope_scaling=ABSENT))
    for scaling in ({"rope_type": "default"}, {**LLAMA3_ROPE, "factor": 8.0}):
        both = edit_config(
            rope_theta=5000.0,
            rope_parameters={"rope_theta": 5000.0, **scaling},
            rope_scaling={"type": scaling["rope_type"], **scaling},
        )
        yield Variant(f"old and new rope {scaling['rope_type']}", both)
    window = {"use_sliding_window": True, "sliding_window": 16}
    for base in ("qwen2", "qwen3"):
        few_layers = edit_config(max_window_layers=2, layer_types=ABSENT, **window)
        yield Variant("window of later layers", few_layers, base=base)
        no_layer = edit_config(max_window_layers=0, layer_types=["full_attention"] * 2, **window)
        yield Variant("window of no layer", no_layer, base=base)
    for types in (None, ["full_attention"] * 2):
        yield Variant(f"layer_types {types}", edit_config(layer_types=types), base="mistral")
    short = edit_config(sliding_window=64, max_position_embeddings=64)
    yield Variant("fewer positions than the gate has tokens", short, base="mistral")


def _refused_rope() -> Iterator[Variant]:
    scaling = {**LLAMA3_ROPE, "factor": 8.0}
    for other in ({"type": "linear", "factor": 2.0}, {"rope_type": "default"}, scaling):
        # transformers uses rope_scaling, and ignores rope_parameters with their rope_theta.
        both = edit_config(
            rope_theta=ABSENT,
            rope_parameters={"rope_theta": 5000.0, **scaling},
            rope_scaling=other,
        )
        yield Variant(
            f"old scaling {str(other)[:25]}", both, "rope_scaling=.* contradicts rope_parameters"
        )
    for rope_type in ("longrope", "su", "ntk", "mrope"):
        change = edit_config(rope_scaling={"type": rope_type, "factor": 2.0})
        yield Variant(f"scaling {rope_type}", change, "rope_scaling=.* is not supported")
    for rope_type in ("default", "yarn", None):
        change = edit_config(rope_scaling={"type": rope_type, **scaling})
        yield Variant(f"type {rope_type}", change, f"type={rope_type} .* rope_type=llama3")
    low = edit_config(rope_scaling={**scaling, "low_freq_factor": True})
    yield Variant("frequency is a boolean", low, "invalid rope_scaling.low_freq_factor=True")
    theta = edit_config(rope_scaling={"rope_type": "default", "rope_theta": 7000.0})
    yield Variant("theta in rope_scaling", theta, "\n  fix: move rope_theta")
    null = edit_config(rope_scaling={"rope_type": "default", "attention_factor": None})
    yield Variant("null in rope_scaling", null, "\n  fix: remove attention_factor")
