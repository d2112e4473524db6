"""Checks ``generation_config.json``, with which transformers and lm-eval generate text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_convert.config_keys import GENERATION_KEYS, MAX_INTEGER, is_version
from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json

GENERATION_CONFIG = "generation_config.json"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that have an effect only with ``do_sample``."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


# The checks compare types with ``is``, because isinstance(True, int) is true.
def _is_positive_integer(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_INTEGER


def _is_non_negative_integer(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INTEGER


def _is_number(value: Any) -> bool:
    # The comparison is false for NaN, infinity, and integers of more than 64 bits.
    return type(value) in (int, float) and abs(value) <= MAX_INTEGER


def _is_flag(value: Any) -> bool:
    return type(value) in (bool, int) and value in (0, 1)


def _is_positive_number(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_list_of_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)


WATERMARK_SETTINGS: Mapping[str, Callable[[Any], bool]] = {
    "bias": _is_number,
    "context_width": _is_positive_integer,
    "greenlist_ratio": lambda value: _is_number(value) and 0 <= value <= 1,
    "hashing_key": lambda value: type(value) is int,
    "seeding_scheme": lambda value: value in ("lefthash", "selfhash"),
}
"""Maps each key that ``watermarking_config`` may have to the check that its value must pass."""


def _is_watermark(settings: Any) -> bool:
    return isinstance(settings, dict) and all(
        key in WATERMARK_SETTINGS and WATERMARK_SETTINGS[key](value)
        for key, value in settings.items()
    )


def _is_never_valid(value: Any) -> bool:
    return False


FLAGS = (
    *("do_sample", "output_scores", "remove_invalid_values", "renormalize_logits"),
    *("return_dict_in_generate", "use_cache"),
)
NUMBERS = (
    *("diversity_penalty", "epsilon_cutoff", "eta_cutoff", "guidance_scale", "length_penalty"),
    *("max_time", "min_p", "temperature", "top_p", "typical_p"),
)
SETTINGS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(FLAGS, _is_flag),
    **dict.fromkeys(NUMBERS, _is_number),
    "bad_words_ids": lambda value: isinstance(value, list) and all(map(_is_list_of_ids, value)),
    "cache_implementation": lambda value: value in ("dynamic", "offloaded", "static"),
    "compile_config": _is_never_valid,  # must be a CompileConfig, which JSON cannot hold
    "early_stopping": lambda value: value in (True, False, "never"),
    "encoder_repetition_penalty": _is_positive_number,
    "max_new_tokens": _is_positive_integer,
    "max_length": _is_positive_integer,
    "min_length": _is_non_negative_integer,
    "min_new_tokens": _is_non_negative_integer,
    "no_repeat_ngram_size": _is_non_negative_integer,
    "num_beams": _is_positive_integer,
    "num_return_sequences": _is_positive_integer,
    "repetition_penalty": _is_positive_number,
    "suppress_tokens": _is_list_of_ids,
    "begin_suppress_tokens": _is_list_of_ids,
    "top_k": _is_non_negative_integer,
    "transformers_version": is_version,
    "watermarking_config": _is_watermark,
    # Each of the next keys can choose a generation method whose code transformers 4.57 downloads
    # from the hub. Values that choose such a method are invalid.
    "constraints": _is_never_valid,
    "dola_layers": _is_never_valid,
    "force_words_ids": _is_never_valid,
    "num_beam_groups": lambda value: value == 1,
    "penalty_alpha": lambda value: value == 0,
}
"""Maps each setting to the check that its value must pass. If the value fails, transformers cannot
load the model or generate text. Null is valid, except for the keys of ``NEVER_NULL``."""
NEVER_NULL = ("early_stopping", "num_beams", "num_return_sequences", "transformers_version")
SAMPLED_VALUES: Mapping[str, Callable[[Any], bool]] = {
    "min_p": lambda value: 0 <= value <= 1,
    "temperature": lambda value: value == 1 or (type(value) is float and value > 0),
    "top_p": lambda value: value >= 0,
    "typical_p": lambda value: value > 0,
}
"""Maps settings to the check that transformers makes if ``do_sample`` is true."""
ARGUMENTS = (
    "assistant_model",
    "logits_processor",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
    "synced_gpus",
    "use_model_defaults",
)
"""Arguments of transformers' ``generate`` method. transformers refuses a file that has one."""


