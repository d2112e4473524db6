"""llama.cpp tokenizes prompts and generates from a GGUF file as transformers does."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_convert.gguf_file import _rope_factors, write
from nemo_convert.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer_name, require_supported_files
from recipes.core.errors import RecipeError
from tests.support.llama_cpp import (
    PROMPTS,
    generate_greedily,
    require_similar_generation,
    tokenize,
)
from tests.support.models import (
    EVEN,
    FAMILIES,
    write_byte_fallback_tokenizer,
    write_tiny_model,
)

NEW_TOKENS = 12
NARROW = {**EVEN, "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 96}
"""Shape of a width-pruned model: the head size is not hidden size / heads."""
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""RoPE scaling of the type that Llama 3.1 uses."""
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in FAMILIES if name != "qwen3_moe"},
    "qwen2, unpruned": EVEN,
    "llama, Llama 3's RoPE": {"rope_scaling": LLAMA3},
    "llama, tied": {"tie_word_embeddings": True},
}
"""Fields that replace those of ``NARROW``, by test case. The first word of a key is the family."""
BYTE_FALLBACK_SHAPE = {**NARROW, "vocab_size": 440}
"""Shape with enough embeddings for ``write_byte_fallback_tokenizer``. Its tokenizer has 256 tokens
for bytes, 3 special tokens, and at most 180 others."""


def sharpen_attention(folder: Path) -> None:
    """Scales the queries of a tiny model up. Otherwise its tokens would not depend on RoPE."""
    weights = load_file(folder / "model.safetensors")
    scaled = {name: (8 if "q_proj" in name else 1) * value for name, value in weights.items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})


