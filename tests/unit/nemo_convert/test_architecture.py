"""``read_architecture`` reads shapes from ``config.json``, and refuses unsupported configs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from nemo_convert.config_keys import BOOLEANS, HARMLESS_KEYS, NEUTRAL_VALUES, NUMBERS
from nemo_convert.families import FAMILIES, LLAMA3_ROPE
from nemo_convert.hf_config import (
    SUPPORTED,
    as_transformers_4,
    read_architecture,
    rope_theta,
)
from nemo_convert.smollm2 import HF_CONFIG
from recipes.core.errors import RecipeError
from recipes.planning.chain import CONFIGS

LLAMA_8B: dict[str, Any] = dict(CONFIGS["meta-llama/Llama-3.1-8B"])
del LLAMA_8B["rope_scaling"], LLAMA_8B["rope_theta"]  # tests set them
MISTRAL_7B = {
    **LLAMA_8B,
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
QWEN2_5_0_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "max_window_layers": 21,
    "tie_word_embeddings": True,
}
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": True,
}
QWEN3_30B_A3B = {
    **QWEN3_0_6B,
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
PUBLISHED = {
    "SmolLM2-135M": (HF_CONFIG, 134_515_008),
    "Mistral-7B-v0.3": (MISTRAL_7B, 7_248_023_552),
    "Qwen2.5-0.5B": (QWEN2_5_0_5B, 494_032_768),
    "Qwen3-0.6B": (QWEN3_0_6B, 596_049_920),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 30_532_122_624),
    # Configs that a plan uses without a network.
    "Llama-3.1-8B": (CONFIGS["meta-llama/Llama-3.1-8B"], 8_030_261_248),
    "Qwen3-8B": (CONFIGS["Qwen/Qwen3-8B"], 8_190_735_360),
    "Mistral-Nemo": (CONFIGS["mistralai/Mistral-Nemo-Base-2407"], 12_247_782_400),
}
"""Each model's config, and the number of parameters that the hub shows for its safetensors."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_equal_the_published_number_and_the_converted_weights(model: str) -> None:
    config, published = PUBLISHED[model]
    architecture = read_architecture(config, model)
    assert architecture.parameters() == published
    family = FAMILIES[architecture.hf_architecture]
    weights = [weight.shape(architecture) for weight, _ in family.weights_of(architecture)]
    assert sum(math.prod(shape) for shape in weights) == published


def test_active_weights_include_only_the_top_k_experts() -> None:
    """The model has 128 experts, and a token uses 8. ``small_moe`` has only 8 experts."""
    moe = read_architecture(QWEN3_30B_A3B, "x")
    small_moe = dataclasses.replace(moe, num_moe_experts=8)
    # In each of 48 layers, the router scores all 128 experts of the model.
    extra_router_weights = 48 * 2048 * (128 - 8)
    assert moe.active_weights() == small_moe.active_weights() + extra_router_weights
    # Norms and the input embedding are in no matrix multiplication, so they are not active weights.
    # A layer has two norms of the hidden size (2048), and two of the head size (128) for q and k.
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    embedding = 151936 * 2048
    assert small_moe.active_weights() == small_moe.parameters() - norms - embedding


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (MISTRAL_7B, {"sliding_window": 4096}),
        (QWEN3_0_6B, {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 21}),
        (QWEN2_5_0_5B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        (QWEN3_0_6B, {"attention_bias": True}),
        (LLAMA_8B, {"mlp_bias": True}),
        (QWEN2_5_0_5B, {"layer_types": ["full_attention", "sliding_attention"]}),
        (QWEN3_30B_A3B, {"mlp_only_layers": [0]}),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 2}),
        (LLAMA_8B, {"hidden_act": "gelu"}),
        (LLAMA_8B, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        (LLAMA_8B, {"quantization_config": {"quant_method": "fp8"}}),
        (LLAMA_8B, {"residual_multiplier": 0.2}),
        (LLAMA_8B, {"rope_interleaved": True}),
        (LLAMA_8B, {"partial_rotary_factor": 0.5}),
    ],
)
def test_error_names_an_unsupported_key(config: dict[str, Any], changes: dict[str, Any]) -> None:
    """If several keys together turn on a feature, the error names the first."""
    [key, *_] = changes
    with pytest.raises(RecipeError, match=rf"x: {key}=.* is not supported for \w+\."):
        read_architecture({**config, **changes}, "x")


def test_a_sliding_window_must_be_as_long_as_the_context() -> None:
    """Without the key, transformers uses a window of 4096 tokens for Mistral."""
    config = {key: value for key, value in MISTRAL_7B.items() if key != "sliding_window"}
    with pytest.raises(RecipeError, match="sliding_window=4096"):
        read_architecture(config, "x")
    config |= {"sliding_window": 4096, "max_position_embeddings": 4096}
    assert read_architecture(config, "x").max_position_embeddings == 4096


