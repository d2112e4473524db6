"""llama.cpp tokenizes and stops as transformers does, or the export is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_convert import gguf_tokenizer
from nemo_convert.gguf_file import write
from nemo_convert.gguf_tokenizer import (
    CONTROL_TOKENS,
    END_TOKENS,
    PRE_TOKENIZERS,
    end_token_ids,
    require_supported,
    require_supported_files,
)
from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json
from tests.support.llama_cpp import PROMPTS, generate_greedily, tokenize
from tests.support.models import EVEN, write_byte_fallback_tokenizer, write_tiny_model
from tests.support.sharp_attention import sharpen_attention

Edit = Callable[[dict[str, Any]], object]
"""Changes the content of a ``tokenizer.json``."""
TEXTS = (
    *PROMPTS,
    " a space first",
    "words<eos>joined by <eos> tokens",
    "words</s>joined by </s> tokens",
    "<unk> at the start,  two spaces",
    "x = 3\n\n  y",
)
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": next(iter(PRE_TOKENIZERS))},  # Llama 3's
    "behavior": "Isolated",
    "invert": False,
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = {**BYTES, "use_regex": True}
"""Splits text with GPT-2's pattern."""
DIGITS = {"type": "Digits", "individual_digits": True}
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def metaspace(**settings: object) -> Edit:
    """Treats spaces with Metaspace instead of a normalizer."""
    step = {"type": "Metaspace", "split": False, "prepend_scheme": "never", "replacement": "▁"}
    return lambda tokenizer: tokenizer.update(normalizer=None, pre_tokenizer=step | settings)


def split(*steps: dict[str, Any]) -> Edit:
    """Replaces the pre-tokenizer."""
    return lambda tokenizer: tokenizer.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*steps]}
    )


def in_model(**settings: object) -> Edit:
    """Changes settings of the BPE."""
    return lambda tokenizer: tokenizer["model"].update(settings)


def flag(name: str) -> Edit:
    """Sets a flag of all added tokens."""
    return lambda tokenizer: [token.update({name: True}) for token in tokenizer["added_tokens"]]


def normalize(*steps: dict[str, Any]) -> Edit:
    """Replaces the normalizer."""
    normalizer = {"type": "Sequence", "normalizers": [*steps]} if steps else None
    return lambda tokenizer: tokenizer.update(normalizer=normalizer)


def template(*pieces: str) -> Edit:
    """Adds special tokens of a tokenizer with byte fallback to each text, which is "A"."""
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2}

    def part(piece: str) -> dict[str, Any]:
        return {"Sequence" if piece == "A" else "SpecialToken": {"id": piece, "type_id": 0}}

    special = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in ids.items()}
    processor = {"type": "TemplateProcessing", "single": [*map(part, pieces)]}
    processor |= {"pair": [part("A"), {"Sequence": {"id": "B", "type_id": 1}}]}
    return lambda tokenizer: tokenizer.update(
        post_processor=processor | {"special_tokens": special}
    )


