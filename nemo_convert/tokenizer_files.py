"""Reads the files of a tokenizer, and refuses settings with which transformers fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_convert.vocabularies import (
    SAMPLE,
    first_line,
    vocabulary_of_json,
    vocabulary_of_sentencepiece,
    vocabulary_of_vocab_json,
    without_panics,
)
from recipes.core.errors import RecipeError
from recipes.core.files import read_json

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTENCEPIECE, MERGES = "tokenizer.model", "merges.txt"
GENERIC_CLASS = "PreTrainedTokenizerFast"
"""Class that uses ``tokenizer.json`` unchanged, in transformers 4 and 5."""
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
KNOWN_CLASSES = {
    "CodeLlamaTokenizer",
    "GPT2Tokenizer",
    "LlamaTokenizer",
    "PreTrainedTokenizer",
    "Qwen2Tokenizer",
    "TokenizersBackend",
}
"""Tokenizer classes of the supported model families, without the suffix ``Fast``.
``TokenizersBackend`` is the name of ``GENERIC_CLASS`` in transformers 5."""
FAMILY_CLASSES = {"llama": "LlamaTokenizer", "mistral": "LlamaTokenizer"}
"""Tokenizer classes by ``model_type``, for folders that name no class. All other model types use
``Qwen2Tokenizer``."""
WITHOUT_JSON = {
    SENTENCEPIECE: ("CodeLlamaTokenizer", "LlamaTokenizer"),
    MERGES: ("GPT2Tokenizer", "Qwen2Tokenizer"),
}
"""Files that can replace ``tokenizer.json``, and the classes that can read them."""
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
SPECIAL_TOKENS = tuple(f"{r}_token" for r in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Settings with one special token each."""
LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "CodeLlamaTokenizer": LLAMA_TOKENS
    | {"prefix_token": "▁<PRE>", "middle_token": "▁<MID>"}
    | {"suffix_token": "▁<SUF>", "eot_token": "▁<EOT>"},
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "LlamaTokenizer": LLAMA_TOKENS,
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
}
"""Default special tokens of classes in transformers 4. Files override them, also with ``null``."""
TOKEN_LIST_TYPES: Mapping[str, tuple[type, ...]] = {
    "additional_special_tokens": (list,),
    "extra_special_tokens": (list, dict),
}
"""Settings with several special tokens, and their types."""
TOKEN_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
"""Boolean fields of a special token that is stored as an object."""
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Regular expression with which Qwen2's tokenizer splits text into words."""


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Returns ``tokenizer_config.json``, or an empty dict if there is none."""
    file = folder / CONFIG
    return read_json(file) if file.is_file() else {}


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Maps every token, including added tokens, to its id. Does not import transformers.

    Raises:
        RecipeError: There is no tokenizer, or one of its files or settings is invalid. Or its class
            is unknown, so that loading the tokenizer might run code of the model.
    """
    config = read_tokenizer_config(folder)
    class_name = tokenizer_class(folder, config)
    if (folder / TOKENIZER).is_file():
        file, vocabulary = TOKENIZER, vocabulary_of_json(folder / TOKENIZER)
    elif (folder / SENTENCEPIECE).is_file():
        file, vocabulary = SENTENCEPIECE, vocabulary_of_sentencepiece(folder / SENTENCEPIECE)
    elif (folder / "vocab.json").is_file() and (folder / MERGES).is_file():
        file, vocabulary = MERGES, vocabulary_of_vocab_json(folder)
    else:
        raise RecipeError(
            f"{folder} has no tokenizer: neither {TOKENIZER} nor {SENTENCEPIECE}.",
            "save the tokenizer beside the model (tokenizer.save_pretrained). If there is only "
            "tekken.json, use the version of the model for transformers, which has tokenizer.json",
        )
    if class_name.removesuffix("Fast") not in KNOWN_CLASSES:
        raise RecipeError(
            f"{folder / CONFIG} names the class {class_name}, which is unknown here or would run "
            "code of the model.",
            f'set tokenizer_class to "{GENERIC_CLASS}" if {TOKENIZER} is complete',
        )
    # Every known class reads tokenizer.json, which is therefore not in WITHOUT_JSON.
    if file in WITHOUT_JSON and class_name.removesuffix("Fast") not in WITHOUT_JSON[file]:
        raise RecipeError(
            f"{folder}: the class {class_name} does not read {file}, and there is no {TOKENIZER}.",
            f"set tokenizer_class in {CONFIG} to {' or '.join(WITHOUT_JSON[file])}",
        )
    # Both loops stop at the first invalid setting.
    for setting, fix in _invalid_settings(folder, config, class_name):
        raise RecipeError(f"{folder / CONFIG}: invalid {setting}.", fix)
    for setting, fix in _invalid_tokens(_special_tokens_map(folder, config)):
        raise RecipeError(f"{folder / SPECIAL_TOKENS_MAP}: invalid {setting}.", fix)
    _require_utf8_templates(folder)
    # transformers gives the next free ids to tokens that are not in ``file``, even if another file
    # lists other ids. Only the number of these tokens matters here, not their order.
    tokens = [*_added_tokens(folder, config), *sorted(_special_tokens(folder, config))]
    new_tokens = [token for token in dict.fromkeys(tokens) if token not in vocabulary]
    next_id = max(vocabulary.values(), default=-1) + 1
    return vocabulary | {token: next_id + n for n, token in enumerate(new_tokens)}


