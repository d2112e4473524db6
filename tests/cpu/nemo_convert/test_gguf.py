"""llama.cpp tokenizes prompts and generates from a GGUF file as transformers does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_convert.families import LLAMA3_ROPE
from nemo_convert.gguf_file import _rope_factors, require_storable, write
from nemo_convert.gguf_tokenizer import require_supported_files
from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json
from tests.support.folder_changes import TOKENIZER, edit_json
from tests.support.llama_cpp import PROMPTS, generate_greedily, require_similar_generation
from tests.support.models import EVEN, FAMILIES, write_tiny_model
from tests.support.sharp_attention import sharpen_attention

NEW_TOKENS = 12
NARROW = {**EVEN, "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 96}
"""Shape of a width-pruned model. Unlike in ``EVEN``, the head size is not hidden size / heads."""
LLAMA3 = {**LLAMA3_ROPE, "factor": 4.0}
"""RoPE scaling of the type that Llama 3.1 uses."""
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in FAMILIES if name != "qwen3_moe"},
    "qwen2, unpruned": EVEN,
    "llama, Llama 3's RoPE": {"rope_scaling": LLAMA3},
    "llama, tied": {"tie_word_embeddings": True},
}
"""Fields that replace those of ``NARROW``, by test case. The first word of a key is the family."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_generates_what_transformers_does(
    variant: str, text_file: Path, tmp_path: Path
) -> None:
    family, shape = variant.partition(",")[0], NARROW | VARIANTS[variant]
    folder = write_tiny_model(tmp_path / "hf", text_file, family, **shape)
    sharpen_attention(folder)
    result = write(folder, tmp_path / "model.gguf", "f32")
    # llama.cpp's Qwen2 does not support the head size of a width-pruned Qwen2, but its Llama does.
    expected = {"qwen2": "llama", "qwen3": "qwen3", "qwen2, unpruned": "qwen2"}
    assert result.architecture == expected.get(variant, "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = GGUFReader(tmp_path / "model.gguf").fields["tokenizer.chat_template"].contents()
    assert template == tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}
    completions = generate_greedily(tmp_path / "model.gguf", PROMPTS, NEW_TOKENS)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert completion.prompt_tokens == ids.shape[1]
        generated = model.generate(ids, max_new_tokens=NEW_TOKENS, **options)
        assert completion.tokens == generated.sequences[0, ids.shape[1] :].tolist()
        # Log-probability of the most likely token at each step; the batch has one sequence.
        scores = torch.stack(generated.scores).log_softmax(-1)[:, 0].max(-1).values
        # The largest difference was 2.5e-3, with llama.cpp's kernels for AVX2.
        torch.testing.assert_close(
            torch.tensor(completion.log_probabilities), scores, rtol=0, atol=5e-3, check_dtype=False
        )


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
    "values",
    [
        {"rope_theta": 1e39},
        {"rope_theta": 1e-50},
        {"rms_norm_eps": 1e-60},
        {"max_position_embeddings": 2**32},
        {"rope_scaling": {**LLAMA3_ROPE, "factor": 1e39}},
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
    ("config", "special_tokens"),
    [
        (  # with added_tokens_decoder, transformers ignores special_tokens_map.json
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
    write_json(folder / TOKENIZER, {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    write_json(folder / "special_tokens_map.json", special_tokens)
    write(folder, tmp_path / "model.gguf", "f16")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 288  # the first free id
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 288
    assert fields["tokenizer.ggml.tokens"].contents()[288] == "<end>"
    assert fields["tokenizer.ggml.token_type"].contents()[288] == TokenType.CONTROL


def test_chat_templates_are_those_that_transformers_loads(even_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(even_llama, tmp_path / "hf")
    edit_json(TOKENIZER, chat_template="old")(folder)
    (folder / "chat_template.jinja").write_text("new")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("with documents")
    write(folder, tmp_path / "model.gguf", "f16")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "new"
    assert fields["tokenizer.chat_template.rag"].contents() == "with documents"
    loaded = AutoTokenizer.from_pretrained(folder).chat_template
    assert loaded == {"default": "new", "rag": "with documents"}


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
    folder = shutil.copytree(even_llama, tmp_path / "hf")
    edit_json(TOKENIZER, chat_template=value)(folder)
    (folder / "chat_template.jinja").unlink()
    if is_supported:
        require_supported_files(folder)
        write(folder, tmp_path / "model.gguf", "f16")
        field = GGUFReader(tmp_path / "model.gguf").fields.get("tokenizer.chat_template")
        stored_template = field.contents() if field else None
        assert stored_template == ("text" if value else None)
        return
    for check in (require_supported_files, lambda f: write(f, tmp_path / "model.gguf", "f16")):
        with pytest.raises(RecipeError, match="chat_template="):
            check(folder)


def test_the_plan_does_not_check_a_file_that_transformers_ignores(tmp_path: Path) -> None:
    """With ``add_prefix_space``, LlamaTokenizerFast ignores tokenizer.json."""
    Tokenizer(models.Unigram([("<unk>", 0.0)], 0)).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}
    write_json(tmp_path / TOKENIZER, config)
    require_supported_files(tmp_path)
    write_json(tmp_path / TOKENIZER, config | {"add_prefix_space": None})
    with pytest.raises(RecipeError, match="Unigram"):
        require_supported_files(tmp_path)
