"""Checks that llama.cpp tokenizes as transformers does. Does not import torch.

The rules follow llama.cpp's ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nemo_convert.generation_config import read_end_ids
from nemo_convert.tokenizer_files import (
    CONFIG,
    LLAMA_CLASSES,
    TOKENIZER,
    is_version_5,
    read_special_token,
    read_tokenizer_config,
    tokenizer_class,
)
from recipes.core.errors import RecipeError
from recipes.core.files import read_json

SPACE = "▁"
"""Character that represents a space in sentencepiece's tokens."""
PREPEND_SPACE = {"type": "Prepend", "prepend": SPACE}
REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
SENTENCEPIECE_STEPS = (PREPEND_SPACE, REPLACE_SPACES)
"""The only normalizer steps that llama.cpp supports for a BPE tokenizer with byte fallback."""
BYTE_LEVEL_STEPS = ({"type": "NFC"},)
"""The only normalizer step that is allowed for byte-level BPE. llama.cpp leaves it out, but almost
all text is in the form NFC already."""
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
IGNORE_MERGES = ("llama-bpe", "tekken")
"""Pre-tokenizers with which llama.cpp works as with ``ignore_merges``: it looks up each word in the
vocabulary before it merges. GGUF has no key for this setting."""
CONTROL_TOKENS = """
<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <EOT> _<EOT> [EOT]
<｜end▁of▁sentence｜> <end_of_utterance> <|eom_id|> <|fim_prefix|> <fim-prefix> <fim_prefix>
<｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|> <|fim_suffix|> <fim-suffix>
<fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|> <|fim_middle|>
<fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|> <|fim_pad|>
<fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>
<|file_sep|> <|return|> <|call|> <|flush|> <|calls|> </s> [EOS] <eos> <turn|>
<|tool_response> [e~[ <|channel|> <|message|> <|start|> <|constrain|>
"""
"""Tokens that llama.cpp never splits, even if they are not added tokens, separated by spaces."""
END_TOKENS = """
<|eot_id|> <|im_end|> <end_of_turn> <|endoftext|> <|end_of_text|> <|eom_id|> <EOT> [EOT] [EOS]
<｜end▁of▁sentence｜>
"""
"""Tokens at which llama.cpp stops generating, whatever the keys of the file say."""
FIX = "leave export_gguf out (gguf=null)"


def require_supported_files(folder: Path) -> None:
    """Checks a tokenizer as far as its files tell what transformers will load.

    Raises:
        RecipeError: llama.cpp would tokenize or stop differently, or GGUF cannot store the
            chat templates.
    """
    config = require_supported_config(folder)
    class_name = tokenizer_class(folder, config)
    if not (folder / "chat_template.jinja").is_file():  # transformers prefers this file
        chat_templates(config.get("chat_template"))
    if class_name in LLAMA_CLASSES and config.get("add_prefix_space") is not None:
        return  # transformers ignores tokenizer.json, so only a loaded tokenizer can be checked
    tokenizer = _with_settings(read_json(folder / TOKENIZER), config)
    require_supported(tokenizer)
    added_ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = {**tokenizer["model"].get("vocab", {}), **added_ids}
    bos, eos = (ids.get(read_special_token(folder, f"{role}_token")) for role in ("bos", "eos"))
    if class_name not in LLAMA_CLASSES:  # LLAMA_CLASSES replace the post-processor
        add_special_tokens(tokenizer, bos, eos)
    if eos is not None:
        end_token_ids(read_end_ids(folder), eos, {i: token for token, i in ids.items()})


def require_supported_config(folder: Path) -> dict[str, Any]:
    """Returns ``tokenizer_config.json``. Refuses settings that llama.cpp ignores."""
    config = read_tokenizer_config(folder)
    if config.get("split_special_tokens"):
        what = f"{CONFIG} has split_special_tokens=True. llama.cpp never splits special tokens."
        raise RecipeError(what, FIX)
    return config


