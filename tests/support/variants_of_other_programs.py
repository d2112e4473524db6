"""Lists variants of Hugging Face folders that other programs write, or that users edit.

Functions named ``_exact_*`` yield folders that must be converted exactly. Functions named
``_refused_*`` yield folders that must be refused. ``variants.variants`` describes the models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_convert.families import LLAMA3_ROPE
from tests.support.folder_changes import (
    ABSENT,
    EMBEDDING,
    GENERATION,
    HEAD,
    QUERY,
    SHARDS,
    TOKENIZER,
    WEIGHTS,
    Change,
    add_weight,
    all_of,
    edit_config,
    edit_json,
    edit_weights,
    remove_files,
    split_weights,
    use_sentencepiece,
    use_vocabulary_and_merges,
    write_file,
)
from tests.support.variant import Variant, variants_of_values

QWEIGHT = "model.layers.0.self_attn.q_proj.qweight"  # the name of QUERY in a GPTQ model
LONG_CONTEXT = {"max_position_embeddings": 32_768, "layer_types": ABSENT}
"""More positions than the default sliding window of 4,096. Without ``layer_types``, which would
disable the window."""
TOO_MANY_TOKENS = [f"<token{n}>" for n in range(8)]
"""Eight special tokens. The embedding has only six unused rows."""
EOS: dict[str, Any] = {"__type": "AddedToken", "content": "<eos>"}
EOS |= dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
"""A token in the format in which transformers saves an AddedToken."""


def variants_of_other_programs() -> Iterator[Variant]:
    """Yields all variants."""
    yield from _exact_configs()
    yield from _exact_files()
    yield from _odd_values()
    yield from _refused_configs()
    yield from _refused_windows_and_heads()
    yield from _refused_files()
    yield from _refused_names_and_indexes()
    yield from _refused_tokenizers()


def _exact_configs() -> Iterator[Variant]:
    for base in ("mistral", "qwen2", "qwen3_moe"):
        yield Variant("head_dim None", edit_config(head_dim=None), base=base)
    for key, value in (
        ("quantization_config", None),
        ("tie_word_embeddings", None),
        ("pad_token_id", None),
        ("pad_token_id", -1),
        ("pad_token_id", 293),  # the last of the 294 embeddings
        ("architectures", ["LlamaForCausalLM", "LlamaModel"]),
        ("architectures", "LlamaForCausalLM"),
        ("torch_dtype", {"": "float32"}),
        ("pretraining_tp", 2),
        ("rope_scaling", {}),
    ):
        yield Variant(f"other {key} {value}", edit_config(**{key: value}))
    window_off = edit_config(use_sliding_window=False, sliding_window=16)
    yield Variant("window that is switched off", window_off)
    no_window = edit_config(use_sliding_window=True, sliding_window=None, layer_types=ABSENT)
    yield Variant("switch without a window", no_window, base="qwen2")
    yield Variant("all experts", edit_config(num_experts_per_tok=6), base="qwen3_moe")
    yield Variant("no norm_topk_prob", edit_config(norm_topk_prob=ABSENT), base="qwen3_moe")


def _exact_files() -> Iterator[Variant]:
    yield Variant("format mlx", _replace_metadata({"format": "mlx"}))
    yield Variant("no metadata", _replace_metadata(None))
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": SHARDS[0]}
    yield Variant("index with a rotary buffer", split_weights(SHARDS, buffer))
    yield Variant("shards in a folder", split_weights(("sub/a.safetensors", "./a.safetensors")))
    for values in (
        {"do_sample": False, "length_penalty": 1.5, "num_beams": 1, "temperature": ABSENT},
        {"output_scores": True},
        {"num_return_sequences": 2},
        {"forced_eos_token_id": 5, "suppress_tokens": [1]},
    ):
        yield Variant(f"other generation {values}", edit_json(GENERATION, **values))
    for settings in (
        {"bos_token": EOS},
        {"pad_token": "[PAD]"},
        {"pad_token": ""},
        {"model_max_length": 1e30},
        {"tokenizer_class": ABSENT},
        {"tokenizer_class": "LlamaTokenizerFast"},
    ):
        yield Variant(f"tokenizer {settings}", edit_json(TOKENIZER, **settings))


def _odd_values() -> Iterator[Variant]:
    switches = {"attention_bias": 0, "tie_word_embeddings": 0, "use_cache": 1}
    integers = edit_config(**switches, initializer_range=1, rms_norm_eps=1)
    yield Variant("switches and floats as 0 and 1", integers)
    null = edit_config(attention_dropout=None, use_cache=None, bos_token_id=None)
    yield Variant("null values", null)
    yield Variant("two end-of-text tokens", edit_config(eos_token_id=[0, 1]))
    not_positive = (0, -1.0, float("nan"), float("inf"), "1e4", None, 10**30)
    invalid = {
        "attention_bias": ("false",),
        "attention_dropout": (float("inf"), "x"),
        "bos_token_id": ("<s>", [1], 10**30),  # PyTorch's integers have 64 bits
        "eos_token_id": ({"a": 1}, ["</s>"]),
        "initializer_range": (None, "0.02"),
        "max_position_embeddings": (10**30,),
        "pad_token_id": (5000, "<pad>"),
        "rms_norm_eps": not_positive,
        "rope_theta": (*not_positive, 10**400),  # too large for a float
        "tie_word_embeddings": ("false",),
        "transformers_version": ("anything", 5, "9" * 5000),  # more digits than Python converts
        "use_cache": ("x",),
    }
    yield from variants_of_values("config.json", "invalid {key}=", invalid)
    for version in (None, "", "4.58.0.dev0"):
        yield Variant(f"version {version!r}", edit_config(transformers_version=version))
    # The names of all weights of so many layers might not fit in memory.
    too_many_experts = edit_config(num_experts=10**30)
    refusal = "num_experts=1000000000000000000000000000000"
    yield Variant("too many experts", too_many_experts, refusal, base="qwen3_moe")
    too_many_layers = edit_config(num_hidden_layers=2_000_000)
    yield Variant("too many layers", too_many_layers, "num_hidden_layers=2000000")


def _refused_configs() -> Iterator[Variant]:
    as_text = edit_config(norm_topk_prob="false")
    yield Variant("norm_topk_prob as text", as_text, "invalid norm_topk_prob", base="qwen3_moe")
    no_theta = edit_config(rope_theta=ABSENT, rope_parameters={"rope_theta": None})
    yield Variant("theta null", no_theta, "invalid rope_theta")
    types = (5, [], ["full_attention"], "full_attention", [["full_attention"]])
    yield from variants_of_values("config.json", "layer_types=", {"layer_types": types})
    quantized = dict.fromkeys(("quantization_config", "quantization", "compression_config"), ({},))
    fix = "{key}=.*\n  fix: .*unquantized model"
    yield from variants_of_values("config.json", fix, quantized)
    unsupported = {
        "return_dict": (False,),
        "transformers_weights": ("other.safetensors",),
        "auto_map": ({"AutoModelForCausalLM": "code.Model"},),
        "text_config": ({"tie_word_embeddings": True},),
        "hidden_act": (None,),
        "use_qk_norm": (2,),  # a key of the family qwen3_moe
        "attention_bias": (True,),
        "rope_scaling": ({**LLAMA3_ROPE, "factor": 8.0, "low_freq_factor": 2.0},),
    }
    yield from variants_of_values("config.json", "{key}=.* is not supported", unsupported)
    for key, value, base, refusal in (
        ("attention_bias", True, "qwen2", "attention_bias=True .*\n  fix: remove it"),
        ("hidden_act", "swish", "llama", "hidden_act=swish .*\n  fix: set it to silu"),
        ("num_key_value_heads", None, "qwen3_moe", "num_key_value_heads is null"),
        ("mlp_only_layers", "", "qwen3_moe", "mlp_only_layers= is not supported"),
    ):
        yield Variant(f"{key} {value!r}", edit_config(**{key: value}), refusal, base)


def _refused_windows_and_heads() -> Iterator[Variant]:
    for base in ("qwen2", "qwen3", "qwen3_moe"):
        switched_on = edit_config(
            use_sliding_window=True, sliding_window=ABSENT, max_window_layers=1, **LONG_CONTEXT
        )
        yield Variant("window by default", switched_on, "sliding_window=4096", base=base)
    for first in (None, "28", -1):  # index of the first layer with a window
        change = edit_config(use_sliding_window=True, sliding_window=4096, max_window_layers=first)
        yield Variant(f"window from layer {first!r}", change, "max_window_layers=", base="qwen2")
    for window in (16, 4096):
        # Mistral's class ignores ``use_sliding_window``.
        settings = {"use_sliding_window": False, "sliding_window": window, **LONG_CONTEXT}
        refusal = f"sliding_window={window}"
        yield Variant(f"window {window}", edit_config(**settings), refusal, base="mistral")
    odd_size = all_of(edit_config(head_dim=15), edit_weights(_remove_last_channels))
    yield Variant("odd head size", odd_size, "head_dim=15 is odd")
    for groups in (None, 4):  # null means one group per head, of 4; the weights have 2 groups
        change = edit_config(num_key_value_heads=groups)
        yield Variant(f"{groups} groups", change, "k_proj.* according to config.json")
    no_groups = edit_config(num_key_value_heads=ABSENT)
    yield Variant("no groups", no_groups, "num_key_value_heads=32", base="qwen2")


def _refused_files() -> Iterator[Variant]:
    for metadata in ({}, {"format": "np"}, {"format": "tf"}, {"total_size": "9"}):
        change = _replace_metadata(metadata)
        yield Variant(f"metadata {metadata}", change, "in its metadata, not pt")
    for name, entry, values in (  # ``_edit_header`` explains the values
        ("a list", "__metadata__", []),
        ("a number", "__metadata__", {"format": "pt", "step": 5}),
        ("a float", "model.norm.weight", {"shape": [64.0]}),
        ("a float offset", "lm_head.weight", {"data_offsets": [0, 294 * 64 * 4.0]}),  # float32
        ("two metadata", "__metadata__", None),
        ("two heads", "lm_head.weight", None),
    ):
        yield Variant(f"{name} in the header", _edit_header(entry, values), "is damaged")
    adapter = all_of(remove_files("config.json", WEIGHTS), write_file("adapter_config.json", "{}"))
    yield Variant("only an adapter", adapter, "it is an adapter.*\n  fix: merge")
    for file in ("pytorch_model.bin", "model.fp16.safetensors", "hf_model_0001_0.pt"):
        yield Variant(f"only {file}", _rename_weights(file), "has neither")
    no_embedding = edit_weights(lambda tensors: tensors.pop(EMBEDDING))
    tied = all_of(edit_config(tie_word_embeddings=True), no_embedding)
    yield Variant("tied without an embedding", tied, f"has no {EMBEDDING}")
    for name in ("output.weight", "lm_head.modules_to_save.default.weight"):
        renamed = edit_weights(lambda tensors, name=name: tensors.update({name: tensors.pop(HEAD)}))
        yield Variant(f"head named {name}", renamed, f"has no {HEAD}.* but has {name}")
    yield Variant("bias of the head", add_weight("lm_head.bias", 294), "has lm_head.bias")


def _refused_names_and_indexes() -> Iterator[Variant]:
    for prefix in ("_orig_mod.", "base_model.model.", "language_model.", "module."):
        yield Variant(f"prefix {prefix}", _add_prefix(prefix), f"fix: .*remove '{prefix}'")
    yield Variant("no prefix", edit_weights(_remove_prefix), "fix: .*add 'model.'")
    quantized = edit_weights(lambda tensors: tensors.update({QWEIGHT: tensors.pop(QUERY)}))
    yield Variant("GPTQ", quantized, "fix: .*unquantized model")
    yield Variant("fused experts", edit_weights(_fuse_experts), r"gate_up_proj\[N\]", "qwen3_moe")
    for name in ("a.bin", "../a.safetensors", "/a.safetensors"):
        extra = split_weights(SHARDS, {"model.extra": name})
        yield Variant(f"index with {name}", extra, f"lists {name!r}")
    for name in ("absent.safetensors", "x" * 300 + ".safetensors"):  # Linux allows 255 bytes
        buffer = split_weights(SHARDS, {"model.layers.0.self_attn.rotary_emb.inv_freq": name})
        yield Variant(f"index with {name[:9]}", buffer, f"does not have {name}")
    tied = edit_config(tie_word_embeddings=True)
    bfloat16_head = edit_weights(
        lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].bfloat16()})
    )
    # A tied head must equal the embedding, which has 294 rows and type float32.
    for difference, change in (("rows", add_weight(HEAD, 300, 64)), ("type", bfloat16_head)):
        yield Variant(f"head with other {difference}", all_of(tied, change), f"remove {HEAD}")


def _refused_tokenizers() -> Iterator[Variant]:
    prefix = edit_json(TOKENIZER, tokenizer_class="LlamaTokenizer", add_prefix_space=True)
    yield Variant("space before a text", prefix, "invalid add_prefix_space")
    for key in ("extra_special_tokens", "additional_special_tokens"):
        change = edit_json(TOKENIZER, **{key: TOO_MANY_TOKENS})
        yield Variant(f"too many {key}", change, "tokens without an embedding")
    # With added_tokens_decoder, transformers 4 would ignore the older files of tokens.
    no_decoder = edit_json(TOKENIZER, added_tokens_decoder=ABSENT)
    tokens = edit_json("special_tokens_map.json", additional_special_tokens=TOO_MANY_TOKENS)
    yield Variant("too many in the map", all_of(no_decoder, tokens), "tokens without an embedding")
    # This class adds 7 special tokens. The embedding has 6 unused rows.
    code_llama = edit_json(TOKENIZER, tokenizer_class="CodeLlamaTokenizer", eos_token=ABSENT)
    yield Variant("too many tokens of the class", code_llama, "has 1 tokens without an embedding")
    broken = write_file("special_tokens_map.json", "{")
    yield Variant("damaged map of tokens", broken, "is not valid JSON")
    text_id = all_of(no_decoder, write_file("added_tokens.json", '{"<a>": "1"}'))
    yield Variant("id as text", text_id, "is not a number")
    no_class = edit_json(TOKENIZER, tokenizer_class=ABSENT)
    for name in ("BertTokenizer", "OwnTokenizer"):
        change = all_of(no_class, edit_config(tokenizer_class=name))
        yield Variant(f"class {name} in the config", change, f"names the class {name}")
        change = edit_json(TOKENIZER, tokenizer_class=name, backend="tokenizers")
        yield Variant(f"class {name} with a backend", change, f"names the class {name}")
    for replace_tokenizer, name, file in (
        (use_sentencepiece, "Qwen2Tokenizer", "tokenizer.model"),
        (use_vocabulary_and_merges, "LlamaTokenizer", "merges.txt"),
        (use_vocabulary_and_merges, ABSENT, "merges.txt"),
    ):
        change = all_of(replace_tokenizer, edit_json(TOKENIZER, tokenizer_class=name))
        yield Variant(f"{name} with {file}", change, f"does not read {file}")
    # A merge joins two tokens, not three.
    merges = all_of(use_vocabulary_and_merges, write_file("merges.txt", "#version: 1\na b c\n"))
    yield Variant("damaged merges", merges, "are not a tokenizer")
    for file in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
        yield Variant(f"{file} in Latin-1", write_file(file, b"\xe9"), f"{file} is not in UTF-8")
    for key, value in (("eos_token", 5), ("additional_special_tokens", "x")):
        change = edit_json("special_tokens_map.json", **{key: value})
        refusal = f"special_tokens_map.json: invalid {key}"
        yield Variant(f"map with {key}={value}", all_of(no_decoder, change), refusal)
    for file in ("config.json", "special_tokens_map.json"):  # too deep for Python's JSON parser
        nested = write_file(file, '{"a":' * 100_000 + "1" + "}" * 100_000)
        yield Variant(f"nested {file}", nested, f"{file} is not valid JSON")


def _replace_metadata(metadata: dict[str, str] | None) -> Change:
    """Replaces the metadata in the header of the weights file; ``None`` removes them."""
    return lambda folder: save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata)


def _rename_weights(file: str) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / file)

    return change


def _add_prefix(prefix: str) -> Change:
    """Adds a prefix to the names of all weights."""

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return edit_weights(rename)


def _edit_header(name: str, values: Any) -> Change:
    """Changes one entry in the header of the weights file.

    A dict replaces values of the entry. A list replaces the entry. ``None`` repeats the entry.
    """

    def change(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        # The file starts with the header's length, in 8 bytes. Then comes the header, in JSON.
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        header[name] = values if isinstance(values, list) else header[name] | (values or {})
        # Appended as text, because a dict cannot hold a key twice.
        repeated = f', "{name}": {json.dumps(header[name])}' if values is None else ""
        text = (json.dumps(header)[:-1] + repeated + "}").encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return change


def _remove_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def _fuse_experts(tensors: dict[str, Tensor]) -> None:
    """Stacks the 6 experts of each layer into two weights, as transformers 5 does in memory."""
    for name in [name for name in tensors if "experts.0.gate_proj" in name]:
        experts = name.partition("0.gate_proj")[0]
        gate, up, down = (
            torch.stack([tensors.pop(f"{experts}{n}.{part}_proj.weight") for n in range(6)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{experts}gate_up_proj": torch.cat([gate, up], 1), f"{experts}down_proj": down}


def _remove_last_channels(tensors: dict[str, Tensor]) -> None:
    """Removes the last of the 16 channels of every head."""
    for name in list(tensors):
        if "self_attn" in name:
            axis = 1 if "o_proj" in name else 0  # the axis of the heads' channels
            channels = [c for c in range(tensors[name].shape[axis]) if c % 16 < 15]
            tensors[name] = tensors[name].index_select(axis, Tensor(channels).long()).contiguous()
