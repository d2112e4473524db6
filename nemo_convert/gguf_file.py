"""Writes a Hugging Face folder as one GGUF file, for llama.cpp and programs based on it.

The ``gguf`` package provides names of tensors and metadata. The order of RoPE rows, the names of
pre-tokenizers and Llama 3's frequencies follow llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from ctypes import c_float
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_convert import hf
from nemo_convert.architecture import Architecture
from nemo_convert.generation_config import read_end_ids
from nemo_convert.gguf_tokenizer import (
    FIX,
    SPACE,
    add_special_tokens,
    chat_templates,
    end_token_ids,
    require_supported,
    require_supported_config,
)
from nemo_convert.hf_config import as_transformers_4, read_architecture, rms_norm_eps, rope_theta
from nemo_convert.results import GgufResult
from nemo_convert.tokenizer_files import load_tokenizer
from recipes.core.errors import RecipeError
from recipes.core.files import read_json

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter

FILE = "model.gguf"
"""Name of the file in the artifact of the stage ``export_gguf``."""
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Maps Hugging Face architectures to llama.cpp's, except those of some width-pruned models."""
MATRIX_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""Maps each type of matrices to the gguf package's name for a file with such matrices. Vectors are
always float32."""
MAXIMA = {"F16": 65504, "Q8_0": 127 * 65504}
"""Largest absolute values. Blocks of ``Q8_0`` have a float16 (up to 65504) and 8-bit integers."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    type: str
    """Type in the file, as gguf spells it: ``F32``, ``Q8_0``."""
    read: Callable[[], np.ndarray]
    """Returns the float32 values, with rows in llama.cpp's order."""


