"""Writes a Hugging Face folder as one GGUF file, for llama.cpp and programs based on it.

The ``gguf`` package provides names of tensors and metadata. The order of RoPE rows, the names of
pre-tokenizers and Llama 3's frequencies follow llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_convert import hf
from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import as_transformers_4, read_architecture, rms_norm_eps, rope_theta
from nemo_convert.results import GgufResult
from nemo_convert.tokenizer_files import TOKENIZER, load_tokenizer
from recipes.core.errors import RecipeError
from recipes.core.files import read_json

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter

FILE = "model.gguf"
SPACE = "▁"
"""Character that represents a space in sentencepiece's tokens."""
SENTENCEPIECE_STEPS = (
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
)
"""Steps of a normalizer that llama.cpp has for a tokenizer with byte fallback."""
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""llama.cpp's names of the families; see ``architecture_name`` for the exception."""
MATRIX_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""Types of matrices, and gguf's name of a file with such matrices. Vectors are always float32."""
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


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    type: str
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
        RecipeError: llama.cpp has no name for the tokenizer's pre-tokenizer or for a weight.
    """
    import gguf
    import numpy as np

    config = as_transformers_4(read_json(folder / "config.json"), str(folder))
    architecture = read_architecture(config, str(folder))
    name = architecture_name(architecture)
    writer = gguf.GGUFWriter(file, name)
    writer.add_file_type(gguf.LlamaFileType[MATRIX_TYPES[matrix_type]])
    _add_shape(writer, architecture, config)
    _add_tokenizer(writer, folder, architecture.vocab_size)
    tensors = [
        *_rope_factors(config, architecture.kv_channels),
        *_weights(hf.Weights(folder), architecture, name, matrix_type),
    ]
    types = [gguf.GGMLQuantizationType[tensor.type] for tensor in tensors]
    for tensor, stored_type in zip(tensors, types, strict=True):
        # With dtype uint8, gguf takes a shape in bytes, and derives the tensor's shape from it.
        shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, stored_type)
        writer.add_tensor_info(tensor.name, shape, np.dtype("uint8"), math.prod(shape), stored_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (tensor, stored_type) in enumerate(zip(tensors, types, strict=True), 1):
        writer.write_tensor_data(gguf.quants.quantize(tensor.read(), stored_type))
        progress(number, len(tensors))
    writer.close()
    return GgufResult(name, matrix_type, len(tensors), file.stat().st_size)


def architecture_name(architecture: Architecture) -> str:
    """Returns llama.cpp's architecture for a model.

    llama.cpp's Qwen2 requires a head size of hidden size / heads, which width pruning breaks.
    llama.cpp's Llama allows any head size, and supports biases of queries, keys and values. So a
    width-pruned Qwen2 is written as a Llama.
    """
    name = ARCHITECTURES[architecture.hf_architecture]
    width = architecture.num_attention_heads * architecture.kv_channels
    return "llama" if name == "qwen2" and width != architecture.hidden_size else name


def _weights(
    weights: hf.Weights, architecture: Architecture, name: str, matrix_type: str
) -> Iterator[_Tensor]:
    """Yields every weight of a folder, under its name in the GGUF file."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, arch_name in MODEL_ARCH_NAMES.items() if arch_name == name)
    names = get_tensor_name_map(arch, architecture.num_layers)
    heads = {"attn_q": architecture.num_attention_heads, "attn_k": architecture.num_query_groups}
    for source in sorted(weights.names()):
        if source == "lm_head.weight" and architecture.tied_embeddings:
            continue
        target = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise RecipeError(
                f"llama.cpp has no name for the weight {source} of a {name} model.",
                "leave export_gguf out (gguf=null)",
            )
        # RoPE of llama.cpp's Llama rotates adjacent rows. RoPE of its other models, and of
        # transformers, rotates rows i and i + dim / 2. A target is a name like blk.3.attn_q.weight.
        reordered_heads = heads.get(target.split(".")[-2]) if name == "llama" else None
        shape = weights.shape(source)
        read = partial(_read, weights, source, reordered_heads)
        yield _Tensor(target, shape, _stored_type(shape, matrix_type), read)


def _read(weights: hf.Weights, source: str, heads: int | None) -> np.ndarray:
    """Reads a weight in float32. If ``heads`` is set, orders its rows for llama.cpp's Llama."""
    data: np.ndarray = weights.read(source).float().numpy()
    return data if heads is None else half_rotation_to_interleaved(data, heads)


def _stored_type(shape: tuple[int, ...], matrix_type: str) -> str:
    if len(shape) == 1:
        return "F32"
    return "F16" if matrix_type == "q8_0" and shape[-1] % 32 else matrix_type.upper()


