"""Checks ``generation_config.json``, with which transformers and lm-eval generate text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError
from recipes.core.files import read_json

GENERATION_CONFIG = "generation_config.json"


# The checks compare types with ``is``, because isinstance(True, int) is true.
def _is_positive_integer(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_non_negative_integer(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_positive_number(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_list_of_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)


def _is_watermark(settings: Any) -> bool:
    return isinstance(settings, dict) and all(
        key in WATERMARK_SETTINGS and WATERMARK_SETTINGS[key](value)
        for key, value in settings.items()
    )


def _is_never_valid(value: Any) -> bool:
    return False


SETTINGS: Mapping[str, Callable[[Any], bool]] = {
    "bad_words_ids": lambda value: isinstance(value, list) and all(map(_is_list_of_ids, value)),
    "cache_implementation": lambda value: value in ("dynamic", "offloaded", "static"),
    "compile_config": _is_never_valid,  # must be a CompileConfig, which JSON cannot hold
    "early_stopping": lambda value: value in (True, False, "never"),
    "encoder_repetition_penalty": _is_positive_number,
    "guidance_scale": _is_number,
    "max_new_tokens": _is_positive_integer,
    "max_time": _is_number,
    "min_length": _is_non_negative_integer,
    "min_new_tokens": _is_non_negative_integer,
    "no_repeat_ngram_size": _is_non_negative_integer,
    "num_beams": _is_positive_integer,
    "num_return_sequences": _is_positive_integer,
    "pad_token_id": lambda value: type(value) is int,
    "repetition_penalty": _is_positive_number,
    "suppress_tokens": _is_list_of_ids,
    "begin_suppress_tokens": _is_list_of_ids,
    "top_k": _is_non_negative_integer,
    "watermarking_config": _is_watermark,
    # Each of the next keys chooses a generation method whose code transformers 4.57 downloads from
    # the hub. The values that are allowed do not choose the method.
    "constraints": _is_never_valid,
    "dola_layers": _is_never_valid,
    "force_words_ids": _is_never_valid,
    "num_beam_groups": lambda value: value == 1,
    "penalty_alpha": lambda value: value == 0,
}
"""Maps each setting to the check that its value must pass. If the value fails, transformers cannot
load the model or generate text. Null is valid, except for the keys of ``NEVER_NULL``."""
NEVER_NULL = ("early_stopping", "num_beams", "num_return_sequences")
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
WATERMARK_SETTINGS: Mapping[str, Callable[[Any], bool]] = {
    "bias": _is_number,
    "context_width": _is_positive_integer,
    "greenlist_ratio": lambda value: _is_number(value) and 0 <= value <= 1,
    "hashing_key": lambda value: type(value) is int,
    "seeding_scheme": lambda value: value in ("lefthash", "selfhash"),
}
"""Maps each key that ``watermarking_config`` may have to the check that its value must pass."""


def generation_problems(folder: Path, vocab_size: int) -> Iterator[tuple[str, str]]:
    """Yields (what is wrong, how to fix it) for a folder's ``generation_config.json``. Torch-free.

    Args:
        folder: Hugging Face folder; the file may be absent.
        vocab_size: Number of token ids. Larger ids of special tokens are a problem.

    Raises:
        RecipeError: The file is not valid JSON.
    """
    file = folder / GENERATION_CONFIG
    config = read_json(file) if file.is_file() else {}
    for key in ARGUMENTS:
        if key in config:
            yield (
                f"{GENERATION_CONFIG} has {key}, an argument of generate() and not a setting.",
                f"remove {key}",
            )
    for key, is_valid in SETTINGS.items():
        is_set = key in config and (config[key] is not None or key in NEVER_NULL)
        if is_set and not is_valid(config[key]):
            yield (
                f"{GENERATION_CONFIG} has {key}={config[key]!r}, which transformers refuses.",
                f"remove or correct {key}",
            )
    sequences, beams = config.get("num_return_sequences", 1), config.get("num_beams", 1)
    if type(sequences) is int and sequences > 1:
        has_enough_beams = type(beams) is int and sequences <= beams
        # Without beam search, only sampling returns several different sequences.
        is_possible = config.get("do_sample") if beams == 1 else has_enough_beams
        if not is_possible:
            yield (
                f"{GENERATION_CONFIG} has num_return_sequences={sequences} with num_beams={beams} "
                f"and do_sample={config.get('do_sample')}, which transformers does not accept.",
                f"remove num_return_sequences, or set num_beams to {sequences} or more",
            )
    ids = [*_as_list(config.get("bos_token_id")), *_as_list(config.get("eos_token_id"))]
    if invalid := [i for i in ids if type(i) is not int or not 0 <= i < vocab_size]:
        yield (
            f"{GENERATION_CONFIG} has the token id {invalid[0]!r}: must be from 0 to "
            f"{vocab_size - 1}, the last id of the vocabulary.",
            "correct bos_token_id and eos_token_id",
        )


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
        raise RecipeError(
            f"transformers refuses {GENERATION_CONFIG}: {type(error).__name__}: {reason}.",
            f"correct or remove {GENERATION_CONFIG}",
        ) from error
