"""Checks that llama.cpp tokenizes as transformers does. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_convert.tokenizer_files import TOKENIZER
from recipes.core.errors import RecipeError

SPACE = "▁"
"""Character that represents a space in sentencepiece's tokens."""
SENTENCEPIECE_STEPS = (
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
)
"""The only normalizer steps that llama.cpp supports for a BPE tokenizer with byte fallback."""
BYTE_LEVEL_STEPS = ({"type": "NFC"},)
"""The only normalizer step that is allowed for byte-level BPE. llama.cpp leaves it out, but almost
all text is in this form already."""
# Parts of the regular expressions in PRE_TOKENIZERS. _PREFIX is the character that may be part of
# the word that follows it, such as a space. _OTHER matches punctuation, line ends and other spaces.
_PREFIX = r"[^\r\n\p{L}\p{N}]?"
_WORD = rf"{_PREFIX}\p{{L}}+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PRE_TOKENIZERS = {
    rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_OTHER}": "llama-bpe",
    rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_OTHER}": "qwen2",
    rf"{_PREFIX}{_UPPER}*{_LOWER}+|{_PREFIX}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""Maps the regular expression with which a pre-tokenizer splits text to llama.cpp's name for it."""


def _require_normalizer_steps(
    tokenizer: Mapping[str, Any], supported: Sequence[Mapping[str, Any]]
) -> None:
    """Refuses a normalizer with a step that is not in ``supported``."""
    normalizer = tokenizer.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = normalizer.get("normalizers", [normalizer])  # one step, unless it is a Sequence
    if any(step not in supported for step in steps):
        raise RecipeError(
            f"{TOKENIZER} has normalizer={normalizer}, which llama.cpp does not support.",
            "leave export_gguf out (gguf=null)",
        )


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str | None:
    """Returns llama.cpp's name of the pre-tokenizer of a ``tokenizer.json``.

    Returns ``None`` for BPE with byte fallback, which llama.cpp applies without a pre-tokenizer.

    Raises:
        RecipeError: The tokenizer is not BPE, llama.cpp does not support its normalizer or
            pre-tokenizer, or neither ``PRE_TOKENIZERS`` nor this function has a name for it.
    """
    model = tokenizer.get("model") or {}
    if "merges" not in model:  # the type is no criterion: old files do not have it
        raise RecipeError(
            f"{TOKENIZER} has the type {model.get('type')}; only BPE can be written as GGUF.",
            "leave export_gguf out (gguf=null)",
        )
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    if model.get("byte_fallback"):
        _require_normalizer_steps(tokenizer, SENTENCEPIECE_STEPS)
        # llama.cpp does not split the text before it merges, and neither does this Metaspace.
        is_unsplit = steps[0].get("type") == "Metaspace" and not steps[0].get("split", True)
        if pre_tokenizer and not (len(steps) == 1 and is_unsplit):
            raise RecipeError(
                f"{TOKENIZER} has pre_tokenizer={pre_tokenizer}, which llama.cpp does not support.",
                "leave export_gguf out (gguf=null)",
            )
        return None
    _require_normalizer_steps(tokenizer, BYTE_LEVEL_STEPS)
    types = [step.get("type") for step in steps]
    # llama.cpp adds no space before a text, so such a pre-tokenizer gets no name.
    if any(step.get("add_prefix_space") for step in steps):
        types = []
    pattern = steps[0].get("pattern", {}).get("Regex")
    # If use_regex were true, ByteLevel would split the text a second time, with GPT-2's pattern.
    is_split_once = types == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True)
    # With another behavior, the matches of the pattern would be dropped or joined to other text.
    keeps_matches = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
    if is_split_once and keeps_matches and pattern in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[pattern]
    splits_words = steps[-1].get("use_regex", True)
    if types == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and splits_words:
        return "smollm"
    if types == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    raise RecipeError(
        f"pre_tokenizer={pre_tokenizer} has no known name in llama.cpp.",
        "leave export_gguf out (gguf=null), or add the name to PRE_TOKENIZERS in gguf_tokenizer.py",
    )
