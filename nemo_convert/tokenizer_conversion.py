"""Converts a folder's tokenizer, so that transformers 4 and 5 load the same one."""

from __future__ import annotations

from pathlib import Path

from nemo_convert.tokenizer_files import (
    CONFIG,
    GENERIC_CLASS,
    SENTENCEPIECE,
    TOKENIZER,
    WITHOUT_JSON,
    is_version_5,
    load_tokenizer,
    read_tokenizer_config,
    tokenizer_class,
)
from recipes.core.files import read_json, write_json

ONLY_TRANSFORMERS_5 = ("backend", "extra_special_tokens", "is_local", "local_files_only")
"""Settings of transformers 5. Version 4 has only ``extra_special_tokens``, which is then a dict."""
DROPPED_SETTINGS = (*ONLY_TRANSFORMERS_5, "add_bos_token", "add_eos_token")
"""Settings that a conversion removes. ``tokenizer.json`` defines whether BOS and EOS are added. If
an ``add_*_token`` setting remained, transformers 5 would obey the settings and not the file."""
REPLACED_BY_TRANSFORMERS_5 = ("CodeLlamaTokenizer", "GPT2Tokenizer", "LlamaTokenizer")
"""Classes, without the suffix ``Fast``, that ignore the normalizer and the pre-tokenizer of
``tokenizer.json`` in transformers 5. A conversion replaces them with ``GENERIC_CLASS``."""


def needs_conversion(folder: Path) -> bool:
    """Returns whether ``convert_tokenizer`` would change the files."""
    config = read_tokenizer_config(folder)
    is_replaced = tokenizer_class(folder, config).removesuffix("Fast") in REPLACED_BY_TRANSFORMERS_5
    if is_replaced or is_version_5(config) or not (folder / TOKENIZER).exists():
        return True
    # transformers overrides add_prefix_space of tokenizer.json with that of tokenizer_config.json,
    # but other libraries do not. So the two must be equal.
    pre_tokenizer = read_json(folder / TOKENIZER).get("pre_tokenizer") or {}
    is_byte_level = pre_tokenizer.get("type") == "ByteLevel"
    has_prefix_space = is_byte_level and pre_tokenizer.get("add_prefix_space")
    return bool(has_prefix_space) != bool(config.get("add_prefix_space"))


def convert_tokenizer(folder: Path) -> None:
    """Rewrites a folder's files so that transformers 4 and 5 load the same tokenizer.

    transformers 4 cannot read the settings of version 5. Version 4 may add more special tokens.
    Classes of version 5 may ignore how ``tokenizer.json`` normalizes and splits text. Both versions
    can convert ``tokenizer.model``, but version 5 adds BOS only if the settings say so.

    Raises:
        RecipeError: transformers cannot load the tokenizer, before or after the conversion.
    """
    if needs_conversion(folder):
        _rewrite(folder)
    load_tokenizer(folder)


def _rewrite(folder: Path) -> None:
    config = read_tokenizer_config(folder)
    # Sets the defaults of KNOWN_CLASSES, because GENERIC_CLASS has others in transformers 4.
    config = {"model_input_names": ["input_ids", "attention_mask"], **config}
    if tokenizer_class(folder, config).removesuffix("Fast") in WITHOUT_JSON[SENTENCEPIECE]:
        config = {"padding_side": "left", **config}
    if not (folder / TOKENIZER).is_file() or not is_version_5(config):
        tokenizer = load_tokenizer(folder)
        tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
        # special_tokens_map also has the default tokens of the class, which no file names.
        config = tokenizer.special_tokens_map | config
    extra_tokens = config.get("extra_special_tokens")
    converted = {key: value for key, value in config.items() if key not in DROPPED_SETTINGS}
    if isinstance(extra_tokens, dict):  # the type that transformers 4 expects
        converted["extra_special_tokens"] = extra_tokens
    elif extra_tokens:
        converted["additional_special_tokens"] = extra_tokens
    pre_tokenizer = read_json(folder / TOKENIZER).get("pre_tokenizer") or {}
    if "add_prefix_space" in pre_tokenizer:  # transformers 4 would set it to False
        converted["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    write_json(folder / CONFIG, {**converted, "tokenizer_class": GENERIC_CLASS}, indent=2)
