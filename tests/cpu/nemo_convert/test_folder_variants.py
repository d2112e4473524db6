"""Variants of Hugging Face folders are converted exactly or refused.

A dry run refuses them, except for faults in the values of weights.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from nemo_convert import convert, hf, nemo, parity
from nemo_convert.hf_config import as_transformers_4
from nemo_convert.hub import read_hf_config
from nemo_convert.preflight import check_model, require_convertible
from nemo_convert.reference import reference_logits
from nemo_convert.tokenizer_conversion import convert_tokenizer
from nemo_convert.tokenizer_files import KNOWN_CLASSES, read_vocabulary
from nemo_convert.vocabularies import without_panics
from recipes.core.errors import RecipeError
from recipes.core.files import read_json
from recipes.planning.chain import Chain, tokenizer_hash
from recipes.stages.import_hf import ImportConfig
from tests.support.folder_changes import (
    ABSENT,
    GENERATION,
    TOKENIZER,
    Change,
    all_of,
    change_nothing,
    edit_config,
    edit_json,
    remove_files,
    use_sentencepiece,
    use_vocabulary_and_merges,
)
from tests.support.models import EVEN, FAMILIES, write_byte_fallback_tokenizer, write_tiny_model
from tests.support.transformers_5 import (
    run_with_transformers_5,
    save_by_transformers_5,
    tokenize_by_transformers_5,
)
from tests.support.variants import variants
from tests.support.variants_of_damage import variants_of_damage
from tests.support.variants_of_settings import variants_of_settings

ALL = (*variants(), *variants_of_settings(), *variants_of_damage())
VARIANTS = {f"{variant.base}: {variant.name}": variant for variant in ALL}
"""Variants by their unique names."""
CONVERTIBLE = {name: variant for name, variant in VARIANTS.items() if not variant.refusal}
REFUSED_BY_TRANSFORMERS_5 = {
    *(f"llama: {k} {v}" for k in ("torch_dtype", "dtype") for v in ("auto", "torch.bfloat16")),
    "llama: model_type Absent.ABSENT",
    "llama: other tie_word_embeddings None",
    "qwen2: head_dim None",
    "qwen3_moe: head_dim None",
    "llama: attention kernel",  # flash_attention_2, which is not installed
    "llama: switches and floats as 0 and 1",
    "llama: null values",
    "llama: list of token objects in the map",  # version 5 adds dicts as tokens
    # Version 5 loads a Mistral model with layer_types as Ministral, which needs a sliding window.
    "mistral: layer_types None",
    "mistral: layer_types ['full_attention', 'full_attention']",
}
"""Convertible variants that transformers 5 cannot load."""
TEXT = "A quick brown fox, 3.14 lazy dogs, and 東京."
# The arguments are a result file, a text, and folders. Writes token ids and logits of the text for
# each folder that can be loaded.
LOGITS_SCRIPT = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
results = {}
for folder in sys.argv[3:]:
    try:
        ids = AutoTokenizer.from_pretrained(folder)(sys.argv[2], return_tensors="pt")["input_ids"]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            results[folder + " logits"] = model(ids, return_dict=True).logits.contiguous()
    except Exception:
        continue
    results[folder + " ids"] = ids
save_file(results, sys.argv[1])
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Writes two folders for each family: FAMILY, saved by transformers 4, and FAMILY-5.

    transformers 5 loads the model of FAMILY and saves it as FAMILY-5.
    """
    root = tmp_path_factory.mktemp("bases")
    fields = {**EVEN, "num_hidden_layers": 2, "train": False}
    folders = [write_tiny_model(root / name, text_file, name, **fields) for name in FAMILIES]
    save_by_transformers_5(*folders)
    return root


def make_folder(bases: Path, folder: Path, change: Change, base: str = "llama") -> Path:
    """Copies a base to ``folder`` and changes the copy."""
    shutil.copytree(bases / base, folder)
    change(folder)
    return folder


