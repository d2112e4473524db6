"""Lists the keys of a ``config.json`` that are read, and those that cannot change a logit.

Any other key may change what a model computes. transformers and ``nemo_convert.reference`` both
ignore keys that they do not know. So their logits agree although both may be wrong.
``unknown_keys`` finds such keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from recipes.core.errors import RecipeError

READ_KEYS = frozenset(
    {
        "architectures",
        "attention_bias",
        "compression_config",
        "decoder_sparse_step",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "mlp_bias",
        "mlp_only_layers",
        "model_type",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_attention_heads",
        "num_experts",
        "num_experts_per_tok",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "quantization",
        "quantization_config",
        "rms_norm_eps",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "use_sliding_window",
        "vocab_size",
    }
)
"""Keys that the converter, transformers or NeMo's importers read for a supported model."""
DEFAULT_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}
"""Labels of classifiers that older versions of transformers wrote for every model."""
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (None, False),
    "chunk_size_feed_forward": (None, 0),
    "clip_qkv": (None,),
    "cross_attention_hidden_size": (None,),
    "id2label": (None, DEFAULT_LABELS),
    "is_encoder_decoder": (None, False),
    "label2id": (None, {name: int(number) for number, name in DEFAULT_LABELS.items()}),
    "logits_scaling": (None, 1),
    "partial_rotary_factor": (None, 1),
    "problem_type": (None,),
    "pruned_heads": (None, {}),
    "qkv_bias": (None, False),
    "return_dict": (None, True),
    "rope_interleaved": (None, False),
    "shared_expert_intermediate_size": (None, 0),
    "tie_encoder_decoder": (None, False),
    "use_mrope": (None, False),
}
"""For each key, the values that leave the logits unchanged; other values may change them."""
HARMLESS_KEYS: Mapping[str, str] = {
    "_attn_implementation": "chooses a kernel",
    "_attn_implementation_autoset": "chooses a kernel",
    "_name_or_path": "where the model was loaded from",
    "attention_dropout": "used in training only, where NeMo has its own",
    "bos_token_id": "used by generation",
    "do_sample": "used by generation",
    "dtype": "weights are read in the type that they are stored in",
    "eos_token_id": "used by generation",
    "gradient_checkpointing": "trades memory for time in training",
    "is_decoder": "read by models with an encoder and a decoder only",
    "is_llama_config": "marks the SmolLM2 models",
    "max_length": "used by generation",
    "max_sequence_length": "read by no library",
    "num_beams": "used by generation",
    "output_attentions": "adds outputs, and does not change the logits",
    "output_hidden_states": "adds outputs, and does not change the logits",
    "output_router_logits": "adds outputs, and does not change the logits",
    "pretraining_tp": "splits matrix multiplications of Llama 2 without changing them",
    "repetition_penalty": "used by generation",
    "router_aux_loss_coef": "used in training only",
    "temperature": "used by generation",
    "tokenizer_class": "names the tokenizer",
    "top_k": "used by generation",
    "top_p": "used by generation",
    "torch_dtype": "weights are read in the type that they are stored in",
    "torchscript": "changes the form of the output",
    "transformers.js_config": "settings of another library",
    "transformers_version": "version of the program that wrote the file",
    "unsloth_fixed": "marks the program that wrote the file",
    "unsloth_version": "version of the program that wrote the file",
    "use_bfloat16": "weights are read in the type that they are stored in",
    "use_cache": "stores keys and values in generation",
    **dict.fromkeys(
        (
            *("bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id"),
            *("diversity_penalty", "early_stopping", "encoder_no_repeat_ngram_size"),
            *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"),
            *("length_penalty", "min_length", "no_repeat_ngram_size", "num_beam_groups"),
            *("num_return_sequences", "output_scores", "prefix", "remove_invalid_values"),
            *("return_dict_in_generate", "sep_token_id", "suppress_tokens", "typical_p"),
        ),
        "used by generation",
    ),
    **dict.fromkeys(
        ("finetuning_task", "task_specific_params"),
        "used by models with other outputs, such as classifiers",
    ),
    "tf_legacy_loss": "used by TensorFlow",
}
"""Keys that cannot change a logit, each with the reason."""


BOOLEANS = (
    "attention_bias",
    "mlp_bias",
    "norm_topk_prob",
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
)
"""Keys that are true or false; null means the same as no key."""
FLOATS = ("initializer_range", "rms_norm_eps")
"""Keys for which transformers 5 refuses an integer."""
NUMBERS: Mapping[str, tuple[type, ...]] = {
    "attention_dropout": (int, float),
    "bos_token_id": (int,),
    "eos_token_id": (int,),
}
"""Keys for which transformers 5 refuses values of other types than these. Null is also valid, and
so is a list for ``eos_token_id``."""


def with_exact_types(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with the values of ``BOOLEANS`` as bools, those of ``FLOATS`` as floats."""
    exact = dict(config)
    for key, value in config.items():
        if key in BOOLEANS and value in (0, 1):
            exact[key] = bool(value)
        elif key in FLOATS and type(value) is int and abs(value) < 2**53:  # a float is exact
            exact[key] = float(value)
    return exact


def require_types(config: Mapping[str, Any], where: str) -> None:
    """Raises ``RecipeError`` if the value of a key in ``BOOLEANS`` or ``NUMBERS`` has a wrong type.

    Args:
        config: Content of ``config.json``.
        where: The model's folder or hub id, for the message.
    """
    for key in (*BOOLEANS, *NUMBERS):
        value = config.get(key)
        values = value if key == "eos_token_id" and isinstance(value, list) else [value]
        types = NUMBERS.get(key, (bool,))
        # type(), because isinstance(True, int) holds.
        if value is not None and not all(type(item) in types for item in values):
            number = "a number" if float in types else "an integer"
            raise RecipeError(
                f"{where}: invalid {key}={value!r} in config.json: must be "
                f"{number if key in NUMBERS else 'true or false'}.",
                "correct it: in JSON, numbers, true and false have no quotes",
            )


def unknown_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields ``key=value`` for each key that may change a logit but that no library reads."""
    for key, value in config.items():
        if key in READ_KEYS or key in HARMLESS_KEYS or value in NEUTRAL_VALUES.get(key, ()):
            continue
        yield f"{key}={value}"