def read_special_token(folder: Path, key: str) -> str | None:
    """Returns the special token of a setting such as ``eos_token``; ``None`` if there is none."""
    config = read_tokenizer_config(folder)
    defaults, special_map = _default_tokens(folder, config), _special_tokens_map(folder, config)
    return _token_text({**defaults, **config, **special_map}.get(key))


def tokenizer_class(folder: Path, config: Mapping[str, Any]) -> str:
    """Returns the tokenizer class that transformers chooses."""
    if config.get("tokenizer_class"):
        return str(config["tokenizer_class"])
    file = folder / "config.json"
    model_config = read_json(file) if file.is_file() else {}
    model_type = str(model_config.get("model_type", "llama"))
    family_class = FAMILY_CLASSES.get(model_type, "Qwen2Tokenizer")
    return str(model_config.get("tokenizer_class") or family_class)


def _invalid_settings(
    folder: Path, config: Mapping[str, Any], class_name: str
) -> Iterator[tuple[str, str]]:
    """Yields (setting and value, fix) for each setting that makes transformers fail."""
    yield from _invalid_values(config)
    for key in _removable_settings(folder, config):
        yield f"{key}={config[key]!r}", "remove it"
    adds_bos = class_name in LLAMA_CLASSES and config.get("add_bos_token", True)
    if adds_bos and "bos_token" in config and config["bos_token"] is None:
        yield "bos_token=None", "set add_bos_token to false, or name the token"
    has_prefix_space = config.get("add_prefix_space") is not None
    needs_sentencepiece = has_prefix_space and class_name in LLAMA_CLASSES
    if needs_sentencepiece and not (folder / SENTENCEPIECE).is_file():
        yield (
            f"add_prefix_space={config['add_prefix_space']}: with it, {class_name} reads "
            f"{SENTENCEPIECE}, which is absent",
            f'add {SENTENCEPIECE}, or set tokenizer_class to "{GENERIC_CLASS}"',
        )
    yield from _invalid_tokens(config)


