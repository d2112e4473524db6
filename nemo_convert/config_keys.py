"""Lists the keys of a ``config.json`` that are read, and those that cannot change a logit.

Any other key may change what a model computes. transformers ignores unknown keys, and so does
``reference``, the forward pass that the parity gates compare with. Both may then compute the same
wrong logits, so ``unknown_keys`` finds such keys.

The checks raise ``RecipeError``. Their argument ``where`` is the model's folder or hub id.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from packaging.version import Version

from nemo_convert.families import LLAMA3_ROPE
from recipes.core.errors import RecipeError

SIZES = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "sliding_window",
    "vocab_size",
)
"""Keys whose value must be a positive integer."""
NULLABLE_SIZES = ("head_dim", "num_key_value_heads", "sliding_window")
"""Sizes that may be null. Then there is no window, or the size follows from other keys."""
MAX_SIZE = 1 << 31
"""Sizes must be smaller than this. With larger ones, libraries fail with unclear errors."""
MAX_INTEGER = (1 << 63) - 1
"""Largest signed integer of 64 bits, as in PyTorch."""
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
"""Maps keys to the only types that transformers 5 accepts for them, besides null. ``eos_token_id``
may also be a list."""
GENERATION_KEYS = (
    *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample"),
    *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
    *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
    *("output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate"),
    *("suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
)
"""Settings of generation, which old versions of transformers wrote to ``config.json``."""
READ_KEYS = frozenset(
    {
        *SIZES,
        *BOOLEANS,
        *FLOATS,
        "architectures",
        "compression_config",
        "decoder_sparse_step",
        "hidden_act",
        "layer_types",
        "max_window_layers",
        "mlp_only_layers",
        "model_type",
        "pad_token_id",
        "quantization",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
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
    "dtype": "weights are read in the type that they are stored in",
    "gradient_checkpointing": "trades memory for time in training",
    "is_decoder": "read by models with an encoder and a decoder only",
    "is_llama_config": "marks the SmolLM2 models",
    "max_sequence_length": "read by no library",
    "output_attentions": "adds outputs, and does not change the logits",
    "output_hidden_states": "adds outputs, and does not change the logits",
    "output_router_logits": "adds outputs, and does not change the logits",
    "pretraining_tp": "splits matrix multiplications of Llama 2 without changing them",
    "router_aux_loss_coef": "used in training only",
    "tf_legacy_loss": "used by TensorFlow",
    "tokenizer_class": "names the tokenizer",
    "torch_dtype": "weights are read in the type that they are stored in",
    "torchscript": "changes the form of the output",
    "transformers.js_config": "settings of another library",
    "transformers_version": "version of the program that wrote the file",
    "unsloth_fixed": "marks the program that wrote the file",
    "unsloth_version": "version of the program that wrote the file",
    "use_bfloat16": "weights are read in the type that they are stored in",
    "use_cache": "stores keys and values in generation",
    **dict.fromkeys(GENERATION_KEYS, "used by generation"),
    **dict.fromkeys(
        ("bos_token_id", "decoder_start_token_id", "eos_token_id", "prefix", "sep_token_id"),
        "used by generation",
    ),
    **dict.fromkeys(
        ("finetuning_task", "task_specific_params"),
        "used by models with other outputs, such as classifiers",
    ),
}
"""Keys that cannot change a logit, each with the reason."""


def with_exact_types(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with the values of ``BOOLEANS`` as bools, those of ``FLOATS`` as floats."""
    exact = dict(config)
    for key, value in config.items():
        if key in BOOLEANS and value in (0, 1):
            exact[key] = bool(value)
        elif key in FLOATS and type(value) is int and abs(value) < 2**53:  # exact as float
            exact[key] = float(value)
    return exact


def _invalid_value_error(where: str, key: str, value: Any, problem: str, fix: str) -> RecipeError:
    return RecipeError(f"{where}: invalid {key}={value!r} in config.json: {problem}.", fix)


def require_types(config: Mapping[str, Any], where: str) -> None:
    """Refuses wrong types, and numbers that are too large, for ``BOOLEANS`` and ``NUMBERS``."""
    expected = {(bool,): "true or false", (int,): "an integer of 64 bits", (int, float): "a number"}
    for key in (*BOOLEANS, *NUMBERS):
        if (value := config.get(key)) is None:
            continue
        values = value if key == "eos_token_id" and isinstance(value, list) else [value]
        types = NUMBERS.get(key, (bool,))
        # type(), because isinstance(True, int) holds. The comparison is false for NaN.
        is_valid = all(type(item) in types and abs(item) <= MAX_INTEGER for item in values)
        if not is_valid:
            fix = "correct it: in JSON, numbers, true and false have no quotes"
            raise _invalid_value_error(where, key, value, f"must be {expected[types]}", fix)


def unknown_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields ``key=value`` for each key that may change a logit but that no library reads."""
    for key, value in config.items():
        if key in READ_KEYS or key in HARMLESS_KEYS or value in NEUTRAL_VALUES.get(key, ()):
            continue
        yield f"{key}={value}"


def require_numbers(config: Mapping[str, Any], where: str) -> None:
    """Refuses sizes that are not positive integers, and constants that are not positive numbers."""
    fix = "download config.json again, or correct it"
    for key in SIZES:
        value = config.get(key, 1)  # a missing key is valid here
        if value is None and key in NULLABLE_SIZES:
            continue
        if type(value) is not int or not 0 < value < MAX_SIZE:
            problem = f"must be a positive integer below {MAX_SIZE}"
            raise _invalid_value_error(where, key, value, problem, fix)
    for key, value in _constants(config).items():
        # The comparison is also false for NaN and infinity. PyTorch's integers have 64 bits.
        limit = MAX_INTEGER if type(value) is int else sys.float_info.max
        if type(value) not in (int, float) or not 0 < value <= limit:
            raise _invalid_value_error(where, key, value, "must be a positive number", fix)


def _constants(config: Mapping[str, Any]) -> dict[str, Any]:
    """Maps keys to the values, except sizes, that must be positive; a missing one is ``None``."""
    keys = ("rope_theta", "rms_norm_eps", "initializer_range")
    constants: dict[str, Any] = {key: config[key] for key in keys if key in config}
    scaling = config.get("rope_scaling") or {}
    if "factor" in scaling:
        constants["rope_scaling.factor"] = scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        required = ["factor", *(key for key in LLAMA3_ROPE if key != "rope_type")]
        constants |= {f"rope_scaling.{key}": scaling.get(key) for key in required}
    return constants


def require_version(config: Mapping[str, Any], where: str) -> None:
    """Refuses a ``transformers_version`` that transformers cannot parse."""
    version = config.get("transformers_version") or "0"
    if not is_version(version):
        fix = 'remove it, or set it to a version such as "4.57.6"'
        raise _invalid_value_error(where, "transformers_version", version, "is no version", fix)


def is_version(value: Any) -> bool:
    """Returns whether transformers can parse a value as a version."""
    try:
        Version(value)
    except (TypeError, ValueError):
        return False
    return True


def require_valid_padding(config: Mapping[str, Any], where: str) -> None:
    """Refuses a ``pad_token_id`` that is not the index of an embedding."""
    padding, size = config.get("pad_token_id"), config.get("vocab_size", sys.maxsize)
    # transformers passes the id to nn.Embedding as padding_idx. A negative id counts from the end.
    if padding is not None and not (type(padding) is int and -size <= padding < size):
        fix = "set pad_token_id to null in config.json, or to the id of a token"
        problem = f"must be less than vocab_size={size}"
        raise _invalid_value_error(where, "pad_token_id", padding, problem, fix)