def require_same_generation(folder: Path, file: Path) -> None:
    """Asserts that llama.cpp generates transformers' tokens, with the same log-probabilities.

    Args:
        folder: Hugging Face folder of the model.
        file: GGUF file of the model.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}
    for prompt, completion in zip(
        PROMPTS, generate_greedily(file, PROMPTS, NEW_TOKENS), strict=True
    ):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert completion.prompt_tokens == ids.shape[1]
        expected = model.generate(ids, max_new_tokens=NEW_TOKENS, **options)
        assert completion.tokens == expected.sequences[0, ids.shape[1] :].tolist()
        # Log-probability of the most likely token at each step; the batch has one sequence.
        scores = torch.stack(expected.scores).log_softmax(-1)[:, 0].max(-1).values
        # The largest difference was 2.5e-3, with llama.cpp's kernels for AVX2.
        torch.testing.assert_close(
            torch.tensor(completion.log_probabilities), scores, rtol=0, atol=5e-3, check_dtype=False
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_generates_what_transformers_does(
    variant: str, text_file: Path, tmp_path: Path
) -> None:
    family, shape = variant.partition(",")[0], NARROW | VARIANTS[variant]
    folder = write_tiny_model(tmp_path / "hf", text_file, family, **shape)
    sharpen_attention(folder)
    result = write(folder, tmp_path / "model.gguf", "f32")
    # llama.cpp's Qwen2 does not support the head size of a width-pruned Qwen2.
    expected = {"qwen2": "llama", "qwen3": "qwen3", "qwen2, unpruned": "qwen2"}
    assert result.architecture == expected.get(variant, "llama")
    require_same_generation(folder, tmp_path / "model.gguf")
    template = GGUFReader(tmp_path / "model.gguf").fields["tokenizer.chat_template"].contents()
    assert template == AutoTokenizer.from_pretrained(folder).chat_template


def test_rope_factors_are_those_of_transformers() -> None:
    config = AutoConfig.for_model("llama", rope_theta=500000.0, rope_scaling=LLAMA3, head_dim=64)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    config.rope_scaling = None
    plain, _ = ROPE_INIT_FUNCTIONS["default"](config, "cpu")
    [tensor] = _rope_factors({"rope_theta": 500000.0, "rope_scaling": LLAMA3}, 64)
    factors = tensor.read()
    # High frequencies are unchanged; low ones are divided by LLAMA3["factor"].
    assert 1 == factors.min() < factors.max() == 4
    torch.testing.assert_close(torch.from_numpy(factors), plain / scaled, rtol=1e-5, atol=0)


def test_matrices_are_rounded_and_vectors_are_exact(even_llama: Path, tmp_path: Path) -> None:
    weights = load_file(even_llama / "model.safetensors")
    # Bounds of the rounding error, relative to the largest value of a matrix. f16 has 11
    # significant bits, and bf16 has 8. q8_0 has 127 steps from 0 to the largest value.
    for matrix_type, bound in (("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)):
        write(even_llama, tmp_path / matrix_type, matrix_type)
        stored = {t.name: t for t in GGUFReader(tmp_path / matrix_type).tensors}
        assert len(stored) == len(weights)
        for name, hf_name in (
            ("blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight"),
            ("output.weight", "lm_head.weight"),
            ("output_norm.weight", "model.norm.weight"),
        ):
            tensor = stored[name]
            rounded = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
            exact = weights[hf_name]
            assert rounded.shape == exact.shape
            allowed = 0 if exact.dim() == 1 else bound * exact.abs().max()
            assert (rounded - exact).abs().max() <= allowed


@pytest.mark.parametrize(
    ("matrix_type", "tolerance"),  # of log-probabilities
    [("f16", 0.01), ("bf16", 0.1), ("q8_0", 0.2)],
)
def test_llama_cpp_generates_similarly_with_rounded_matrices(
    even_llama: Path, tmp_path: Path, matrix_type: str, tolerance: float
) -> None:
    folder = shutil.copytree(even_llama, tmp_path / "hf")
    sharpen_attention(folder)
    write(folder, tmp_path / "model.gguf", matrix_type)
    require_similar_generation(folder, tmp_path / "model.gguf", tolerance)


@pytest.mark.parametrize(
    ("settings", "file_adds_bos"),  # whether the post-processor of tokenizer.json adds BOS
    [
        ({}, False),
        # The class LlamaTokenizerFast replaces the post-processor of tokenizer.json.
        ({"tokenizer_class": "LlamaTokenizerFast"}, False),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, True),
    ],
)
def test_llama_cpp_counts_the_tokens_of_a_byte_fallback_tokenizer_as_transformers_does(
    text_file: Path, tmp_path: Path, settings: dict[str, Any], file_adds_bos: bool
) -> None:
    shape = BYTE_FALLBACK_SHAPE
    folder = write_tiny_model(tmp_path / "hf", text_file, "llama", train=False, **shape)
    write_byte_fallback_tokenizer(text_file, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    if file_adds_bos:
        file = str(folder / "tokenizer.json")
        backend = Tokenizer.from_file(file)
        # Templates of one text and of two texts. The id of <s> is 1.
        template = processors.TemplateProcessing("<s> $A", "<s> $A $B:1", [("<s>", 1)])
        backend.post_processor = template
        backend.save(file)
    write(folder, tmp_path / "model.gguf", "f32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    completions = generate_greedily(tmp_path / "model.gguf", PROMPTS, 1)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.prompt_tokens == len(tokenizer(prompt).input_ids)


@pytest.mark.parametrize("has_string_merges", [False, True])
def test_llama_cpp_merges_in_the_order_of_the_file(
    text_file: Path, tmp_path: Path, has_string_merges: bool
) -> None:
    """The order of the ids of merged tokens must not matter.

    The test exchanges the ids of early and late merges. Old versions of tokenizer.json have a merge
    as the string "a b" instead of the list ["a", "b"].
    """
    shape = BYTE_FALLBACK_SHAPE
    folder = write_tiny_model(tmp_path / "hf", text_file, "llama", train=False, **shape)
    write_byte_fallback_tokenizer(text_file, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    vocab = model["vocab"]  # maps tokens to ids
    tokens = ["".join(merge) for merge in model["merges"]]
    # Pairs the first token with the last, the second with the last but one, and so on.
    for early, late in zip(tokens[:40], tokens[:-41:-1], strict=True):
        vocab[early], vocab[late] = vocab[late], vocab[early]
    if has_string_merges:
        model["merges"] = [" ".join(merge) for merge in model["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    write(folder, tmp_path / "model.gguf", "f32")
    texts = [json.loads(line)["text"][:80] for line in text_file.read_text().splitlines()[:8]]
    loaded = AutoTokenizer.from_pretrained(folder)
    assert tokenize(tmp_path / "model.gguf", texts) == [loaded(text).input_ids for text in texts]


@pytest.mark.parametrize(
    ("config", "special_tokens"),
    [
        (  # transformers then ignores special_tokens_map.json
            {
                "eos_token": "<end>",
                "added_tokens_decoder": {"288": {"content": "<end>", "special": True}},
            },
            {},
        ),
        ({}, {"eos_token": "<end>"}),
    ],
)
def test_special_tokens_may_be_in_any_file_of_the_tokenizer(
    even_llama: Path, tmp_path: Path, config: dict[str, Any], special_tokens: dict[str, Any]
) -> None:
    folder = shutil.copytree(even_llama, tmp_path / "hf")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens))
    write(folder, tmp_path / "model.gguf", "f16")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 288  # the first free id
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 288
    assert fields["tokenizer.ggml.tokens"].contents()[288] == "<end>"
    assert fields["tokenizer.ggml.token_type"].contents()[288] == TokenType.CONTROL


def test_chat_templates_are_those_that_transformers_loads(even_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(even_llama, tmp_path / "hf")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "old"}))
    (folder / "chat_template.jinja").write_text("new")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("with documents")
    write(folder, tmp_path / "model.gguf", "f16")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "new"
    assert fields["tokenizer.chat_template.rag"].contents() == "with documents"
    loaded = AutoTokenizer.from_pretrained(folder).chat_template
    assert loaded == {"default": "new", "rag": "with documents"}


def test_tokenizers_that_llama_cpp_does_not_support_are_refused(
    even_llama: Path, tmp_path: Path
) -> None:
    assert set(PRE_TOKENIZERS.values()) == {"llama-bpe", "qwen2", "tekken"}
    with pytest.raises(RecipeError, match="pre_tokenizer="):
        pre_tokenizer_name({"model": {"merges": []}, "pre_tokenizer": {"type": "Whitespace"}})
    folder = shutil.copytree(even_llama, tmp_path / "hf")
    Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)).save(str(folder / "tokenizer.json"))
    with pytest.raises(RecipeError, match="Unigram"):
        write(folder, tmp_path / "model.gguf", "f16")


def test_the_plan_does_not_check_a_file_that_transformers_ignores(tmp_path: Path) -> None:
    """With ``add_prefix_space``, LlamaTokenizerFast reads tokenizer.model."""
    Tokenizer(models.Unigram([("<unk>", 0.0)], 0)).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}
    for file_config in (config, config | {"add_prefix_space": None}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(file_config))
        is_ignored = file_config["add_prefix_space"] is not None
        with nullcontext() if is_ignored else pytest.raises(RecipeError, match="Unigram"):
            require_supported_files(tmp_path)


# Steps of normalizers and pre-tokenizers, as in tokenizer.json
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": next(iter(PRE_TOKENIZERS))},  # Llama 3's
    "behavior": "Isolated",
    "invert": False,
}
BYTES = {"type": "ByteLevel", "use_regex": False}


@pytest.mark.parametrize(
    ("normalizers", "is_supported"),
    [([PREPEND, SPACES], True), ([SPACES], True), ([{"type": "NFKC"}, PREPEND, SPACES], False)],
)
def test_a_normalizer_that_llama_cpp_does_not_support_is_refused(
    normalizers: list[dict[str, Any]], is_supported: bool
) -> None:
    normalizer = {"type": "Sequence", "normalizers": normalizers}
    tokenizer = {"model": {"merges": [], "byte_fallback": True}, "normalizer": normalizer}
    with nullcontext() if is_supported else pytest.raises(RecipeError, match="NFKC"):
        assert pre_tokenizer_name(tokenizer) is None


@pytest.mark.parametrize(
    ("steps", "is_supported"),
    [
        ([SPLIT, BYTES], True),
        ([DIGITS, SPLIT, BYTES], False),
        ([SPLIT, DIGITS, BYTES], False),
        # use_regex splits the text a second time, with GPT-2's pattern.
        ([SPLIT, {"type": "ByteLevel", "use_regex": True}], False),
        ([SPLIT, {**BYTES, "add_prefix_space": False}], True),
        ([SPLIT, {**BYTES, "add_prefix_space": True}], False),
        ([{**SPLIT, "behavior": "Removed"}, BYTES], False),
        ([{**SPLIT, "invert": True}, BYTES], False),
        # llama.cpp's "smollm" splits digits, and then words with GPT-2's pattern.
        ([DIGITS, {"type": "ByteLevel", "use_regex": True}], True),
        ([DIGITS, BYTES], False),
    ],
)
def test_a_pre_tokenizer_with_further_splits_is_refused(
    steps: list[dict[str, Any]], is_supported: bool
) -> None:
    pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    with nullcontext() if is_supported else pytest.raises(RecipeError, match="pre_tokenizer="):
        pre_tokenizer_name({"model": {"merges": []}, "pre_tokenizer": pre_tokenizer})


@pytest.mark.parametrize(
    ("normalizer", "is_supported"),
    [(None, True), ({"type": "NFC"}, True), ({"type": "Lowercase"}, False)],
)
def test_a_byte_level_tokenizer_may_only_normalize_to_nfc(
    normalizer: dict[str, Any] | None, is_supported: bool
) -> None:
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}
    model = {"merges": [], "ignore_merges": True}
    tokenizer = {"model": model, "pre_tokenizer": pre_tokenizer, "normalizer": normalizer}
    with nullcontext() if is_supported else pytest.raises(RecipeError, match="Lowercase"):
        assert pre_tokenizer_name(tokenizer) == "llama-bpe"


METASPACE = {
    "type": "Metaspace",
    "replacement": "▁",
    "prepend_scheme": "never",
    "split": False,
}


@pytest.mark.parametrize(
    ("pre_tokenizer", "is_supported"),
    [
        (None, True),
        (METASPACE, True),
        ({**METASPACE, "split": True}, False),
        ({"type": "Metaspace", "replacement": "▁"}, False),  # splits by default
        (DIGITS, False),
    ],
)
def test_a_byte_fallback_tokenizer_that_splits_text_is_refused(
    pre_tokenizer: dict[str, Any] | None, is_supported: bool
) -> None:
    tokenizer = {"model": {"merges": [], "byte_fallback": True}, "normalizer": SPACES}
    with nullcontext() if is_supported else pytest.raises(RecipeError, match="pre_tokenizer="):
        assert pre_tokenizer_name({**tokenizer, "pre_tokenizer": pre_tokenizer}) is None