def _removable_settings(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Yields settings with which transformers fails, or reads a file of another folder."""
    has_json = (folder / TOKENIZER).is_file()
    yield from (key for key in ("from_slow", "tokenizer_object") if config.get(key))
    never_null = ("extra_special_tokens", "auto_map")
    yield from (key for key in never_null if key in config and config[key] is None)
    # The values are paths on the machine where the tokenizer was saved.
    paths = ("tokenizer_file",) if has_json else ("vocab_file", "merges_file")
    # Settings become arguments of a constructor, which already has the argument ``self``.
    yield from (key for key in ("self", *paths) if key in config)


def _invalid_values(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (setting and value, fix) for each invalid setting that is not a special token."""
    for key in ("padding_side", "truncation_side"):
        if config.get(key, "left") not in ("left", "right"):
            yield f"{key}={config[key]!r}", 'set it to "left" or "right"'
    # ``isinstance`` would accept a bool here, because bool is a subclass of int.
    if type(length := config.get("model_max_length", 0)) not in (int, float, type(None)):
        yield f"model_max_length={length!r}", "set it to a number"
    if type(splits := config.get("split_special_tokens", False)) is not bool:
        yield f"split_special_tokens={splits!r}", "set it to true or false"
    if not isinstance(arguments := config.get("init_inputs", []), list):
        yield f"init_inputs={arguments!r}", "remove it"
    if type(space := config.get("add_prefix_space")) not in (bool, type(None)):
        yield f"add_prefix_space={space!r}", "set it to true or false"
    names = config.get("model_input_names", ["input_ids"])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        yield f"model_input_names={names!r}", "remove it, or set it to a list of names"


def _invalid_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (setting and value, fix) for each invalid setting with special tokens."""
    for key in SPECIAL_TOKENS:
        token = config.get(key)
        if token is not None and not _is_token(token):
            yield f"{key}={token!r}", 'set it to the text of the token, such as "</s>"'
    for key, types in TOKEN_LIST_TYPES.items():
        tokens = config.get(key) or []
        if not isinstance(tokens, types) or not all(map(_is_token, _as_list(tokens))):
            yield f"{key}={tokens!r}", "set it to a list of tokens"
    decoder = config.get("added_tokens_decoder")  # other types are refused by _added_tokens
    for token in decoder.values() if isinstance(decoder, dict) else []:
        if isinstance(token, dict) and not _has_valid_flags(token):
            yield f"added_tokens_decoder with {token!r}", "set its flags to true or false"


def _require_utf8_templates(folder: Path) -> None:
    """Refuses a folder with a chat template that is not in UTF-8."""
    files = folder.glob("chat_template*.jinja")
    for file in (*files, *folder.glob("additional_chat_templates/*.jinja")):
        try:
            if file.is_file():
                file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{file} is not in UTF-8.", "save it in UTF-8") from error


def _is_token(token: object) -> bool:
    """Returns whether a value is a text, or an ``AddedToken`` object with a text."""
    if isinstance(token, dict):
        is_added_token = token.get("__type") == "AddedToken" and _has_valid_flags(token)
        return is_added_token and isinstance(token.get("content"), str)
    return isinstance(token, str)


def _has_valid_flags(token: Mapping[str, Any]) -> bool:
    return all(type(token.get(flag, False)) is bool for flag in TOKEN_FLAGS)


def _token_text(token: object) -> str | None:
    """Returns the text of a special token, which is a string, an object or ``None``."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _as_list(tokens: Any) -> list[Any]:
    return list(tokens.values() if isinstance(tokens, dict) else tokens)


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Yields the special tokens. transformers gives new ids to those without an id."""
    defaults, special_map = _default_tokens(folder, config), _special_tokens_map(folder, config)
    # In transformers 4, special_map overrides single tokens. Below, it extends lists of tokens.
    settings = {**defaults, **config, **special_map}
    if "pad_token" not in settings and (folder / TOKENIZER).is_file():
        padding = read_json(folder / TOKENIZER).get("padding") or {}
        settings["pad_token"] = padding.get("pad_token")
    tokens = [settings.get(key) for key in (*SPECIAL_TOKENS, *defaults)]
    for key, types in TOKEN_LIST_TYPES.items():
        for source in (config, special_map):
            if isinstance(source.get(key), types):
                tokens += _as_list(source[key])
    yield from filter(None, map(_token_text, tokens))


def _default_tokens(folder: Path, config: Mapping[str, Any]) -> Mapping[str, str]:
    """Returns the class's default special tokens; none if transformers 5 wrote the settings."""
    name = tokenizer_class(folder, config).removesuffix("Fast")
    return {} if is_version_5(config) else CLASS_TOKENS.get(name, {})


def _special_tokens_map(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that transformers 4 reads from ``special_tokens_map.json``.

    Adds the key ``__type`` to tokens that are objects, as in ``tokenizer_config.json``.
    """
    file = folder / SPECIAL_TOKENS_MAP
    settings = read_json(file) if file.is_file() else {}
    if "added_tokens_decoder" in config:  # transformers 4 then ignores special_tokens_map.json
        return {}

    def with_type(token: object) -> object:
        return {"__type": "AddedToken", **token} if isinstance(token, dict) else token

    return {
        key: [*map(with_type, value)] if isinstance(value, list) else with_type(value)
        for key, value in settings.items()
    }


def is_replaced_by_transformers_5(folder: Path, hf_architecture: str) -> bool:
    """Returns whether transformers 5 replaces how a folder's tokenizer normalizes or splits text.

    Version 5 uses Qwen2's class for every Qwen2 model, and for other models whose tokenizer names
    it, except Mistral models. The class ignores how ``tokenizer.json`` normalizes and splits text.
    """
    class_name = tokenizer_class(folder, read_tokenizer_config(folder))
    names_qwen2 = class_name.startswith("Qwen2Tokenizer")
    is_mistral = hf_architecture == "MistralForCausalLM"
    uses_qwen2 = hf_architecture == "Qwen2ForCausalLM" or (names_qwen2 and not is_mistral)
    if not uses_qwen2:
        return False
    if not (folder / TOKENIZER).is_file():
        return not names_qwen2  # no replacement if version 4 uses Qwen2's class, too
    tokenizer = read_json(folder / TOKENIZER)
    steps = (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    splits_like_qwen2 = steps[0].get("pattern") == {"Regex": QWEN2_REGEX}
    normalizes_like_qwen2 = tokenizer.get("normalizer") == {"type": "NFC"}
    return not (splits_like_qwen2 and normalizes_like_qwen2)


def is_version_5(config: Mapping[str, Any]) -> bool:
    """Returns whether transformers 5 wrote the settings."""
    return (
        config.get("tokenizer_class") == "TokenizersBackend"
        or "backend" in config
        or isinstance(config.get("extra_special_tokens"), list)
    )


def load_tokenizer(folder: Path) -> Any:
    """Loads a folder's fast tokenizer with transformers. Never runs code of the model.

    Raises:
        RecipeError: transformers cannot load the tokenizer or encode text, or has no fast class.
    """
    from transformers import AutoTokenizer

    problem = "load"
    try:
        with without_panics():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            problem = "encode text with"
            tokenizer(SAMPLE)
    except Exception as error:  # transformers does not check the types of settings
        raise RecipeError(
            f"transformers cannot {problem} the tokenizer: {type(error).__name__}: "
            f"{first_line(error)}.",
            f"correct {CONFIG}, or save {TOKENIZER} with transformers' fast tokenizer",
        ) from error
    if not tokenizer.is_fast:
        what = "transformers has no fast tokenizer for the model."
        raise RecipeError(what, f"convert it to {TOKENIZER} first")
    return tokenizer


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Returns the tokens that a folder's files add to the vocabulary, in the order of their ids."""
    file = folder / "added_tokens.json"
    # transformers 4 ignores the file if added_tokens_decoder exists.
    uses_file = file.is_file() and "added_tokens_decoder" not in config
    added = read_json(file) if uses_file else {}
    decoder = config.get("added_tokens_decoder", {})
    fix = "correct it, or download the tokenizer again"
    try:
        added |= {token["content"]: int(i) for i, token in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"{folder / CONFIG}: invalid added_tokens_decoder.", fix) from error
    if tokens_without_id := [token for token, i in added.items() if type(i) is not int]:
        raise RecipeError(f"{file}: the id of {tokens_without_id[0]!r} is not a number.", fix)
    return sorted(added, key=lambda token: int(added[token]))