def test_active_weights_include_each_matrix_once() -> None:
    """A tied embedding counts as the output layer's matrix, not as the input's."""
    smollm2 = read_architecture(HF_CONFIG, "smollm2")
    # Matrices of queries and output, of keys and values, and of the feed-forward layer.
    layer = 576 * 64 * (2 * 9 + 2 * 3) + 3 * 576 * 1536
    assert smollm2.active_weights() == 30 * layer + 49152 * 576
    untied = dataclasses.replace(smollm2, tied_embeddings=False)
    assert untied.active_weights() == smollm2.active_weights()


def test_defaults_of_absent_keys() -> None:
    absent = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings")
    config = {key: value for key, value in LLAMA_8B.items() if key not in absent}
    architecture = read_architecture(config, "x")
    assert architecture.num_query_groups == 32, "one group for each attention head"
    assert architecture.kv_channels == 128, "hidden_size / num_attention_heads"
    assert read_architecture({**config, "head_dim": 64}, "x").kv_channels == 64
    assert architecture.tied_embeddings is False
    assert architecture.max_position_embeddings == 2048, "the default of transformers"


@pytest.mark.parametrize(
    ("architectures", "name"),
    [
        (["MixtralForCausalLM"], "MixtralForCausalLM"),
        ([], "none"),
        (None, "none"),
    ],
)
def test_unsupported_architecture_names_the_supported_ones(
    architectures: list[str] | None, name: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        read_architecture({**LLAMA_8B, "architectures": architectures}, "some/model")
    message = str(caught.value)
    assert f"some/model: architecture {name} is not supported" in message
    assert all(supported in message for supported in SUPPORTED)


@pytest.mark.parametrize(
    "missing", [["hidden_size"], ["num_attention_heads"], ["hidden_size", "vocab_size"]]
)
def test_the_error_names_the_missing_sizes(missing: list[str]) -> None:
    config = {key: value for key, value in LLAMA_8B.items() if key not in missing}
    with pytest.raises(RecipeError, match=", ".join(f"no '{key}'" for key in missing)):
        read_architecture(config, "x")


LLAMA3_SCALING = {"factor": 8.0, **LLAMA3_ROPE}
"""RoPE scaling of Llama 3.1 8B."""


@pytest.mark.parametrize(
    ("rope_parameters", "theta_and_scaling", "old_scalings"),
    [
        (
            {"rope_type": "default"},
            {"rope_theta": 5e5, "rope_scaling": None},
            [None, {}, {"rope_type": "default"}, {"type": "default"}],
        ),
        (
            LLAMA3_SCALING,
            {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
            [LLAMA3_SCALING, {"type": "llama3", **LLAMA3_SCALING}],
        ),
    ],
)
def test_rope_parameters_become_theta_and_scaling(
    rope_parameters: dict[str, Any],
    theta_and_scaling: dict[str, Any],
    old_scalings: list[dict[str, Any] | None],
) -> None:
    """Keys of transformers 5 become ``rope_theta`` and ``rope_scaling`` of transformers 4.

    A config may have the keys of both versions if they mean the same. ``old_scalings`` are the
    values of ``rope_scaling`` that mean the same as ``rope_parameters``.
    """
    config = {**LLAMA_8B, "rope_parameters": {"rope_theta": 5e5, **rope_parameters}}
    expected = {**LLAMA_8B, "model_type": "llama", **theta_and_scaling}
    assert as_transformers_4(config, "8B") == expected
    for scaling in old_scalings:
        both = {**config, **theta_and_scaling, "rope_scaling": scaling}
        assert as_transformers_4(both, "8B") == expected
    assert rope_theta(as_transformers_4(config, "8B")) == 5e5
    assert read_architecture(config, "8B") == read_architecture(LLAMA_8B, "8B")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_parameters": {"rope_type": "default"}}, "not supported"),
        ({"rope_parameters": {"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}}, "not supp"),
        ({"rope_parameters": []}, "not supported"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, "contradicts"),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": LLAMA3_SCALING}, "contradicts"),
    ],
)
def test_rope_parameters_that_cannot_be_read_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        read_architecture({**LLAMA_8B, **settings}, "8B")


def test_the_number_of_experts_of_transformers_5_is_read() -> None:
    """Version 5 spells ``num_experts`` as ``num_local_experts``."""
    config = {key: value for key, value in QWEN3_30B_A3B.items() if key != "num_experts"}
    expected = read_architecture(QWEN3_30B_A3B, "MoE")
    assert read_architecture({**config, "num_local_experts": 128}, "MoE") == expected
    with pytest.raises(RecipeError, match="num_experts=128 contradicts num_local_experts=64"):
        read_architecture({**QWEN3_30B_A3B, "num_local_experts": 64}, "MoE")


def test_keys_that_change_no_logit_are_accepted() -> None:
    neutral = {key: values[0] for key, values in NEUTRAL_VALUES.items()}
    # Keys with a required type, and the version, cannot have the value "anything".
    required_types = {*NUMBERS, *BOOLEANS, "transformers_version"}
    harmless = dict.fromkeys(HARMLESS_KEYS.keys() - required_types, "anything")
    config = {**LLAMA_8B, **neutral, **harmless}
    assert read_architecture(config, "8B") == read_architecture(LLAMA_8B, "8B")
