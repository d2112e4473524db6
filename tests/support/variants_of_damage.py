"""Lists variants of Hugging Face folders with damaged files, such as broken links."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.support.folder_changes import (
    INDEX,
    QUERY,
    SHARDS,
    TOKENIZER,
    WEIGHTS,
    Change,
    add_weight,
    all_of,
    cast_weights,
    drop_weight,
    edit_json,
    split_weights,
    use_vocabulary_and_merges,
)
from tests.support.variant import Variant

TOKENIZER_JSON = "tokenizer.json"


def variants_of_damage() -> Iterator[Variant]:
    """Yields all variants. Those without a ``refusal`` must be converted exactly."""
    yield from _links_and_folders()
    yield from _models_of_tokenizers()
    yield from _steps_of_tokenizers()
    yield from _fixes_of_weights()


def _links_and_folders() -> Iterator[Variant]:
    for file, base in (
        ("config.json", ()),
        ("generation_config.json", ()),
        ("tokenizer.json", ()),
        ("tokenizer_config.json", ()),
        ("merges.txt", (use_vocabulary_and_merges,)),
        ("chat_template.jinja", ()),
        (WEIGHTS, ()),
        ("a.safetensors", (split_weights(SHARDS),)),
        (INDEX, (split_weights(SHARDS),)),
    ):
        link, folder = all_of(*base, _make_broken_link(file)), all_of(*base, _make_folder(file))
        refusal = f"{file} is a link to ../absent, which does not exist"
        yield Variant(f"broken link {file}", link, refusal)
        yield Variant(f"folder {file}", folder, f"{file} is a folder, not a file")
    for file, refusal in (("LICENSE", "LICENSE is a link to ../absent"), ("other.txt", "")):
        yield Variant(f"broken link {file}", _make_broken_link(file), refusal)


def _models_of_tokenizers() -> Iterator[Variant]:
    few = {"<eos>": 0, "hat": 1}
    for name, model, reason in (
        ("merges", {"merges": []}, "it has no merges, so no text has 31 of its tokens"),
        ("an unknown token", {"unk_token": "<x>", "vocab": few, "merges": []}, "Unk token `<x>`"),
        ("words", {"type": "WordPiece", "vocab": few, "unk_token": "<x>"}, "WordPiece error"),
        ("other words", {"type": "WordLevel", "vocab": few, "unk_token": "<x>"}, "WordLevel error"),
        ("pieces", {"type": "Unigram", "vocab": [["<eos>", 0.0]], "unk_id": None}, "`unk_id` is"),
        ("any token", {"vocab": {}, "merges": []}, "it has no token for any character"),
    ):
        defaults = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
        change = _edit_model(**({**defaults, **model} if "type" in model else model))
        yield Variant(f"tokenizer without {name}", change, f"cannot encode text: .*{reason}")
    yield Variant("tokenizer with dropout", _edit_model(dropout=0.5), "dropout=0.5, so it splits")
    yield Variant("tokenizer without dropout", _edit_model(dropout=0.0))


def _steps_of_tokenizers() -> Iterator[Variant]:
    template: dict[str, Any] = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    template["single"] = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
    eos = {"type": "BertProcessing", "sep": ["<eos>", 5000], "cls": ["<eos>", 0]}
    empty_pattern = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 9}
    for key, value, reason in (
        ("post_processor", template, "no entry found for key"),
        ("post_processor", eos, "it adds the id 5000 to a text, which no token has"),
        ("normalizer", empty_pattern, "index out of bounds"),
        ("truncation", truncation, "stride set to 9"),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "chunk size"),
    ):
        change = edit_json(TOKENIZER_JSON, **{key: value})
        yield Variant(f"{key} {value}", change, f"cannot encode text: .*{reason}")
    damaged = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    change = edit_json(TOKENIZER_JSON, normalizer=damaged)
    yield Variant("damaged map of characters", change, "is not a tokenizer: Precompiled.*charsmap")
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 299, "pad_type_id": 0, "pad_token": "<pad>"}
    yield Variant("padding with a new token", edit_json(TOKENIZER_JSON, padding=padding))
    # The embedding has rows for 6 new tokens.
    listed = [f"<listed {n}>" for n in range(6)]
    tokens = edit_json(TOKENIZER, additional_special_tokens=listed)
    change = all_of(edit_json(TOKENIZER_JSON, padding=padding), tokens)
    yield Variant("too many tokens with padding", change, "has 1 tokens without an embedding")


def _fixes_of_weights() -> Iterator[Variant]:
    query = QUERY.removesuffix(".weight")
    for end in ("weight_scale_inv", "weight.absmax", "qzeros", "SCB"):
        change = add_weight(f"{query}.{end}", 1)
        fix = f"is quantized: it has {query}.{end}.\n  fix: use the unquantized model"
        yield Variant(f"quantized with {end}", change, fix)
    lora = add_weight(f"{query}.lora_A.weight", 4, 64)
    yield Variant("LoRA", lora, f"has {query}.lora_A.weight.*\n  fix: merge the adapter")
    base_layer = all_of(lora, drop_weight(QUERY), add_weight(f"{query}.base_layer", 64))
    yield Variant("LoRA with a base layer", base_layer, "has no .*\n  fix: merge the adapter")
    change = cast_weights(torch.float64)
    yield Variant("all in float64", change, "type F64.\n  fix: save the weights in float32")


def _make_broken_link(file: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to("../absent")

    return change


def _make_folder(file: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).mkdir()

    return change


def _edit_model(**values: Any) -> Change:
    """Sets keys of the tokenizer's model."""

    def change(folder: Path) -> None:
        model = json.loads((folder / TOKENIZER_JSON).read_text())["model"]
        edit_json(TOKENIZER_JSON, model={**model, **values})(folder)

    return change
