"""llama.cpp tokenizes and stops as transformers does, or the export is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_convert import gguf_tokenizer
from nemo_convert.gguf_file import require_storable, write
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
LLAMA_3 = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": next(iter(PRE_TOKENIZERS))},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def metaspace(scheme: str, replacement: str = "▁") -> Edit:
    """Treats spaces with Metaspace instead of a normalizer."""
    step = {"type": "Metaspace", "split": False}
    step |= {"prepend_scheme": scheme, "replacement": replacement}
    return lambda tokenizer: tokenizer.update(normalizer=None, pre_tokenizer=step)


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
        tokenizer["pre_tokenizer"] = LLAMA_3

    return edit


def add_tokens(*texts: str) -> Edit:
    """Adds tokens that are not special."""
    tokens = [{"id": 288 + n, "content": text, **FLAGS} for n, text in enumerate(texts)]
    return lambda tokenizer: tokenizer["added_tokens"].extend(
        {**token, "special": False} for token in tokens
    )


def rename(old: str, new: str, **settings: object) -> Edit:
    """Renames a token that is in no merge, and changes settings of the BPE."""

    def edit(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        vocab[new] = vocab.pop(old)
        tokenizer["model"].update(settings)

    return edit


@pytest.fixture(scope="module")
def byte_fallback_llama(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer like Llama 2's."""
    folder = tmp_path_factory.mktemp("byte-fallback") / "hf"
    shape = {**EVEN, "vocab_size": 460}
    write_tiny_model(folder, text_file, train=False, **shape)
    write_byte_fallback_tokenizer(text_file, folder)
    return folder


def edited(source: Path, folder: Path, edit: Edit, **settings: object) -> Path:
    """Copies a model folder, and changes its tokenizer.

    Args:
        source: Folder to copy.
        folder: The new folder.
        edit: Changes ``tokenizer.json``.
        settings: Values for ``tokenizer_config.json``.
    """
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
    "normalized": ("bytes", flag("normalized")),
    "runs of spaces": ("bytes", add_tokens("  ", "    ")),
    "Metaspace": ("fallback", metaspace("never")),
    "no prefix": ("fallback", normalize(REPLACE)),
    "same places": ("fallback", lambda t: (normalize(REPLACE)(t), flag("normalized")(t))),
    "BOS and EOS": ("fallback", template("<s>", "A", "</s>")),
    "EOS": ("fallback", template("A", "</s>")),
    # transformers does not use what these edits change.
    "class": ("fallback", template("<unk>", "A"), {"tokenizer_class": "LlamaTokenizerFast"}),
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
    case: str, even_llama: Path, byte_fallback_llama: Path, tmp_path: Path
) -> None:
    kind, edit, *settings = SUPPORTED[case]
    source = even_llama if kind == "bytes" else byte_fallback_llama
    folder = edited(source, tmp_path / "hf", edit, **(settings[0] if settings else {}))
    require_supported_files(folder)
    write(folder, tmp_path / "model.gguf", "f32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "three   spaces     or five"]
    expected = [tokenizer(text).input_ids for text in texts]
    assert tokenize(tmp_path / "model.gguf", texts) == expected


WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
REFUSED: dict[str, tuple[str, Edit, str]] = {
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
    "Metaspace, always": ("fallback", metaspace("always"), "'always'"),
    "Metaspace, first": ("fallback", metaspace("first"), "'first'"),
    "Metaspace, _": ("fallback", metaspace("never", "_"), "'_'"),
    "spaces not replaced": ("fallback", normalize(), "normalizer=None"),
    "two prefixes": ("fallback", normalize(PREPEND, PREPEND, REPLACE), "normalizer="),
    "two BOS": ("fallback", template("<s>", "<s>", "A"), r"ids \[1, 1\] before"),
    "other token": ("fallback", template("A", "<unk>"), r"\[0\] after it; .* eos_token \(2\)"),
    "text twice": ("fallback", template("A", "A"), "post_processor="),
}
"""Edits that the export refuses, the tokenizer to edit, and a part of the message."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_tokenize_differently_is_refused(
    case: str, even_llama: Path, byte_fallback_llama: Path, tmp_path: Path
) -> None:
    kind, edit, message = REFUSED[case]
    source = even_llama if kind == "bytes" else byte_fallback_llama
    folder = edited(source, tmp_path / "hf", edit)
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


@pytest.mark.parametrize(
    ("value", "is_supported"),
    [
        ("text", True),
        (None, True),
        ([{"name": "default", "template": "text"}, {"name": "rag", "template": "other"}], True),
        ([{"name": "rag", "template": "text"}], False),  # no default
        ([{"name": "default", "template": 5}], False),
        ({"rag": "text"}, False),
        (5, False),
        # Both names would be stored as a_b.
        ([{"name": n, "template": "text"} for n in ("default", "a b", "a-b")], False),
    ],
)
def test_chat_templates_that_gguf_cannot_store_are_refused(
    even_llama: Path, tmp_path: Path, value: object, is_supported: bool
) -> None:
    folder = edited(even_llama, tmp_path / "hf", lambda tokenizer: None, chat_template=value)
    (folder / "chat_template.jinja").unlink()
    if is_supported:
        require_supported_files(folder)
        write(folder, tmp_path / "model.gguf", "f16")
        field = GGUFReader(tmp_path / "model.gguf").fields.get("tokenizer.chat_template")
        assert (field and field.contents()) == (value and "text")
        return
    for check in (require_supported_files, lambda f: write(f, tmp_path / "model.gguf", "f16")):
        with pytest.raises(RecipeError, match="chat_template="):
            check(folder)


def test_split_special_tokens_are_refused(even_llama: Path, tmp_path: Path) -> None:
    folder = edited(even_llama, tmp_path / "hf", lambda _: None, split_special_tokens=True)
    for check in (require_supported_files, lambda f: write(f, tmp_path / "model.gguf", "f16")):
        with pytest.raises(RecipeError, match="split_special_tokens"):
            check(folder)


@pytest.fixture(scope="module")
def sharp_llama(even_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with larger queries, which generates different tokens."""
    folder = shutil.copytree(even_llama, tmp_path_factory.mktemp("sharp") / "hf")
    weights = load_file(folder / "model.safetensors")
    scaled = {name: (8 if "q_proj" in name else 1) * value for name, value in weights.items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
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


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": 1e39},
        {"rope_theta": 1e-50},
        {"rms_norm_eps": 1e-60},
        {"max_position_embeddings": 2**32},
        {"rope_scaling": {**LLAMA3, "factor": 1e39}},
    ],
)
def test_numbers_that_gguf_cannot_store_are_refused(
    even_llama: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = shutil.copytree(even_llama, tmp_path / "hf")
    config = read_json(folder / "config.json")
    require_storable(config)
    write_json(folder / "config.json", config | values)
    name = "factor" if "rope_scaling" in values else next(iter(values))
    with pytest.raises(RecipeError, match=name):
        require_storable(config | values)
    with pytest.raises(RecipeError, match=name):
        write(folder, tmp_path / "model.gguf", "f16")


@pytest.mark.parametrize(("matrix_type", "value"), [("f16", 1e5), ("q8_0", 1e7)])
def test_weights_that_a_type_cannot_hold_are_refused(
    even_llama: Path, tmp_path: Path, matrix_type: str, value: float
) -> None:
    folder = shutil.copytree(even_llama, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"output.weight .* too large"):
        write(folder, tmp_path / "model.gguf", matrix_type)
    write(folder, tmp_path / "model.gguf", "bf16")
