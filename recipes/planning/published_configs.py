"""Shapes of models that the shipped recipes start from, for planning where no hub is in reach.

Only what a plan needs of each public ``config.json``; weights, tokenizer and everything else still
come from the hub. Checked against the published numbers of parameters in the tests.
"""

from __future__ import annotations

from typing import Any

from nemo_convert.hub import in_reach, is_hub_id, read_hf_config

_LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
_QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "hidden_act": "silu",
    "sliding_window": None,
    "use_sliding_window": False,
}
_MISTRAL_NEMO_12B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "sliding_window": None,
}

CONFIGS = {
    "meta-llama/Llama-3.1-8B": _LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_1_8B,
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "Qwen/Qwen3-8B-Base": _QWEN3_8B | {"max_position_embeddings": 32768},
    "mistralai/Mistral-Nemo-Base-2407": _MISTRAL_NEMO_12B,
}
"""By hub id."""


def read_config_or_published(hf_path: str) -> tuple[dict[str, Any], bool]:
    """``read_hf_config``, or for a model of a shipped recipe its bundled copy without a hub.

    Returns:
        The config, and whether it is the bundled copy.

    Raises:
        RecipeError: As ``read_hf_config``.
    """
    if is_hub_id(hf_path) and hf_path in CONFIGS and not in_reach(hf_path):
        return CONFIGS[hf_path], True
    return read_hf_config(hf_path), False
