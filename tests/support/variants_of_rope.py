"""Lists variants of Hugging Face folders with other RoPE settings and sliding windows.

transformers 4 has the key ``rope_scaling``, and 5 has ``rope_parameters`` with ``rope_theta``.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_convert.families import LLAMA3_ROPE
from tests.support.folder_changes import ABSENT, edit_config
from tests.support.variant import Variant


def variants_of_rope() -> Iterator[Variant]:
    """Yields all variants. Those without a ``refusal`` must be converted exactly."""
    yield from _exact_rope_and_windows()
    yield from _refused_rope()


def _exact_rope_and_windows() -> Iterator[Variant]:
    for rope in (
        {"rope_type": "default"},  # rope_theta stays at the top level of config.json
        {"rope_theta": 5000.0, "rope_type": "default", "factor": 1.0},
        {"rope_theta": 5000.0, "rope_type": "default", "partial_rotary_factor": None},
    ):
        yield Variant(f"new rope {rope}", edit_config(rope_parameters=rope, rope_scaling=ABSENT))
    for scaling in ({"rope_type": "default"}, {**LLAMA3_ROPE, "factor": 8.0}):
        old_and_new = edit_config(
            rope_theta=5000.0,
            rope_parameters={"rope_theta": 5000.0, **scaling},
            rope_scaling={"type": scaling["rope_type"], **scaling},
        )
        yield Variant(f"old and new rope {scaling['rope_type']}", old_and_new)
    # The models have 2 layers, and no layer uses the window: the window starts at layer 2, or all
    # layers have full attention.
    window = {"use_sliding_window": True, "sliding_window": 16}
    for base in ("qwen2", "qwen3"):
        later_layers = edit_config(max_window_layers=2, layer_types=ABSENT, **window)
        yield Variant("window of later layers", later_layers, base=base)
        no_layer = edit_config(max_window_layers=0, layer_types=["full_attention"] * 2, **window)
        yield Variant("window of no layer", no_layer, base=base)
    for types in (None, ["full_attention"] * 2):
        yield Variant(f"layer_types {types}", edit_config(layer_types=types), base="mistral")
    short_context = edit_config(sliding_window=64, max_position_embeddings=64)
    yield Variant("fewer positions than parity.NUM_TOKENS", short_context, base="mistral")


def _refused_rope() -> Iterator[Variant]:
    scaling = {**LLAMA3_ROPE, "factor": 8.0}
    for old_scaling in ({"type": "linear", "factor": 2.0}, {"rope_type": "default"}, scaling):
        # transformers would use rope_scaling and ignore rope_parameters. Then rope_theta would be
        # missing, so even an equal rope_scaling contradicts rope_parameters.
        old_and_new = edit_config(
            rope_theta=ABSENT,
            rope_parameters={"rope_theta": 5000.0, **scaling},
            rope_scaling=old_scaling,
        )
        yield Variant(
            f"old scaling {str(old_scaling)[:25]}",  # the start of the text is unique
            old_and_new,
            "rope_scaling=.* contradicts rope_parameters",
        )
    for rope_type in ("dynamic", "longrope", "su", "ntk", "mrope"):
        change = edit_config(rope_scaling={"type": rope_type, "factor": 2.0})
        yield Variant(f"scaling {rope_type}", change, "rope_scaling=.* is not supported")
    for old_type in ("default", "yarn", None):  # type is the old name of rope_type
        change = edit_config(rope_scaling={"type": old_type, **scaling})
        yield Variant(f"type {old_type}", change, f"type={old_type} .* rope_type=llama3")
    boolean = edit_config(rope_scaling={**scaling, "low_freq_factor": True})
    yield Variant("frequency is a boolean", boolean, "invalid rope_scaling.low_freq_factor=True")
    theta = edit_config(rope_scaling={"rope_type": "default", "rope_theta": 7000.0})
    yield Variant("theta in rope_scaling", theta, "\n  fix: move rope_theta")
    null = edit_config(rope_scaling={"rope_type": "default", "attention_factor": None})
    yield Variant("null in rope_scaling", null, "\n  fix: remove attention_factor")
