"""Reads tokenizer files, and rewrites them so that transformers 4 and 5 load the same tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTENCEPIECE = "tokenizer.model"
GENERIC = "PreTrainedTokenizerFast"
"""Class that uses ``tokenizer.json`` unchanged, in transformers 4 and 5."""
CLASSES = {
    "CodeLlamaTokenizer",
    "GPT2Tokenizer",
    "LlamaTokenizer",
    "PreTrainedTokenizer",
    "Qwen2Tokenizer",
}
"""Tokenizer classes of transformers 4 for the supported families, without the suffix ``Fast``."""
ONLY_TRANSFORMERS_5 = ("backend", "extra_special_tokens", "is_local", "local_files_only")
"""Settings that transformers 5 writes. Version 4 does not have them, or expects another type:
``extra_special_tokens`` is a dict there."""


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Returns ``tokenizer_config.json``, or an empty dict if there is none."""
    file = folder / CONFIG
    return read_json(file) if file.is_file() else {}


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Returns the id of every token, added tokens included, without transformers.

    Raises:
        RecipeError: There is no tokenizer, or none that transformers 4 can load without running
            code of the model.
    """
    config = read_tokenizer_config(folder)
    name = str(config.get("tokenizer_class") or GENERIC)
    if (folder / TOKENIZER).is_file():
        vocabulary = _vocabulary_of_json(folder / TOKENIZER)
    elif (folder / SENTENCEPIECE).is_file():
        vocabulary = _vocabulary_of_sentencepiece(folder / SENTENCEPIECE)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary = dict(read_json(folder / "vocab.json"))
    else:
        raise RecipeError(
            f"{folder} has no tokenizer: neither {TOKENIZER} nor {SENTENCEPIECE}.",
            "save the tokenizer beside the model (tokenizer.save_pretrained). If there is only "
            "tekken.json, use the version of the model for transformers, which has tokenizer.json",
        )
    if not _is_of_transformers_5(config) and name.removesuffix("Fast") not in CLASSES:
        raise RecipeError(
            f"{folder / CONFIG} names the class {name}, which is unknown here or would run code of "
            "the model.",
            f'set tokenizer_class to "{GENERIC}" if {TOKENIZER} is complete',
        )
    return {**vocabulary, **_added_tokens(folder, config)}


def needs_conversion(folder: Path) -> bool:
    """Returns whether ``convert_tokenizer`` would change the files."""
    return _is_of_transformers_5(read_tokenizer_config(folder)) or not (folder / TOKENIZER).exists()


def convert_tokenizer(folder: Path) -> None:
    """Rewrites a folder's files so that transformers 4 and 5 load the same tokenizer from them.

    transformers 4 cannot read the settings of version 5, and its classes may add other special
    tokens. The versions also convert ``tokenizer.model`` differently: version 5 adds BOS only if
    the settings say so.

    Raises:
        RecipeError: transformers cannot convert the sentencepiece model.
    """
    if not needs_conversion(folder):
        return
    config = read_tokenizer_config(folder)
    if not (folder / TOKENIZER).is_file():
        _write_tokenizer_json(folder)
    special = config.get("extra_special_tokens")
    converted = {key: value for key, value in config.items() if key not in ONLY_TRANSFORMERS_5}
    if isinstance(special, dict):  # as transformers 4 writes it
        converted["extra_special_tokens"] = special
    elif special:
        converted["additional_special_tokens"] = special
    write_json(folder / CONFIG, {**converted, "tokenizer_class": GENERIC}, indent=2)


def _is_of_transformers_5(config: Mapping[str, Any]) -> bool:
    return (
        config.get("tokenizer_class") == "TokenizersBackend"
        or "backend" in config
        or isinstance(config.get("extra_special_tokens"), list)
    )


def _write_tokenizer_json(folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"transformers cannot load the tokenizer in {folder}: {str(error).splitlines()[0]}",
            f"save it as {TOKENIZER} with transformers' fast tokenizer",
        ) from error
    if not tokenizer.is_fast:
        raise RecipeError(
            f"transformers has no fast tokenizer for {folder}.", f"convert it to {TOKENIZER} first"
        )
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))


def _vocabulary_of_json(file: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    try:
        return dict(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True))
    except Exception as error:  # the library raises Exception itself
        raise RecipeError(
            f"{file} is not a tokenizer: {str(error).splitlines()[0]}.", "download it again"
        ) from error


def _vocabulary_of_sentencepiece(file: Path) -> dict[str, int]:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise RecipeError(f"{file} is not a sentencepiece model.", "download it again") from error
    return {model.id_to_piece(i): i for i in range(model.get_piece_size())}


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Returns tokens that a tokenizer adds to its vocabulary."""
    added = {t["content"]: int(i) for i, t in (config.get("added_tokens_decoder") or {}).items()}
    if (file := folder / "added_tokens.json").is_file():
        added |= read_json(file)
    return added