def _with_settings(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a ``tokenizer.json`` with the settings that override it in transformers 4."""
    decoder = config.get("added_tokens_decoder", {})
    overrides = {token["content"]: token for token in decoder.values()}
    added = [t | overrides.get(t["content"], {}) for t in tokenizer.get("added_tokens", ())]
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    if pre_tokenizer.get("type") == "ByteLevel" and not is_version_5(config):
        prefix = config.get("add_prefix_space", False)
        pre_tokenizer = {**pre_tokenizer, "add_prefix_space": prefix}
    return {**tokenizer, "added_tokens": added, "pre_tokenizer": pre_tokenizer}


def chat_templates(value: object) -> str | list[dict[str, str]] | None:
    """Returns the value of ``chat_template`` as a text, or as a list of names and templates.

    Raises:
        RecipeError: GGUF cannot store the value, or would have no default template.
    """
    if value is None or isinstance(value, str):
        return value
    named = value
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        named = {item.get("name"): item.get("template") for item in value}
    if isinstance(named, dict) and "default" in named:
        are_texts = all(isinstance(text, str) for text in (*named, *named.values()))
        # Names become parts of GGUF's keys, so they must stay different, and none may be empty.
        gguf_names = {re.sub("[^A-Za-z0-9]", "_", str(name)) for name in named}
        if are_texts and len(gguf_names) == len(named) and "" not in gguf_names:
            return [{"name": name, "template": text} for name, text in named.items()]
    raise RecipeError(
        f"{CONFIG} has chat_template={str(value)[:100]}, which GGUF cannot store.",
        "set chat_template to a text, or to a list with different names, one of them default",
    )


def end_token_ids(
    end_ids: Sequence[int], eos: int | None, tokens: Mapping[int, str]
) -> dict[str, int]:
    """Maps GGUF's keys (eos, eot, eom) to the ids at which llama.cpp stops generating.

    Args:
        end_ids: Ids at which transformers stops.
        eos: Id of the tokenizer's ``eos_token``.
        tokens: Token of each id.

    Raises:
        RecipeError: There are too many ids. Or there is none, with which llama.cpp would stop at
            token 2 or 11.
    """
    ids = list(dict.fromkeys(end_ids if eos is None else [eos, *end_ids]))
    # The first id is always stored, the others only if llama.cpp would not stop at them anyway.
    stored_ids = ids[:1] + [i for i in ids[1:] if tokens.get(i) not in END_TOKENS.split()]
    if not 1 <= len(stored_ids) <= 3:
        what = f"the model has the end tokens {ids} (eos_token_id). GGUF can store 1 to 3."
        raise RecipeError(what, FIX)
    return dict(zip(("eos", "eot", "eom"), stored_ids, strict=False))


def require_supported(tokenizer: Mapping[str, Any]) -> str | None:
    """Checks a ``tokenizer.json``, except its post-processor; returns its pre-tokenizer's name.

    Raises:
        RecipeError: llama.cpp would tokenize differently.
    """
    pre_tokenizer = pre_tokenizer_name(tokenizer)
    _require_supported_model(tokenizer["model"])
    for token in tokenizer.get("added_tokens", ()):
        _require_supported_flags(token, _normalizer_steps(tokenizer))
    added = [token["content"] for token in tokenizer.get("added_tokens", ())]
    _require_no_overlap(added)
    vocab_only = set(tokenizer["model"].get("vocab", ())).difference(added)
    if tokens := sorted(vocab_only.intersection(CONTROL_TOKENS.split())):
        _refuse(f"{tokens[0]} only in vocab, not in added_tokens", "llama.cpp never splits it")
    return pre_tokenizer


def add_special_tokens(
    tokenizer: Mapping[str, Any], bos: int | None, eos: int | None
) -> dict[str, bool]:
    """Returns whether the post-processor adds BOS before a text, and whether EOS after it.

    ``tokenizer`` is ``tokenizer.json``; ``bos`` and ``eos`` are ids.

    Raises:
        RecipeError: The post-processor adds other tokens.
    """
    start, end = _added_ids(tokenizer.get("post_processor"))
    if start not in ([], [bos]) or end not in ([], [eos]):
        _refuse(
            f"a post_processor that adds ids {start} before a text and {end} after it",
            f"llama.cpp can only add bos_token ({bos}) before it and eos_token ({eos}) after it",
        )
    return {"bos": bool(start), "eos": bool(end)}


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str | None:
    """Returns llama.cpp's name of the pre-tokenizer of a ``tokenizer.json``.

    Returns ``None`` for BPE with byte fallback, which llama.cpp applies without a pre-tokenizer.

    Raises:
        RecipeError: The tokenizer is not BPE, llama.cpp does not support its normalizer or
            pre-tokenizer, or this module has no name for the pre-tokenizer.
    """
    model = tokenizer.get("model") or {}
    if "merges" not in model:  # the type is no criterion: old files do not have it
        what = f"{TOKENIZER} has the type {model.get('type')}; only BPE can be written as GGUF."
        raise RecipeError(what, FIX)
    ignores_merges = bool(model.get("ignore_merges"))
    if model.get("byte_fallback"):
        _require_sentencepiece_steps(tokenizer)
        name = None
    else:
        _require_normalizer_steps(tokenizer, BYTE_LEVEL_STEPS)
        name = _byte_level_name(tokenizer.get("pre_tokenizer") or {})
    if name == "llama-bpe" and not ignores_merges:
        return "dbrx"  # llama.cpp's name for the same pattern without ignore_merges
    if ignores_merges != (name in IGNORE_MERGES):
        reason = f"with this pre_tokenizer, llama.cpp works as with {not ignores_merges}"
        _refuse(f"ignore_merges={ignores_merges}", reason)
    return name


def _byte_level_name(pre_tokenizer: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name of a byte-level pre-tokenizer."""
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    types = [step.get("type") for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        types = []  # matches no name below, because llama.cpp adds no space before a text
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
    what = f"pre_tokenizer={pre_tokenizer} has no known name in llama.cpp."
    raise RecipeError(what, f"{FIX}, or add the name to PRE_TOKENIZERS in gguf_tokenizer.py")


def _refuse(setting: str, reason: str = "llama.cpp does not support it") -> NoReturn:
    raise RecipeError(f"{TOKENIZER} has {setting}; {reason}.", FIX)


def _normalizer_steps(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    normalizer = tokenizer.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps: list[Mapping[str, Any]] = normalizer.get("normalizers", [normalizer])
    return steps


def _require_normalizer_steps(
    tokenizer: Mapping[str, Any], supported: Sequence[Mapping[str, Any]]
) -> None:
    """Refuses a normalizer with a step that is not in ``supported``, or that is repeated."""
    steps = _normalizer_steps(tokenizer)
    if any(step not in supported or steps.count(step) > 1 for step in steps):
        _refuse(f"normalizer={tokenizer['normalizer']}")


def _require_sentencepiece_steps(tokenizer: Mapping[str, Any]) -> None:
    """Refuses a tokenizer with byte fallback that splits text, or treats spaces differently.

    llama.cpp does not split the text before it merges. It replaces all spaces. It adds no space, or
    one at the start and after each special token, even if the text starts with a space.
    """
    _require_normalizer_steps(tokenizer, SENTENCEPIECE_STEPS)
    steps = _normalizer_steps(tokenizer)
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    if not pre_tokenizer and REPLACE_SPACES not in steps:
        _refuse(f"normalizer={tokenizer.get('normalizer')} and no pre_tokenizer")
    [step, *more_steps] = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    default = "always" if step.get("add_prefix_space", True) else "never"  # key of old files
    # Unlike llama.cpp, Metaspace adds no space to a text that starts with one. PREPEND_SPACE does.
    adds_no_space = step.get("prepend_scheme", default) == "never" or PREPEND_SPACE in steps
    is_unsplit = step.get("type") == "Metaspace" and not step.get("split", True)
    is_supported = is_unsplit and adds_no_space and step.get("replacement") == SPACE
    if pre_tokenizer and (more_steps or not is_supported):
        _refuse(f"pre_tokenizer={pre_tokenizer}")


def _require_supported_model(model: Mapping[str, Any]) -> None:
    """Refuses settings of a BPE that llama.cpp ignores."""
    from tokenizers.pre_tokenizers import ByteLevel

    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            _refuse(f"{key}={model[key]!r}")
    vocab = model.get("vocab", {})
    if model.get("byte_fallback"):
        tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    elif model.get("unk_token"):
        tokens = sorted(ByteLevel.alphabet())
    else:  # llama.cpp and transformers both leave out bytes without a token
        tokens = []
    if missing := [token for token in tokens if token not in vocab]:
        _refuse(f"no token for the byte {missing[0]}", "llama.cpp has no unk_token for it")


def _require_supported_flags(
    token: Mapping[str, Any], normalizer_steps: Sequence[Mapping[str, Any]]
) -> None:
    """Refuses an added token with flags: llama.cpp finds all added tokens in the raw text."""
    text = token["content"]
    flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
    if token.get("normalized") and _is_normalized_differently(text, normalizer_steps):
        flags.append("normalized")
    if flags:
        _refuse(f"the added token {text!r} with {', '.join(flags)}")


def _require_no_overlap(added: Sequence[str]) -> None:
    """Refuses added tokens that overlap in some text.

    transformers takes the token that starts first. llama.cpp takes the longest token of the text.
    """
    # Maps each proper prefix of a token to the longest such token: it comes last, so it replaces
    # the shorter ones.
    longest = {text[:size]: text for text in sorted(added, key=len) for size in range(1, len(text))}
    for first in added:
        for start in range(1, len(first)):
            second = longest.get(first[start:], "")
            text = first[:start] + second
            # In a run of spaces, ``second`` also occurs at the start of the text.
            if len(second) > len(first) and text.find(second) == start:
                _refuse(
                    f"the added tokens {first!r} and {second!r}",
                    f"in {text!r}, llama.cpp finds the second one",
                )


def _is_normalized_differently(text: str, steps: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether a text is found at other places in normalized text than in raw text."""
    has_spaces = " " in text or SPACE in text
    changes = {  # whether a step of this type changes where the text is found
        "Prepend": True,
        "Replace": has_spaces,
        "NFC": unicodedata.normalize("NFC", text) != text,
    }
    return any(changes[step["type"]] for step in steps)


def _added_ids(post_processor: Mapping[str, Any] | None) -> tuple[list[int], list[int]]:
    """Returns the ids that a post-processor adds before a text, and after it."""
    processor = post_processor or {"type": "ByteLevel"}
    if processor["type"] == "ByteLevel":  # changes only offsets
        return [], []
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]], [processor["sep"][1]]
    start: list[int] = []
    end: list[int] = []
    if processor["type"] == "Sequence":
        for step in processor["processors"]:
            step_start, step_end = _added_ids(step)
            start, end = step_start + start, end + step_end  # a later step adds outside
        return start, end
    added = start  # the list that gets the next ids; after the text, it is ``end``
    if sum("Sequence" in piece for piece in processor["single"]) != 1:  # not one text
        _refuse(f"post_processor={processor}")
    for piece in processor["single"]:
        if "Sequence" in piece:  # the text
            added = end
        else:
            added += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return start, end