def half_rotation_to_interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders RoPE rows for llama.cpp: (i, i + dim/2) become (2i, 2i + 1)."""
    pairs = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _add_shape(writer: GGUFWriter, shape: Architecture, config: Mapping[str, Any]) -> None:
    """Adds sizes and constants. Head sizes are explicit: pruning makes the defaults wrong."""
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.ffn_hidden_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_query_groups)
    writer.add_key_length(shape.kv_channels)
    writer.add_value_length(shape.kv_channels)
    writer.add_rope_dimension_count(shape.kv_channels)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_layer_norm_rms_eps(rms_norm_eps(config))


def _rope_factors(config: Mapping[str, Any], dim: int) -> Iterator[_Tensor]:
    """Yields Llama 3's divisors of RoPE frequencies, float32 [dim / 2]; nothing for plain RoPE.

    Follows ``_compute_llama3_parameters`` in transformers' ``modeling_rope_utils.py``.
    """
    import numpy as np

    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") != "llama3":
        return
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # Rotations of each pair within the original context. With many of them, ``unscaled`` is 1, and
    # the frequency stays the same. With few, it is 0, and the factor divides the frequency.
    turns = scaling["original_max_position_embeddings"] / (
        2 * math.pi * rope_theta(config) ** (np.arange(0, dim, 2) / dim)
    )
    unscaled = np.clip((turns - low) / (high - low), 0, 1)
    factors = (1 / ((1 - unscaled) / scaling["factor"] + unscaled)).astype(np.float32)
    yield _Tensor("rope_freqs.weight", factors.shape, "F32", lambda: factors)


def _add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Adds vocabulary, merges, special tokens and chat template."""
    from gguf import SpecialVocab

    # A class such as LlamaTokenizerFast replaces the post-processor of tokenizer.json. Encoding a
    # text with the loaded tokenizer shows whether the text gets a space before it, BOS and EOS.
    loaded = load_tokenizer(folder)
    tokenizer = read_json(folder / TOKENIZER)
    pre_tokenizer = pre_tokenizer_name(tokenizer)
    tokens, types = _vocabulary(tokenizer, vocab_size)
    if pre_tokenizer is None:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(tokenizer["model"], vocab_size))
        [first, *_] = loaded.tokenize("a")
        writer.add_add_space_prefix(first.startswith(SPACE))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    ids = loaded("a").input_ids
    for role, end_id in (("bos", ids[0]), ("eos", ids[-1])):
        is_added = getattr(loaded, f"{role}_token_id") == end_id
        special.add_special_token[role] = is_added
        if is_added:  # a class may also define the token itself
            special.special_token_ids[role] = end_id
    special.add_to_gguf(writer, quiet=True)


def _scores(model: Mapping[str, Any], size: int) -> list[float]:
    """Returns the score of each id. llama.cpp first merges to the token with the highest score.

    The score is the negative position of the first merge to the token. Tokens that no merge gives
    have the lowest score.
    """
    positions: dict[int, int] = {}
    for position, merge in enumerate(model["merges"]):  # "a b" in old files, otherwise ["a", "b"]
        parts = merge.split(" ") if isinstance(merge, str) else merge
        positions.setdefault(model["vocab"]["".join(parts)], position)
    return [-float(positions.get(number, len(model["merges"]))) for number in range(size)]


def _vocabulary(tokenizer: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Returns the token and the type of each id; an id without a token gets a placeholder."""
    from gguf import TokenType

    tokens = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    has_bytes = bool(tokenizer["model"].get("byte_fallback"))
    types = {
        number: TokenType.BYTE if has_bytes and re.fullmatch("<0x..>", token) else TokenType.NORMAL
        for number, token in tokens.items()
    }
    for added in tokenizer.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return (
        [tokens.get(number, f"[PAD{number}]") for number in range(size)],
        [types.get(number, TokenType.UNUSED) for number in range(size)],
    )


def _require_sentencepiece_steps(tokenizer: Mapping[str, Any]) -> None:
    normalizer = tokenizer.get("normalizer") or {"type": "Sequence", "normalizers": []}
    if any(step not in SENTENCEPIECE_STEPS for step in normalizer.get("normalizers", [normalizer])):
        raise RecipeError(
            f"normalizer={normalizer} does not exist in llama.cpp.",
            "leave export_gguf out (gguf=null)",
        )


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str | None:
    """Returns llama.cpp's name of the pre-tokenizer of a ``tokenizer.json``.

    ``None`` for BPE with byte fallback, which has no pre-tokenizer in llama.cpp.

    Raises:
        RecipeError: The tokenizer is not BPE, or neither ``PRE_TOKENIZERS`` nor this function has
            a name for its pre-tokenizer.
    """
    model = tokenizer.get("model") or {}
    if "merges" not in model:  # old files have no type
        raise RecipeError(
            f"{TOKENIZER} has the type {model.get('type')}; only BPE can be written as GGUF.",
            "leave export_gguf out (gguf=null)",
        )
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    if model.get("byte_fallback"):
        _require_sentencepiece_steps(tokenizer)
        return None
    types = [step.get("type") for step in steps]
    pattern = steps[0].get("pattern", {}).get("Regex")
    is_split_once = types == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True)
    if is_split_once and pattern in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[pattern]
    if types == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if types == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    raise RecipeError(
        f"pre_tokenizer={pre_tokenizer} has no known name in llama.cpp.",
        "leave export_gguf out (gguf=null), or add the name to PRE_TOKENIZERS in gguf_file.py",
    )