def test_a_panic_of_the_tokenizer_library_has_no_traceback(
    bases: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rust writes the stack of a panic to standard error. Other output must remain there."""
    change = VARIANTS["llama: damaged map of characters"].change
    with pytest.raises(RecipeError, match="Cannot parse precompiled_charsmap"):
        read_vocabulary(make_folder(bases, tmp_path / "hf", change))
    with without_panics():
        os.write(2, b"a warning")
    assert capfd.readouterr().err == "a warning"


def dry_run(folder: Path, _: Path) -> None:
    """Checks config and files as a dry run does. Has the parameters of ``convert.to_nemo``."""
    read_hf_config(str(folder))
    require_convertible(str(folder))


def test_there_are_many_variants_with_unique_names() -> None:
    assert len(VARIANTS) == len(ALL), "names must be unique"
    assert len(VARIANTS) >= 200


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_converted_exactly_or_refused(name: str, bases: Path, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    folder = make_folder(bases, tmp_path / "hf", variant.change, variant.base)
    checkpoint = tmp_path / "m.nemo"
    if not variant.refusal:
        assert not [str(finding) for finding in check_model(str(folder)) if finding.is_error]
        convert.to_nemo(folder, checkpoint)
        parity.compare(folder, checkpoint).require(name)
        return
    check = convert.to_nemo if variant.reads_weights else dry_run
    with pytest.raises(RecipeError) as error:
        check(folder, checkpoint)
    assert re.search(variant.refusal, str(error.value))
    assert "  fix: " in str(error.value)


@pytest.mark.parametrize("name", sorted(KNOWN_CLASSES - {"PreTrainedTokenizer"}))
@pytest.mark.parametrize("eos", [{}, {"eos_token": None}, {"eos_token": ABSENT}])
def test_tokens_that_only_the_class_adds_are_counted(
    name: str, eos: dict[str, Any], bases: Path, tmp_path: Path
) -> None:
    """A tokenizer class may add default special tokens that no file lists."""
    settings = {"tokenizer_class": name, "added_tokens_decoder": ABSENT, **eos}
    no_map = remove_files("special_tokens_map.json")
    folder = make_folder(bases, tmp_path / "hf", all_of(edit_json(TOKENIZER, **settings), no_map))
    vocabulary = read_vocabulary(folder)  # before the conversion lists all tokens in files
    convert_tokenizer(folder)
    assert vocabulary.keys() == AutoTokenizer.from_pretrained(folder).get_vocab().keys()


def test_tokens_that_transformers_does_not_read_are_not_counted(
    bases: Path, tmp_path: Path
) -> None:
    """added_tokens_decoder in the settings makes transformers 4 ignore added_tokens.json."""
    other_token = edit_json("added_tokens.json", **{"<other>": 288})  # the first unused id
    folder = make_folder(bases, tmp_path / "hf", other_token)
    assert "added_tokens_decoder" in (folder / TOKENIZER).read_text()
    assert read_vocabulary(folder) == AutoTokenizer.from_pretrained(folder).get_vocab()


NO_SETTINGS = remove_files(TOKENIZER, "special_tokens_map.json")
QWEN2_CLASS = edit_json(TOKENIZER, tokenizer_class="Qwen2TokenizerFast")
SETTINGS_OF_TRANSFORMERS_5 = {
    "backend": "tokenizers",
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "unk_token": "<unk>",
}


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ("qwen2", all_of(use_vocabulary_and_merges, NO_SETTINGS)),
        ("llama", all_of(use_sentencepiece, NO_SETTINGS)),
        ("llama", edit_json(TOKENIZER, **SETTINGS_OF_TRANSFORMERS_5)),
    ],
)
def test_defaults_of_the_class_are_kept(
    bases: Path, tmp_path: Path, base: str, change: Change
) -> None:
    """A conversion may write the generic class, which has other defaults.

    For example, the generic class by default returns ``token_type_ids``. ``generate`` refuses them.
    """
    folder = make_folder(bases, tmp_path / "hf", change, base)
    expected = AutoTokenizer.from_pretrained(folder)
    convert_tokenizer(folder)
    converted = AutoTokenizer.from_pretrained(folder)
    assert expected.eos_token
    assert converted.special_tokens_map == expected.special_tokens_map
    assert converted.model_input_names == expected.model_input_names
    assert converted.padding_side == expected.padding_side


@pytest.mark.parametrize(
    ("base", "change", "notes"),
    [
        ("qwen2", change_nothing, 1),
        ("qwen2", all_of(use_vocabulary_and_merges, NO_SETTINGS), 0),
        ("llama", change_nothing, 0),
        ("llama", QWEN2_CLASS, 1),
        ("mistral", QWEN2_CLASS, 0),
        ("qwen3", change_nothing, 0),
        ("qwen3_moe", QWEN2_CLASS, 1),
    ],
)
def test_a_tokenizer_that_transformers_5_replaces_is_noted(
    bases: Path, tmp_path: Path, base: str, change: Change, notes: int
) -> None:
    """transformers 5 uses Qwen2's class for Qwen2 models and for tokenizers that name this class.

    Mistral models are an exception. The class splits text in its own way, whatever tokenizer.json
    says. There is no note if the class itself reads vocab.json and merges.txt.
    """
    folder = make_folder(bases, tmp_path / "hf", change, base)
    assert len(list(check_model(str(folder)))) == notes


SPLIT_DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS_AND_BYTES = {"type": "Sequence", "pretokenizers": [SPLIT_DIGITS, BYTES]}
"""A pre-tokenizer with a step that GPT-2's class does not have."""


@pytest.mark.parametrize(
    ("like_llama_2", "settings"),
    [
        (True, {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}),
        (True, {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}),
        (True, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}),
        (True, {"tokenizer_class": ABSENT}),
        (True, {"tokenizer_class": "CodeLlamaTokenizerFast"}),
        (False, {"tokenizer_class": "GPT2TokenizerFast"}),
    ],
)
def test_transformers_5_splits_text_as_version_4(
    like_llama_2: bool, settings: dict[str, Any], bases: Path, text_file: Path, tmp_path: Path
) -> None:
    """After a conversion, transformers 5 splits text as version 4 does.

    Without the conversion, classes of version 5 ignore the normalizer and the pre-tokenizer in
    tokenizer.json.
    """
    folder = make_folder(bases, tmp_path / "hf", change_nothing)
    if like_llama_2:
        write_byte_fallback_tokenizer(text_file, folder)
    else:
        edit_json("tokenizer.json", pre_tokenizer=DIGITS_AND_BYTES)(folder)
    edit_json(TOKENIZER, **settings)(folder)
    texts = ["Items:\n\n1. foo\n2. bar", "x =  3\n    5", "  the hat", "<s>the hat</s> the hen"]
    original = AutoTokenizer.from_pretrained(folder)
    expected = original(texts)
    if settings["tokenizer_class"] is not ABSENT:
        assert tokenize_by_transformers_5(folder, texts) != expected["input_ids"]
    convert_tokenizer(folder)
    converted = AutoTokenizer.from_pretrained(folder)
    assert converted(texts) == expected
    assert converted.special_tokens_map == original.special_tokens_map
    assert tokenize_by_transformers_5(folder, texts) == expected["input_ids"]