def generation_problems(folder: Path, vocab_size: int) -> Iterator[tuple[str, str]]:
    """Yields (what is wrong, how to fix it) for a Hugging Face folder's settings of generation.

    The settings are in ``generation_config.json``, or else in ``config.json``. Token ids must be
    less than ``vocab_size``.

    Raises:
        RecipeError: The file is not valid JSON.
    """
    file, config = _read_settings(folder)
    for key in ARGUMENTS:
        if key in config:
            yield f"{file} has {key}, an argument of generate() and not a setting.", f"remove {key}"
    yield from _invalid_values(file, config)
    sequences, beams = config.get("num_return_sequences", 1), config.get("num_beams", 1)
    if type(sequences) is int and sequences > 1:
        has_enough_beams = type(beams) is int and sequences <= beams
        # Without beam search, only sampling returns several different sequences.
        is_possible = config.get("do_sample") if beams == 1 else has_enough_beams
        if not is_possible:
            yield (
                f"{file} has num_return_sequences={sequences} with num_beams={beams} "
                f"and do_sample={config.get('do_sample')}, which transformers does not accept.",
                f"remove num_return_sequences, or set num_beams to {sequences} or more",
            )
    yield from _invalid_ids(file, config, vocab_size)


def _invalid_values(file: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, is_valid in SETTINGS.items():
        value = config.get(key)
        if key not in config or (value is None and key not in NEVER_NULL):
            continue
        checks = [is_valid]
        if config.get("do_sample") and key in SAMPLED_VALUES:
            checks.append(SAMPLED_VALUES[key])  # expects a value that is_valid accepts
        if not all(check(value) for check in checks):
            what = f"{file} has {key}={value!r}, which transformers refuses."
            yield what, f"remove or correct {key}"


def _invalid_ids(
    file: str, config: Mapping[str, Any], vocab_size: int
) -> Iterator[tuple[str, str]]:
    for key in ("bos_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        ids = _as_list(config.get(key))
        if invalid := [i for i in ids if type(i) is not int or not 0 <= i < vocab_size]:
            yield (
                f"{file} has the token id {invalid[0]!r}: must be from 0 to "
                f"{vocab_size - 1}, the last id of the vocabulary.",
                f"correct {key}",
            )
    padding = config.get("pad_token_id")
    # Many files have a negative id, which means no padding token.
    if padding is not None and not (type(padding) is int and -vocab_size <= padding < vocab_size):
        yield (
            f"{file} has pad_token_id={padding!r}, which transformers refuses: must be less than "
            f"{vocab_size}, the size of the vocabulary.",
            "set pad_token_id to the id of a token, or remove it",
        )


def _read_settings(folder: Path) -> tuple[str, dict[str, Any]]:
    """Returns the name of the file that has the settings of generation, and the settings."""
    if (folder / GENERATION_CONFIG).is_file():
        return GENERATION_CONFIG, read_json(folder / GENERATION_CONFIG)
    return "config.json", _settings_in_config(read_json(folder / "config.json"))


def _settings_in_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of generation in an old ``config.json``; none if it has only token ids.

    Without ``generation_config.json``, transformers uses these settings. Settings without effect
    are left out, because transformers refuses to write a model that has them.
    """
    settings = {key: config[key] for key in GENERATION_KEYS if config.get(key) is not None}
    if not settings:
        return {}
    without_effect = set() if settings.get("do_sample") else {*SAMPLING}
    if settings.get("num_beams", 1) == 1:
        without_effect |= {"early_stopping", "length_penalty"}
    if not settings.get("return_dict_in_generate"):
        without_effect |= {"output_scores"}
    tokens = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
    return tokens | {key: v for key, v in settings.items() if key not in without_effect}


def move_settings(config: Mapping[str, Any], folder: Path) -> None:
    """Writes the settings of generation in an old ``config.json`` to ``generation_config.json``.

    An existing ``generation_config.json`` in ``folder`` stays as it is.
    """
    settings = _settings_in_config(config)
    if settings and not (folder / GENERATION_CONFIG).is_file():
        write_json(folder / GENERATION_CONFIG, settings, indent=2)


def read_end_ids(folder: Path) -> list[int]:
    """Returns the ids at which generation ends (``eos_token_id``); empty if no file has them."""
    for file in (folder / GENERATION_CONFIG, folder / "config.json"):
        if file.is_file() and (ids := _as_list(read_json(file).get("eos_token_id"))):
            return ids
    return []


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def require_loadable_generation_config(folder: Path) -> None:
    """Checks that transformers loads a folder's ``generation_config.json``, if there is one.

    Raises:
        RecipeError: transformers refuses the settings.
    """
    from transformers import GenerationConfig

    if not (folder / GENERATION_CONFIG).is_file():
        return
    try:
        GenerationConfig.from_pretrained(folder)
    # A value of a wrong type can raise any error: transformers does not check types.
    except Exception as error:
        reason = str(error).partition("\n")[0]  # the first line
        what = f"transformers refuses {GENERATION_CONFIG}: {type(error).__name__}: {reason}."
        raise RecipeError(what, f"correct or remove {GENERATION_CONFIG}") from error