def llama_3(ignore_merges: bool) -> Edit:
    """Splits as Llama 3 does. No merge has the result "Ġhistory"."""

    def edit(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"]["Ġhistory"] = 288
        tokenizer["model"]["ignore_merges"] = ignore_merges
        split(SPLIT, BYTES)(tokenizer)

    return edit


def add_tokens(*texts: str) -> Edit:
    """Adds tokens that are not special."""
    tokens = [{"id": 288 + n, "content": text, **FLAGS} for n, text in enumerate(texts)]
    return lambda tokenizer: tokenizer["added_tokens"].extend(
        {**token, "special": False} for token in tokens
    )


def rename(old: str, new: str) -> Edit:
    """Renames a token that is in no merge."""

    def edit(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        vocab[new] = vocab.pop(old)

    return edit


def swap_ids(tokenizer: dict[str, Any]) -> None:
    """Swaps the ids of the first and last merged tokens. The order of ids must not matter."""
    vocab = tokenizer["model"]["vocab"]
    tokens = ["".join(merge) for merge in tokenizer["model"]["merges"]]
    for early, late in zip(tokens[:40], tokens[:-41:-1], strict=True):
        vocab[early], vocab[late] = vocab[late], vocab[early]


def join_merges(tokenizer: dict[str, Any]) -> None:
    """Writes merges as old versions of tokenizer.json: "a b" instead of ["a", "b"]."""
    model = tokenizer["model"]
    model["merges"] = [" ".join(merge) for merge in model["merges"]]


@pytest.fixture(scope="module")
def byte_fallback_llama(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer like Llama 2's."""
    folder = tmp_path_factory.mktemp("byte-fallback") / "hf"
    shape = {**EVEN, "vocab_size": 460}
    write_tiny_model(folder, text_file, train=False, **shape)
    write_byte_fallback_tokenizer(text_file, folder)
    return folder


def edited(source: Path, folder: Path, edit: Edit, **settings: object) -> Path:
    """Copies a model, edits ``tokenizer.json``, and sets values of ``tokenizer_config.json``."""
    shutil.copytree(source, folder)
    tokenizer = read_json(folder / "tokenizer.json")
    edit(tokenizer)
    write_json(folder / "tokenizer.json", tokenizer)
    added = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in tokenizer["added_tokens"]
    }
    config = read_json(folder / "tokenizer_config.json") | {"added_tokens_decoder": added}
    write_json(folder / "tokenizer_config.json", config | settings)
    return folder


SUPPORTED: dict[str, tuple[Any, ...]] = {
    "Llama 3": ("bytes", llama_3(True)),
    "Llama 3 with merges": ("bytes", llama_3(False)),
    "digits and words": ("bytes", split(DIGITS, WORDS)),  # "smollm" in llama.cpp
    "NFC": ("bytes", normalize({"type": "NFC"})),
    "normalized": ("bytes", flag("normalized")),
    "runs of spaces": ("bytes", add_tokens("  ", "    ")),
    "Metaspace": ("fallback", metaspace()),
    "no prefix": ("fallback", normalize(REPLACE)),
    "same places": ("fallback", lambda t: (normalize(REPLACE)(t), flag("normalized")(t))),
    "BOS and EOS": ("fallback", template("<s>", "A", "</s>")),
    "EOS": ("fallback", template("A", "</s>")),
    "swapped ids": ("fallback", swap_ids),
    "merges as strings": ("fallback", lambda t: (swap_ids(t), join_merges(t))),
    # transformers does not use what these edits change.
    "class": ("fallback", template("<unk>", "A"), {"tokenizer_class": "LlamaTokenizerFast"}),
    "class without BOS": (
        "fallback",
        template("<s>", "A"),
        {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False},
    ),
    "flags": (
        "bytes",
        flag("lstrip"),
        {"added_tokens_decoder": {"0": {"content": "<eos>", **FLAGS, "special": True}}},
    ),
    "prefix": ("bytes", lambda tokenizer: tokenizer["pre_tokenizer"].update(add_prefix_space=True)),
    "template": ("bytes", flag("special"), {"chat_template": 5}),
}
"""The tokenizer to edit, an edit that the export supports, and values of tokenizer_config.json."""


@pytest.mark.parametrize("case", SUPPORTED)
def test_llama_cpp_tokenizes_as_transformers_does(
    case: str, even_llama: Path, byte_fallback_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    kind, edit, *settings = SUPPORTED[case]
    source = even_llama if kind == "bytes" else byte_fallback_llama
    folder = edited(source, tmp_path / "hf", edit, **(settings[0] if settings else {}))
    require_supported_files(folder)
    write(folder, tmp_path / "model.gguf", "f32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = text_file.read_text().splitlines()[:8]
    texts = [
        *TEXTS,
        "three   spaces     or five",
        *(json.loads(line)["text"][:80] for line in lines),
    ]
    expected = [tokenizer(text).input_ids for text in texts]
    assert tokenize(tmp_path / "model.gguf", texts) == expected


UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
REFUSED: dict[str, tuple[Any, ...]] = {
    "ignore_merges": ("bytes", in_model(ignore_merges=True), "ignore_merges=True"),
    "dropout": ("bytes", in_model(dropout=0.5), "dropout=0.5"),
    "suffix": ("fallback", in_model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "no byte x": ("fallback", rename("<0x78>", "<unused>"), "<0x78>"),
    "control": ("bytes", rename("Ā", "<|im_end|>"), r"<\|im_end\|> only in vocab"),
    "overlap": ("bytes", add_tokens("ab", "bcd"), "'ab' and 'bcd'"),
    "lstrip": ("bytes", flag("lstrip"), "'<eos>' with lstrip"),
    "rstrip": ("bytes", flag("rstrip"), "'<eos>' with rstrip"),
    "single_word": ("bytes", flag("single_word"), "'<eos>' with single_word"),
    "normalized": ("fallback", flag("normalized"), "with normalized"),
    "Metaspace, always": ("fallback", metaspace(prepend_scheme="always"), "'always'"),
    "Metaspace, first": ("fallback", metaspace(prepend_scheme="first"), "'first'"),
    "Metaspace, _": ("fallback", metaspace(replacement="_"), "'_'"),
    "Metaspace that splits": ("fallback", metaspace(split=True), "pre_tokenizer="),
    "default Metaspace": (  # it splits
        "fallback",
        lambda t: t.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁"}),
        "pre_tokenizer=",
    ),
    "byte fallback and digits": ("fallback", split(DIGITS), "pre_tokenizer="),
    "NFKC": ("fallback", normalize({"type": "NFKC"}, PREPEND, REPLACE), "NFKC"),
    "lower case": ("bytes", normalize({"type": "Lowercase"}), "Lowercase"),
    "digits and Llama 3": ("bytes", split(DIGITS, SPLIT, BYTES), "pre_tokenizer="),
    "Llama 3 and digits": ("bytes", split(SPLIT, DIGITS, BYTES), "pre_tokenizer="),
    "Llama 3 and words": ("bytes", split(SPLIT, WORDS), "pre_tokenizer="),
    "prefix": ("bytes", split(SPLIT, {**BYTES, "add_prefix_space": True}), "pre_tokenizer="),
    "removed": ("bytes", split({**SPLIT, "behavior": "Removed"}, BYTES), "pre_tokenizer="),
    "inverted": ("bytes", split({**SPLIT, "invert": True}, BYTES), "pre_tokenizer="),
    "digits without words": ("bytes", split(DIGITS, BYTES), "pre_tokenizer="),
    "spaces not replaced": ("fallback", normalize(), "normalizer=None"),
    "two prefixes": ("fallback", normalize(PREPEND, PREPEND, REPLACE), "normalizer="),
    "two BOS": ("fallback", template("<s>", "<s>", "A"), r"ids \[1, 1\] before"),
    "other token": ("fallback", template("A", "<unk>"), r"\[0\] after it; .* eos_token \(2\)"),
    "text twice": ("fallback", template("A", "A"), "post_processor="),
    "words": ("bytes", lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer="),
    "Unigram": ("bytes", lambda t: t.update(model=UNIGRAM), "Unigram"),
    "split special tokens": (
        "bytes",
        in_model(),
        "split_special_tokens",
        {"split_special_tokens": True},
    ),
}
"""The tokenizer to edit, an edit that the export refuses, a part of the message, and values of
tokenizer_config.json."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_tokenize_differently_is_refused(
    case: str, even_llama: Path, byte_fallback_llama: Path, tmp_path: Path
) -> None:
    kind, edit, message, *settings = REFUSED[case]
    source = even_llama if kind == "bytes" else byte_fallback_llama
    folder = edited(source, tmp_path / "hf", edit, **(settings[0] if settings else {}))
    with pytest.raises(RecipeError, match=message):
        write(folder, tmp_path / "model.gguf", "f32")
    with pytest.raises(RecipeError, match=message):
        require_supported_files(folder)
    assert not (tmp_path / "model.gguf").exists()


def test_unknown_bytes_need_an_unknown_token_that_llama_cpp_does_not_have() -> None:
    vocab = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    model = {"merges": [], "vocab": vocab, "unk_token": "!"}
    require_supported({"model": model, "pre_tokenizer": WORDS})
    del vocab["3"]
    require_supported({"model": {**model, "unk_token": None}, "pre_tokenizer": WORDS})
    with pytest.raises(RecipeError, match="no token for the byte 3"):
        require_supported({"model": model, "pre_tokenizer": WORDS})


def test_llama_cpp_never_splits_its_control_tokens(
    byte_fallback_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check, llama.cpp finds tokens that are not added tokens.

    Of the tokens with the same meaning, such as <fim_prefix> and <PRE>, it finds only one.
    """
    names = END_TOKENS.split()
    assert set(names) <= set(CONTROL_TOKENS.split())

    def edit(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"] |= {name: 440 + n for n, name in enumerate(names)}

    folder = edited(byte_fallback_llama, tmp_path / "hf", edit)
    with pytest.raises(RecipeError, match="only in vocab"):
        write(folder, tmp_path / "model.gguf", "f32")
    monkeypatch.setattr(gguf_tokenizer, "CONTROL_TOKENS", "")
    write(folder, tmp_path / "model.gguf", "f32")
    assert tokenize(tmp_path / "model.gguf", names) == [[440 + n] for n in range(len(names))]


@pytest.fixture(scope="module")
def sharp_llama(even_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with larger queries, which generates different tokens."""
    folder = shutil.copytree(even_llama, tmp_path_factory.mktemp("sharp") / "hf")
    sharpen_attention(folder)
    return folder


def generated_ids(folder: Path) -> list[int]:
    """Exports a model, and generates with llama.cpp."""
    file = folder.with_suffix(".gguf")
    write(folder, file, "f32")
    return generate_greedily(file, PROMPTS[:1], 12)[0].tokens


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_llama_cpp_stops_at_all_end_tokens(sharp_llama: Path, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(sharp_llama, tmp_path / "hf")
    free = generated_ids(folder)
    unused = next(i for i in range(1, 280) if i not in free)
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    settings = read_json(folder / file)
    for ids in (free[2], [0, free[2]], [0, unused, free[2]]):
        write_json(folder / file, {**settings, "eos_token_id": ids})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompt = AutoTokenizer.from_pretrained(folder)(PROMPTS[0], return_tensors="pt").input_ids
        expected = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
        stopped = generated_ids(folder)
        assert stopped == expected.tolist()
        assert len(stopped) <= 3
    write_json(folder / file, {**settings, "eos_token_id": [0, 1, 2, 3]})
    for check in (require_supported_files, generated_ids):
        with pytest.raises(RecipeError, match="eos_token_id"):
            check(folder)


def test_llama_cpp_stops_at_end_tokens_that_it_knows(sharp_llama: Path, tmp_path: Path) -> None:
    """These tokens need no key in the file."""
    free = generated_ids(shutil.copytree(sharp_llama, tmp_path / "hf"))
    for number, name in enumerate(END_TOKENS.split()):
        folder = edited(sharp_llama, tmp_path / f"hf{number}", add_tokens(name))
        weights = load_file(folder / "model.safetensors")
        rows = weights["lm_head.weight"]
        rows[[free[0], 288]] = rows[[288, free[0]]]  # then the token ``name`` is generated
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = read_json(folder / "generation_config.json")
        others = [i for i in range(1, 280) if i not in free][:2]
        write_json(folder / "generation_config.json", {**config, "eos_token_id": [0, *others, 288]})
        assert generated_ids(folder) == [288]


def test_a_model_without_an_end_token_is_refused() -> None:
    with pytest.raises(RecipeError, match="eos_token_id"):
        end_token_ids([], None, {})