@pytest.mark.parametrize(
    ("name", "in_json", "in_settings"),
    [
        ("LlamaTokenizerFast", True, ABSENT),
        (ABSENT, True, ABSENT),
        # This class uses tokenizer.json, except for this setting.
        ("PreTrainedTokenizerFast", True, ABSENT),
        ("PreTrainedTokenizerFast", True, False),
        ("PreTrainedTokenizerFast", False, True),
    ],
)
def test_a_conversion_keeps_the_space_before_a_text(
    name: object, in_json: bool, in_settings: object, bases: Path, tmp_path: Path
) -> None:
    settings = {"tokenizer_class": name, "add_prefix_space": in_settings}
    folder = make_folder(bases, tmp_path / "hf", edit_json(TOKENIZER, **settings))
    steps = read_json(folder / "tokenizer.json")["pre_tokenizer"]
    edit_json("tokenizer.json", pre_tokenizer={**steps, "add_prefix_space": in_json})(folder)
    expected = AutoTokenizer.from_pretrained(folder)("hat")["input_ids"]
    convert_tokenizer(folder)
    assert AutoTokenizer.from_pretrained(folder)("hat")["input_ids"] == expected
    assert tokenize_by_transformers_5(folder, ["hat"]) == [expected]
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("hat").ids == expected


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"max_length": 99, "top_p": 0.9, "early_stopping": True}, {"max_length": 99}),
        ({"do_sample": True, "top_p": 0.9}, {"do_sample": True, "top_p": 0.9}),
        ({}, None),
    ],
)
def test_generation_settings_of_an_old_config_are_moved(
    settings: dict[str, Any], kept: dict[str, Any] | None, bases: Path, tmp_path: Path
) -> None:
    """transformers does not save a model whose config.json has some of these settings."""
    change = all_of(edit_config(**settings), remove_files(GENERATION))
    folder = make_folder(bases, tmp_path / "hf", change)
    convert.to_nemo(folder, tmp_path / "m.nemo")
    convert.to_hf(tmp_path / "m.nemo", tmp_path / "export")
    file = tmp_path / "export" / GENERATION
    expected = kept and {"bos_token_id": 1, "eos_token_id": 2, **kept}
    assert (read_json(file) if file.exists() else None) == expected
    assert not settings.keys() & read_json(tmp_path / "export/config.json").keys()
    for source in (folder, tmp_path / "export"):
        model = hf.load_causal_lm(source)
        model.save_pretrained(tmp_path / "saved")
        assert model.generation_config.top_p == (kept or {}).get("top_p", 1.0)


