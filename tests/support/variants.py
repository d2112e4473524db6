"""Lists variants of Hugging Face folders. Each is converted exactly, or refused with a message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from nemo_convert.config_keys import HARMLESS_KEYS, NEUTRAL_VALUES
from nemo_convert.families import LLAMA3_ROPE
from tests.support.folder_changes import (
    ABSENT,
    EMBEDDING,
    GENERATION,
    HEAD,
    INDEX,
    QUERY,
    SHARDS,
    TOKENIZER,
    WEIGHTS,
    add_tokens,
    add_weight,
    add_weights_file,
    all_of,
    cast_weights,
    change_bytes,
    change_nothing,
    drop_weight,
    edit_config,
    edit_json,
    edit_weights,
    link_weights,
    remove_files,
    split_weights,
    untie,
    use_sentencepiece,
    use_vocabulary_and_merges,
    write_file,
)
from tests.support.variant import Variant, variants_of_values
from tests.support.variants_of_other_programs import variants_of_other_programs
from tests.support.variants_of_rope import variants_of_rope

LLAMA3 = {**LLAMA3_ROPE, "factor": 8.0}  # a valid value of rope_scaling


def variants() -> Iterator[Variant]:
    """Yields all variants. Those without a ``refusal`` must be converted exactly.

    The folders' models have 2 layers, 294 embeddings for 288 tokens, and 256 positions.
    """
    for family in ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe"):
        for base in (family, f"{family}-5"):  # saved by transformers 4, and by transformers 5
            yield Variant("as written", change_nothing, base=base)
    yield from _convertible_types_and_rope()
    yield from _convertible_keys()
    yield from _convertible_files()
    yield from _convertible_settings()
    yield from _unsupported_configs()
    yield from _invalid_configs()
    yield from _refused_indexes()
    yield from _refused_weights()
    yield from _refused_settings()
    yield from variants_of_other_programs()
    yield from variants_of_rope()


def _convertible_types_and_rope() -> Iterator[Variant]:
    theta = {"rope_theta": 5000.0}
    for value in (ABSENT, None, "auto", "torch.bfloat16", "float16", "float64", "float32"):
        yield Variant(f"torch_dtype {value}", edit_config(dtype=ABSENT, torch_dtype=value))
        yield Variant(f"dtype {value}", edit_config(dtype=value))
    for parameters in ({"rope_type": "default"}, {}, {"partial_rotary_factor": 1.0}, LLAMA3):
        rope = {"rope_parameters": {**theta, **parameters}, "rope_scaling": ABSENT}
        yield Variant(f"rope {parameters}", edit_config(**rope, rope_theta=ABSENT))
        yield Variant(f"rope and theta {parameters}", edit_config(**rope))
    for scaling in (
        ABSENT,
        None,
        {"rope_type": "default"},
        {"type": "default"},
        {"rope_type": "linear", "factor": 1.0},
        LLAMA3,
        {**LLAMA3, "factor": 32},
        {"type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_type"}},
        {"type": "llama3", **LLAMA3},
    ):
        yield Variant(f"rope_scaling {scaling}", edit_config(rope_scaling=scaling))


def _convertible_keys() -> Iterator[Variant]:
    for key, value in (
        ("head_dim", None),
        ("head_dim", ABSENT),
        ("layer_types", None),
        ("model_type", ABSENT),
        ("architectures", None),
        ("architectures", []),
        ("rms_norm_eps", ABSENT),
        ("rms_norm_eps", 1e-2),
        ("rope_theta", ABSENT),
        ("rope_theta", 1_000_000),
        ("attention_bias", ABSENT),
        ("hidden_act", "silu"),
        ("layer_types", ["full_attention"] * 2),
        ("tie_word_embeddings", ABSENT),
    ):
        yield Variant(f"{key} {value}", edit_config(**{key: value}))
    for window in (None, 256, 4096):
        yield Variant(
            f"sliding_window {window}", edit_config(sliding_window=window), base="mistral"
        )
    unused = edit_config(use_sliding_window=False, sliding_window=16)
    yield Variant("window that is not used", unused, base="qwen2")
    yield Variant("norm_topk_prob", edit_config(norm_topk_prob=False), base="qwen3_moe")
    yield Variant("use_qk_norm", edit_config(use_qk_norm=True), base="qwen3_moe")
    for position in (0, -1):  # a key has one or two neutral values
        neutral = {key: values[position] for key, values in NEUTRAL_VALUES.items()}
        yield Variant(f"neutral values at {position}", edit_config(**neutral))
    yield Variant("attention kernel", edit_config(_attn_implementation="flash_attention_2"))
    harmless: dict[str, Any] = dict.fromkeys(HARMLESS_KEYS.keys() - {"_attn_implementation"}, 1)
    # transformers checks these keys. Other keys may have any value.
    harmless |= {"tokenizer_class": None, "eos_token_id": 0, "use_cache": True}
    harmless |= {"dtype": "float32", "torch_dtype": "float32", "transformers_version": "4.31.0"}
    yield Variant("harmless keys", edit_config(**harmless))


def _convertible_files() -> Iterator[Variant]:
    for name, word, dtype in (  # ``word`` selects weights by their names
        ("all", "", torch.bfloat16),
        ("all", "", torch.float16),
        ("norms", "norm", torch.bfloat16),
        ("queries", "q_proj", torch.bfloat16),
        ("embedding", "embed", torch.float16),
    ):
        yield Variant(f"{name} in {dtype}", cast_weights(dtype, word))
    mixed = all_of(cast_weights(torch.bfloat16, "proj"), cast_weights(torch.float16, "norm"))
    yield Variant("three types", mixed)  # embeddings and head stay in float32
    tied = edit_config(tie_word_embeddings=True)
    yield Variant("tied without a head", all_of(tied, drop_weight(HEAD)))
    equal = edit_weights(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    yield Variant("tied with an equal head", all_of(tied, equal))
    names = ("a.safetensors", "consolidated.safetensors", "zzz.safetensors")
    folders = (f"onnx/{WEIGHTS}", f"checkpoint-10/{WEIGHTS}")
    yield Variant("other weights", all_of(*map(add_weights_file, (*names, *folders))))
    other_files = (
        (f"._{WEIGHTS}", b"\0\5\26\7"),  # file attributes that macOS stores
        ("adapter_model.safetensors", "x"),
        ("params.json", "{}"),
        ("tekken.json", "{}"),
        ("pytorch_model.bin", "weights"),
        ("pytorch_model.bin.index.json", "{}"),
        ("training_args.bin", "settings"),
        ("hf_quant_config.json", "{}"),
        ("LICENSE/apache.txt", "text"),
        ("tokenizer_files/a.txt", "text"),
        ("additional_chat_templates/rag.jinja", "{{ messages }}"),
        ("chat_template.jinja", "{{ messages }}"),
    )
    yield Variant("other files", all_of(*(write_file(*file) for file in other_files)))
    for file, text in (
        ("README.md", ""),
        ("README.md", "---\nlicense: mit\n---\n"),
        ("README.md", "no header"),
        (INDEX, json.dumps({"weight_map": {"a": "of-another-model.safetensors"}})),
    ):
        yield Variant(f"{file} {text[:9]!r}", write_file(file, text))
    for file in (GENERATION, TOKENIZER, "special_tokens_map.json"):
        yield Variant(f"no {file}", remove_files(file))


def _convertible_settings() -> Iterator[Variant]:
    for values in (
        {"do_sample": ABSENT, "temperature": 0.9, "top_p": 0.6},
        {"do_sample": False, "temperature": 0.9, "top_k": 3},
        {"do_sample": True, "temperature": 0.9},
        {"pad_token_id": -1},
        {"eos_token_id": [0, 1]},
        {"eos_token_id": None, "bos_token_id": None},
    ):
        yield Variant(f"generation {values}", edit_json(GENERATION, **values))
    yield Variant("empty generation config", write_file(GENERATION, "{}"))
    templates = [{"name": n, "template": "{{ messages }}"} for n in ("default", "rag")]
    backend = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}
    for name, settings in (
        ("no template", {"chat_template": None}),
        ("templates by name", {"chat_template": templates}),
        ("special tokens of transformers 5", {"extra_special_tokens": ["<eos>"]}),
        ("class of transformers 5", backend),
    ):
        yield Variant(name, edit_json(TOKENIZER, **settings))
    yield Variant("sentencepiece", use_sentencepiece)
    no_bos = all_of(use_sentencepiece, edit_json(TOKENIZER, add_bos_token=ABSENT))
    yield Variant("sentencepiece without settings", no_bos)
    yield Variant("vocab.json and merges.txt", use_vocabulary_and_merges)
    for shards in (("model-1-of-2.safetensors", "model-2-of-2.safetensors"), SHARDS[::-1]):
        yield Variant(f"shards {shards}", split_weights(shards))
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"  # the converter must ignore it
    float32_buffer = all_of(cast_weights(torch.bfloat16), add_weight(buffer, 8))
    yield Variant("old rotary buffer of another type", float32_buffer)
    yield Variant("old rotary buffer", add_weight(buffer, 8))
    yield Variant("linked weights", link_weights)


def _unsupported_configs() -> Iterator[Variant]:
    """Yields configs that ``tests/unit/nemo_convert/test_architecture.py`` does not have."""
    yield Variant("wrong model_type", edit_config(model_type="qwen2"), "contradicts architectures")
    yarn = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}
    new_yarn = edit_config(rope_theta=ABSENT, rope_parameters=yarn)
    yield Variant("yarn of transformers 5", new_yarn, "rope_scaling=.* is not supported")
    two_thetas = edit_config(rope_parameters={"rope_theta": 1e6})
    yield Variant("two thetas", two_thetas, "contradicts rope_parameters")
    nested = {"full_attention": {"rope_theta": 1e4, "rope_type": "default"}}
    yield Variant("rope of layer types", edit_config(rope_parameters=nested), "is not supported")


def _invalid_configs() -> Iterator[Variant]:
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    yield from variants_of_values("config.json", "no '{key}'", dict.fromkeys(sizes, (ABSENT,)))
    invalid = dict.fromkeys(sizes, (None, 0, -1, "64", 1.5, True, [64]))
    yield from variants_of_values("config.json", "invalid {key}=", invalid)
    text_window = edit_config(sliding_window="16")
    yield Variant("window as text", text_window, "invalid sliding_window=", base="mistral")
    yield Variant("5 heads", edit_config(num_attention_heads=5), "num_key_value_heads=2")
    no_context = edit_config(max_position_embeddings=None)
    yield Variant("no positions", no_context, "must be a positive integer")
    experts = edit_config(num_experts_per_tok=9)
    yield Variant("too few experts", experts, "is more than num_experts=6", base="qwen3_moe")
    yield Variant("no head size", edit_config(head_dim=None), "head_dim is null", base="qwen3")
    for factor in ({}, {"factor": None}, {"factor": 0}, {"factor": "8"}):
        change = edit_config(rope_scaling={**LLAMA3_ROPE, **factor})
        yield Variant(f"scaling with {factor}", change, "invalid rope_scaling.factor")
    yield Variant("rope_scaling is a list", edit_config(rope_scaling=[]), "rope_scaling")
    for name, text, refusal in (
        ("empty", "", "is not valid JSON"),
        ("a list", "[]", "not contain a JSON object"),
        ("UTF-16", "{}".encode("utf-16"), "is not valid JSON"),
        ("UTF-8 with a byte order mark", b"\xef\xbb\xbf{}", "is not valid JSON"),
    ):
        yield Variant(f"config is {name}", write_file("config.json", text), refusal)
    yield Variant("no config", remove_files("config.json"), "has no config.json")


def _refused_indexes() -> Iterator[Variant]:
    neither = f"has neither {WEIGHTS} nor {INDEX}"
    yield Variant("no weights", remove_files(WEIGHTS), neither)
    for name, change, refusal in (
        ("no shard", remove_files(SHARDS[1]), f"does not have {SHARDS[1]}, which"),
        ("no index", remove_files(INDEX), neither),
        ("damaged index", write_file(INDEX, "{"), "is not valid JSON"),
        ("empty index", write_file(INDEX, '{"metadata": {}}'), "has no weight_map"),
        ("index with an empty map", edit_json(INDEX, weight_map={}), "has only 0 weights"),
    ):
        yield Variant(name, all_of(split_weights(SHARDS), change), refusal)
    for value in (ABSENT, None, []):
        change = all_of(split_weights(SHARDS), edit_json(INDEX, metadata=value))
        yield Variant(f"index with metadata {value}", change, "has no metadata")
    extra = split_weights(SHARDS, {"model.extra": SHARDS[0]})  # in the index, but in no shard
    yield Variant("index with another tensor", extra, "the shards disagree about model.extra")
    wrong_shards = split_weights(SHARDS, {QUERY: SHARDS[0], EMBEDDING: SHARDS[1]})
    yield Variant("index with wrong shards", wrong_shards, "the shards disagree about")


def _refused_weights() -> Iterator[Variant]:
    for name, text, refusal in (
        ("an LFS pointer", "version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("empty", "", "is empty"),
        ("no safetensors file", "x" * 100, "is damaged"),
    ):
        yield Variant(f"weights are {name}", write_file(WEIGHTS, text), refusal)
    truncated = change_bytes(WEIGHTS, lambda data: data[:-7])  # as an interrupted download does
    yield Variant("weights are cut short", truncated, "is damaged: it has")
    for name in (QUERY, EMBEDDING, "model.norm.weight"):
        yield Variant(f"no {name}", drop_weight(name), f"has no {name}")
    yield Variant("no head", drop_weight(HEAD), "tie_word_embeddings is false")
    for name, shape in (  # weights that a Llama model with 2 layers and no biases does not have
        ("v_head.summary.weight", (1, 64)),
        ("model.layers.0.self_attn.k_proj.k_scale", (1,)),
        ("model.layers.0.self_attn.q_proj.bias", (64,)),
        ("model.layers.2.mlp.up_proj.weight", (128, 64)),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", (128, 64)),
        ("mtp.norm.weight", (64,)),
    ):
        change = add_weight(name, *shape)
        yield Variant(f"extra {name}", change, f"has {name}, which LlamaForCausalLM")
    for name, shape in ((QUERY, (32, 64)), (EMBEDDING, (300, 64)), ("model.norm.weight", (32,))):
        change = add_weight(name, *shape)
        yield Variant(f"shape of {name}", change, f"{name} has shape .* according to")
    for key, value in (("vocab_size", 300), ("intermediate_size", 96), ("head_dim", 8)):
        yield Variant(f"other {key}", edit_config(**{key: value}), "according to config.json")
    yield Variant("fewer layers", edit_config(num_hidden_layers=1), "model.layers.1")
    yield Variant("more layers", edit_config(num_hidden_layers=3), "has no model.layers.2")
    one_row = all_of(edit_config(tie_word_embeddings=True), edit_weights(untie))
    refusal = f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true"
    yield Variant("one row untied", one_row, refusal)
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.float64):
        yield Variant(f"weights in {dtype}", cast_weights(dtype, "q_proj"), "has weights of type")
    for value in (float("nan"), float("inf")):
        # No token of ``nemo_convert.parity.TEXT`` uses the last row.
        change = edit_weights(lambda tensors, value=value: tensors[EMBEDDING][-1].fill_(value))
        yield Variant(f"{value}", change, "NaN or infinite", reads_weights=True)


def _refused_settings() -> Iterator[Variant]:
    yield Variant("adapter", write_file("adapter_config.json", "{}"), "has adapter_config.json")
    yield Variant("no JSON in generation", write_file(GENERATION, "{,"), "is not valid JSON")
    yield Variant("list in generation", write_file(GENERATION, "[]"), "not contain a JSON object")
    ids = {"eos_token_id": (999, -5, "</s>", [0, 999], True, 1.0, {"a": 1})}
    yield from variants_of_values(GENERATION, "must be from 0 to", ids)
    no_tokenizer = remove_files("tokenizer.json", TOKENIZER, "special_tokens_map.json")
    tekken = all_of(no_tokenizer, write_file("tekken.json", "{}"))
    own_code = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    bert = edit_json(TOKENIZER, tokenizer_class="BertTokenizer")
    sentencepiece = all_of(use_sentencepiece, write_file("tokenizer.model", "x"))
    few_rows = edit_weights(
        lambda tensors: tensors.update(
            {name: tensors[name][:100].clone() for name in (EMBEDDING, HEAD)}
        )
    )
    few_embeddings = all_of(edit_config(vocab_size=100), few_rows)  # for 288 tokens
    for name, change, refusal in (
        ("no tokenizer", no_tokenizer, "has no tokenizer"),
        ("tekken alone", tekken, "has no tokenizer"),
        ("code of the tokenizer", edit_json(TOKENIZER, **own_code), "names the class Own"),
        ("unknown class", bert, "names the"),
        ("damaged tokenizer", write_file("tokenizer.json", "{}"), "is not a tokenizer"),
        ("damaged sentencepiece", sentencepiece, "is not a sentencepiece model"),
        ("a token without embedding", add_tokens, "'<new6>' with id 294"),
        ("few embeddings", few_embeddings, "has 188 tokens without an embedding"),
    ):
        yield Variant(name, change, refusal)