def write(
    folder: Path,
    file: Path,
    matrix_type: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GgufResult:
    """Writes a model with its tokenizer and chat template, one tensor at a time.

    Args:
        folder: Hugging Face folder with safetensors.
        file: The new file.
        matrix_type: One of ``MATRIX_TYPES``. ``q8_0`` has blocks of 32 values, so matrices whose
            row length is not a multiple of 32 become ``f16``.
        progress: Called with the number of written tensors and the number of all tensors.

    Raises:
        RecipeError: llama.cpp does not support the tokenizer or a weight, or a value is too large.
    """
    import gguf
    import numpy as np

    config = as_transformers_4(read_json(folder / "config.json"), str(folder))
    architecture = read_architecture(config, str(folder))
    require_storable(config)
    arch_name = architecture_name(architecture)
    writer = gguf.GGUFWriter(file, arch_name)
    writer.add_file_type(gguf.LlamaFileType[MATRIX_TYPES[matrix_type]])
    _add_shape(writer, architecture, config)
    _add_tokenizer(writer, folder, architecture.vocab_size)
    tensors = [
        *_rope_factors(config, architecture.kv_channels),
        *_weights(hf.Weights(folder), architecture, arch_name, matrix_type),
    ]
    types = [gguf.GGMLQuantizationType[tensor.type] for tensor in tensors]
    for tensor, stored_type in zip(tensors, types, strict=True):
        # With dtype uint8, gguf takes a shape in bytes, and derives the tensor's shape from it.
        shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, stored_type)
        writer.add_tensor_info(tensor.name, shape, np.dtype("uint8"), math.prod(shape), stored_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()  # keys and values: shape, tokenizer, template
    writer.write_ti_data_to_file()  # tensor info: names, shapes, types
    for number, (tensor, stored_type) in enumerate(zip(tensors, types, strict=True), 1):
        values = tensor.read()
        if (largest := np.abs(values).max()) > MAXIMA.get(tensor.type, math.inf):
            what = f"{tensor.name} has the value {largest:g}, too large for {tensor.type}."
            raise RecipeError(what, "set the type to bf16 or f32")
        writer.write_tensor_data(gguf.quants.quantize(values, stored_type))
        progress(number, len(tensors))
    writer.close()
    return GgufResult(arch_name, matrix_type, len(tensors), file.stat().st_size)


def architecture_name(architecture: Architecture) -> str:
    """Returns llama.cpp's name of a model's architecture.

    llama.cpp's Qwen2 requires a head size of hidden size / heads, which width pruning breaks.
    llama.cpp's Llama allows any head size, and supports biases of queries, keys and values. So a
    width-pruned Qwen2 is written as a Llama.
    """
    name = ARCHITECTURES[architecture.hf_architecture]
    query_width = architecture.num_attention_heads * architecture.kv_channels
    return "llama" if name == "qwen2" and query_width != architecture.hidden_size else name


def _weights(
    weights: hf.Weights, architecture: Architecture, arch_name: str, matrix_type: str
) -> Iterator[_Tensor]:
    """Yields every weight of a folder, under its name in the GGUF file."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == arch_name)
    name_map = get_tensor_name_map(arch, architecture.num_layers)
    # RoPE of llama.cpp's Llama rotates adjacent rows. RoPE of its other models, and of
    # transformers, rotates rows i and i + dim / 2. So for Llama, the rows of these modules are
    # reordered in each head. The values are the numbers of heads.
    heads = {"attn_q": architecture.num_attention_heads, "attn_k": architecture.num_query_groups}
    for source in sorted(weights.names()):
        if source == "lm_head.weight" and architecture.tied_embeddings:
            continue  # llama.cpp uses the embedding
        target = name_map.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            what = f"llama.cpp has no name for the weight {source} of a {arch_name} model."
            raise RecipeError(what, FIX)
        module = target.split(".")[-2]  # blk.3.attn_q.weight: attn_q
        heads_to_reorder = heads.get(module) if arch_name == "llama" else None
        shape = weights.shape(source)
        read = partial(_read, weights, source, heads_to_reorder)
        yield _Tensor(target, shape, _stored_type(shape, matrix_type), read)


def _read(weights: hf.Weights, source: str, heads: int | None) -> np.ndarray:
    """Reads a weight in float32. If ``heads`` is set, orders its rows for llama.cpp's Llama."""
    data: np.ndarray = weights.read(source).float().numpy()
    return data if heads is None else half_rotation_to_interleaved(data, heads)


def _stored_type(shape: tuple[int, ...], matrix_type: str) -> str:
    """Returns gguf's name of the type in which ``write`` stores a weight of this shape."""
    if len(shape) == 1:
        return "F32"
    has_partial_block = shape[-1] % 32 != 0
    return "F16" if matrix_type == "q8_0" and has_partial_block else matrix_type.upper()


def half_rotation_to_interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Moves rows i and i + dim/2 of each head to rows 2i and 2i + 1 of the head."""
    # [heads, 2, dim / 2, ...]; the last axis is missing for a bias.
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add_shape(writer: GGUFWriter, shape: Architecture, config: Mapping[str, Any]) -> None:
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.ffn_hidden_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_query_groups)
    # llama.cpp's default head size, hidden size / heads, is wrong for pruned models.
    writer.add_key_length(shape.kv_channels)
    writer.add_value_length(shape.kv_channels)
    writer.add_rope_dimension_count(shape.kv_channels)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_layer_norm_rms_eps(rms_norm_eps(config))


def require_storable(config: Mapping[str, Any]) -> None:
    """Refuses numbers of a ``config.json`` that are too large or too small for GGUF's types."""
    numbers = {"rope_theta": rope_theta(config), "rms_norm_eps": rms_norm_eps(config)}
    scaling = config.get("rope_scaling") or {}
    numbers |= {key: value for key, value in scaling.items() if not isinstance(value, str)}
    # GGUF stores these numbers in float32, and the context length in 32 bits.
    invalid = {k: value for k, value in numbers.items() if not 0 < c_float(value).value < math.inf}
    context = config.get("max_position_embeddings") or 0
    if context >= 2**32:
        invalid["max_position_embeddings"] = context
    for key, value in invalid.items():  # the error names only the first
        what = f"config.json has {key}={value}, which is outside the range of GGUF's number."
        raise RecipeError(what, f"correct {key}, or {FIX}")


def _rope_factors(config: Mapping[str, Any], dim: int) -> Iterator[_Tensor]:
    """Yields Llama 3's divisors of RoPE frequencies, float32 [dim / 2]; nothing for plain RoPE.

    Follows ``_compute_llama3_parameters`` in transformers' ``modeling_rope_utils.py``.
    """
    import numpy as np

    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") != "llama3":
        return
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi * rope_theta(config) ** (np.arange(0, dim, 2) / dim)
    # Number of full turns of each channel pair over the original context. A pair with at least
    # ``high`` turns keeps its frequency. With at most ``low``, it is divided by ``factor``.
    turns = scaling["original_max_position_embeddings"] / wavelengths
    unscaled_fraction = np.clip((turns - low) / (high - low), 0, 1)
    multipliers = (1 - unscaled_fraction) / scaling["factor"] + unscaled_fraction
    factors = (1 / multipliers).astype(np.float32)
    yield _Tensor("rope_freqs.weight", factors.shape, "F32", lambda: factors)


def _add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    from gguf import SpecialVocab

    require_supported_config(folder)
    # tokenizer.json may lack tokens that other files or the tokenizer's class add. A class such as
    # LlamaTokenizerFast replaces the post-processor of tokenizer.json. So the code below reads the
    # loaded tokenizer, not the file.
    loaded = load_tokenizer(folder)
    tokenizer = json.loads(loaded.backend_tokenizer.to_str())
    pre_tokenizer = require_supported(tokenizer)
    tokens, types = _vocabulary(tokenizer, vocab_size)
    if pre_tokenizer is None:
        writer.add_tokenizer_model("llama")  # llama.cpp's name for sentencepiece's BPE
        writer.add_token_scores(_scores(tokenizer["model"], vocab_size))
        writer.add_add_space_prefix(loaded.tokenize("a")[0].startswith(SPACE))
    else:
        writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
        writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    # SpecialVocab does not read all files, and does not know the tokens of the tokenizer's class.
    for role in special.special_token_types:
        if (token_id := getattr(loaded, f"{role}_token_id", None)) is not None:
            special.special_token_ids[role] = token_id
    bos, eos = loaded.bos_token_id, loaded.eos_token_id
    end_ids = end_token_ids(read_end_ids(folder), eos, dict(enumerate(tokens)))
    special.special_token_ids |= end_ids
    special.add_special_token = add_special_tokens(tokenizer, bos, eos)
    # SpecialVocab may have read a template from another file than transformers.
    special.chat_template = chat_templates(loaded.chat_template)
    special.add_to_gguf(writer, quiet=True)


def _scores(model: Mapping[str, Any], size: int) -> list[float]:
    """Returns the scores of ids from 0 to ``size`` for ``model``, the BPE of ``tokenizer.json``.

    llama.cpp first does the merge whose result has the highest score. So a token's score is the
    negative position of the first merge that makes it. Other tokens have the lowest score.
    """
    positions: dict[int, int] = {}
    for position, merge in enumerate(model["merges"]):  # "a b" in old files, otherwise ["a", "b"]
        pair = merge.split(" ") if isinstance(merge, str) else merge
        positions.setdefault(model["vocab"]["".join(pair)], position)
    last = len(model["merges"])
    return [-float(positions.get(token_id, last)) for token_id in range(size)]


def _vocabulary(tokenizer: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Returns the token and the type of each id; an id without a token gets a placeholder."""
    from gguf import TokenType

    tokens = {token_id: token for token, token_id in tokenizer["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    if tokenizer["model"].get("byte_fallback"):
        for token_id, token in tokens.items():
            if re.fullmatch("<0x..>", token):  # <0x0A>
                types[token_id] = TokenType.BYTE
    for added in tokenizer.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return (
        [tokens.get(token_id, f"[PAD{token_id}]") for token_id in range(size)],
        [types.get(token_id, TokenType.UNUSED) for token_id in range(size)],
    )