def test_a_plan_knows_the_tokenizer_that_a_conversion_writes(bases: Path, tmp_path: Path) -> None:
    """A plan computes the hash of the tokenizer that the stage will write.

    If stages run with another Python, such as a container's, the hash is unknown: its libraries may
    convert a tokenizer differently.
    """
    folder = make_folder(bases, tmp_path / "hf", use_sentencepiece)
    convert.to_nemo(folder, tmp_path / "model.nemo")
    imported = hf.tokenizer_sha256(nemo.side_folder(tmp_path / "model.nemo"))
    stages = {"import_hf": ImportConfig("import_hf", hf_path=str(folder))}
    chain = Chain(str(folder), nemo.architecture_of(tmp_path / "model.nemo"), stages)
    assert imported != hf.tokenizer_sha256(folder)
    assert tokenizer_hash("import_hf", chain) == imported
    assert tokenizer_hash("import_hf", replace(chain, own_python=False)) is None


def test_transformers_5_agrees_about_every_convertible_variant(bases: Path, tmp_path: Path) -> None:
    """Compares the logits of transformers 5 with the plain PyTorch ``reference``.

    Some folders are also converted and exported. For these exports, token ids are compared with
    those of transformers 4.
    """
    folders, exports = list[Path](), list[Path]()
    for number, (name, variant) in enumerate(CONVERTIBLE.items()):
        folder = make_folder(bases, tmp_path / f"{number}", variant.change, variant.base)
        folders.append(folder)
        if any(word in name for word in ("as written", "sentencepiece", "as 0 and 1")):
            exports.append(tmp_path / f"{number}.export")
            convert.to_nemo(folder, tmp_path / f"{number}.nemo")
            convert.to_hf(tmp_path / f"{number}.nemo", exports[-1])
    run_with_transformers_5(LOGITS_SCRIPT, tmp_path / "results", TEXT, *folders, *exports)
    results = load_file(tmp_path / "results")
    names = [*CONVERTIBLE, *(export.name for export in exports)]
    for folder, name in zip([*folders, *exports], names, strict=True):
        ids = results.get(f"{folder} ids")  # None if transformers 5 cannot load the folder
        assert (ids is None) == (name in REFUSED_BY_TRANSFORMERS_5), name
        if ids is None:
            continue
        config = as_transformers_4(read_json(folder / "config.json"), name)
        positions = torch.arange(ids.shape[1])
        logits = reference_logits(config, hf.Weights(folder).read, ids, positions)
        difference = (logits - results[f"{folder} logits"]).abs().max()
        assert difference <= parity.LOGITS_TOLERANCE * logits.std(), name
    for export in exports:
        ids = AutoTokenizer.from_pretrained(export)(TEXT, return_tensors="pt")["input_ids"]
        assert torch.equal(ids, results[f"{export} ids"]), export
