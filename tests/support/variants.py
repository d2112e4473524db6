"""Lists variants of Hugging Face folders. Each is converted exactly, or refused with a message."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch

from nemo_convert.config_keys import HARMLESS_KEYS, NEUTRAL_VALUES
from nemo_convert.families import LLAMA3_ROPE
from tests.support.folder_changes import (
    ABSENT,
    EMBEDDING,
    HEAD,
    INDEX,
    WEIGHTS,
    Variant,
    add_tokens,
    add_weight,
    add_weights_file,
    all_of,
    cast_weights,
    change_nothing,
    drop_weight,
    edit_config,
    edit_json,
    edit_weights,
    link_weights,
    remove_files,
    set_last_embedding,
    split_weights,
    truncate_weights,
    untie,
    use_sentencepiece,
    use_vocabulary_and_merges,
    write_file,
)
from tests.support.variants_of_other_programs import variants_of_other_programs
from tests.support.variants_of_rope import variants_of_rope

QUERY = "model.layers.0.self_attn.q_proj.weight"
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
    for key, values in NEUTRAL_VALUES.items():
        for value in values:
            yield Variant(f"neutral {key} {value}", edit_config(**{key: value}))
    # Valid values of the keys that transformers checks. Other keys may have any value.
    valid = {"tokenizer_class": None, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 2}
    valid |= {"_attn_implementation": "flash_attention_2", "_attn_implementation_autoset": True}
    valid |= {"initializer_range": 0.02, "use_cache": True}
    valid |= {"dtype": "float32", "torch_dtype": "float32", "transformers_version": "4.31.0"}
    for key in HARMLESS_KEYS:
        yield Variant(f"harmless {key}", edit_config(**{key: valid.get(key, 1)}))


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
    for file in ("consolidated.safetensors", "zzz.safetensors", "a.safetensors"):
        yield Variant(f"weights in {file}", add_weights_file(file))
    for folder in ("onnx", "checkpoint-10"):
        yield Variant(f"weights in {folder}", add_weights_file(f"{folder}/{WEIGHTS}"))
    for file, text in (
        (f"._{WEIGHTS}", b"\0\5\26\7"),  # file attributes that macOS stores
        ("params.json", "{}"),
        ("tekken.json", "{}"),
        ("pytorch_model.bin", "weights"),
        ("training_args.bin", "settings"),
        ("LICENSE/apache.txt", "text"),
        ("tokenizer_files/a.txt", "text"),
        ("additional_chat_templates/rag.jinja", "{{ messages }}"),
        ("chat_template.jinja", "{{ messages }}"),
        ("README.md", ""),
        ("README.md", "---\nlicense: mit\n---\n"),
        ("README.md", "no header"),
        (INDEX, json.dumps({"weight_map": {"a": "of-another-model.safetensors"}})),
        ("hf_quant_config.json", "{}"),
    ):
        yield Variant(f"{file} {text[:9]!r}", write_file(file, text))
    for file in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
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
        yield Variant(f"generation {values}", edit_json("generation_config.json", **values))
    yield Variant("empty generation config", write_file("generation_config.json", "{}"))
    tokenizer = "tokenizer_config.json"
    yield Variant("no template", edit_json(tokenizer, chat_template=None))
    yield Variant(
        "templates by name",
        edit_json(
            tokenizer,
            chat_template=[
                {"name": "default", "template": "{{ messages }}"},
                {"name": "rag", "template": "x"},
            ],
        ),
    )
    yield Variant(
        "special tokens of transformers 5", edit_json(tokenizer, extra_special_tokens=["<eos>"])
    )
    backend = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}
    yield Variant("class of transformers 5", edit_json(tokenizer, **backend))
    yield Variant("sentencepiece", use_sentencepiece)
    yield Variant(
        "sentencepiece without settings",
        all_of(use_sentencepiece, edit_json(tokenizer, add_bos_token=ABSENT)),
    )
    yield Variant("vocab.json and merges.txt", use_vocabulary_and_merges)
    yield Variant(
        "two shards", split_weights(("model-1-of-2.safetensors", "model-2-of-2.safetensors"))
    )
    yield Variant("shards with odd names", split_weights(("b.safetensors", "a.safetensors")))
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"  # the converter must ignore it
    float32_buffer = all_of(cast_weights(torch.bfloat16), add_weight(buffer, 8))
    yield Variant("old rotary buffer of another type", float32_buffer)
    yield Variant("old rotary buffer", add_weight(buffer, 8))
    yield Variant("linked weights", link_weights)


def _unsupported_configs() -> Iterator[Variant]:
    for name in ("GemmaForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel"):
        refusal = f"architecture {name} is not supported"
        yield Variant(name, edit_config(architectures=[name]), refusal)
    yield Variant("wrong model_type", edit_config(model_type="qwen2"), "contradicts architectures")
    for key in (
        "residual_multiplier",
        "attention_multiplier",
        "embedding_multiplier",
        "logit_scale",
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "query_pre_attn_scalar",
        "no_rope_layers",
        "rope_local_base_freq",
        "use_qk_norm",
        "num_nextn_predict_layers",
        "attn_temperature_tuning",
        "block_auto_adjust_ff_dim",
    ):
        yield Variant(f"unknown {key}", edit_config(**{key: 2}), f"{key}=2 is not supported")
    for values in (
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"partial_rotary_factor": 0.5},
        {"rope_interleaved": True},
        {"quantization_config": {"quant_method": "fp8"}},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}},
    ):
        [key] = values  # the only key
        yield Variant(f"{values}", edit_config(**values), f"{key}=.* is not supported")
    yield Variant(
        "yarn of transformers 5",
        edit_config(
            rope_theta=ABSENT,
            rope_parameters={"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0},
        ),
        "rope_scaling=.* is not supported",
    )
    two_thetas = edit_config(rope_parameters={"rope_theta": 1e6})
    yield Variant("two thetas", two_thetas, "contradicts rope_parameters")
    nested = {"full_attention": {"rope_theta": 1e4, "rope_type": "default"}}
    yield Variant("rope of layer types", edit_config(rope_parameters=nested), "is not supported")
    no_theta = edit_config(rope_theta=ABSENT, rope_parameters={"rope_type": "default"})
    yield Variant("no theta", no_theta, "not supported")
    yield Variant("window", edit_config(sliding_window=16), "sliding_window=16", base="mistral")
    for values in ({"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}):
        [key] = values  # the only key
        yield Variant(f"{values}", edit_config(**values), f"{key}=.* is not supported", "qwen3_moe")


def _invalid_configs() -> Iterator[Variant]:
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
        yield Variant(f"no {key}", edit_config(**{key: ABSENT}), f"no '{key}'")
        for value in (None, 0, -1, "64", 1.5, True, [64]):
            yield Variant(f"{key} {value!r}", edit_config(**{key: value}), f"invalid {key}=")
    for key in ("rope_theta", "rms_norm_eps"):
        for value in (0, -1.0, float("nan"), float("inf"), "1e4"):
            yield Variant(f"{key} {value!r}", edit_config(**{key: value}), f"invalid {key}=")
    text_window = edit_config(sliding_window="16")
    yield Variant("window as text", text_window, "invalid sliding_window=", base="mistral")
    for key, value, refusal in (
        ("num_attention_heads", 5, "num_key_value_heads=2"),
        ("max_position_embeddings", None, "must be a positive integer"),
    ):
        yield Variant(f"{key} {value}", edit_config(**{key: value}), refusal)
    experts = edit_config(num_experts_per_tok=9)
    yield Variant("too few experts", experts, "is more than num_experts=6", base="qwen3_moe")
    yield Variant("no head size", edit_config(head_dim=None), "head_dim is null", base="qwen3")
    no_factor = {key: value for key, value in LLAMA3.items() if key != "factor"}
    for scaling in (
        no_factor,
        {**LLAMA3, "factor": None},
        {**LLAMA3, "factor": 0},
        {**LLAMA3, "factor": "8"},
    ):
        yield Variant(
            f"{scaling}", edit_config(rope_scaling=scaling), "invalid rope_scaling.factor"
        )
    yield Variant("rope_scaling is a list", edit_config(rope_scaling=[]), "rope_scaling")
    for name, text, refusal in (
        ("empty", "", "is not valid JSON"),
        ("a list", "[]", "not contain a JSON object"),
        ("UTF-16", "{}".encode("utf-16"), "is not valid JSON"),
    ):
        yield Variant(f"config is {name}", write_file("config.json", text), refusal)
    yield Variant("no config", remove_files("config.json"), "has no config.json")


def _refused_weights() -> Iterator[Variant]:
    yield Variant("no weights", remove_files(WEIGHTS), "has neither model.safetensors nor")
    shards = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
    yield Variant(
        "no shard",
        all_of(split_weights(shards), remove_files(shards[1])),
        f"does not have {shards[1]}, which",
    )
    yield Variant("no index", all_of(split_weights(shards), remove_files(INDEX)), "has neither")
    damaged_index = all_of(split_weights(shards), write_file(INDEX, "{"))
    yield Variant("damaged index", damaged_index, "is not valid JSON")
    yield Variant(
        "empty index",
        all_of(split_weights(shards), write_file(INDEX, '{"metadata": {}}')),
        "has no weight_map",
    )
    no_metadata = all_of(split_weights(shards), edit_json(INDEX, metadata=ABSENT))
    yield Variant("index without metadata", no_metadata, "has no metadata")
    extra = split_weights(shards, {"model.extra": shards[0]})  # shards[0] has no such tensor
    yield Variant("index with another tensor", extra, "the shards disagree about model.extra")
    wrong_shards = split_weights(shards, {QUERY: shards[0], EMBEDDING: shards[1]})
    yield Variant("index with wrong shards", wrong_shards, "the shards disagree about")
    for name, text, refusal in (
        ("an LFS pointer", "version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("empty", "", "is empty"),
        ("no safetensors file", "x" * 100, "is damaged"),
    ):
        yield Variant(f"weights are {name}", write_file(WEIGHTS, text), refusal)
    yield Variant("weights are cut short", truncate_weights, "is damaged: it has")
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
        yield Variant(
            f"extra {name}", add_weight(name, *shape), f"has {name}, which LlamaForCausalLM"
        )
    for name, shape in ((QUERY, (32, 64)), (EMBEDDING, (300, 64)), ("model.norm.weight", (32,))):
        yield Variant(
            f"shape of {name}", add_weight(name, *shape), f"{name} has shape .* according to"
        )
    for key, value in (("vocab_size", 300), ("intermediate_size", 96), ("head_dim", 8)):
        yield Variant(f"other {key}", edit_config(**{key: value}), "according to config.json")
    yield Variant("fewer layers", edit_config(num_hidden_layers=1), "model.layers.1")
    yield Variant("more layers", edit_config(num_hidden_layers=3), "has no model.layers.2")
    tied = edit_config(tie_word_embeddings=True)
    yield Variant("tied with another head", tied, "differs from model.embed_tokens")
    yield Variant("one row untied", all_of(tied, edit_weights(untie)), "differs from model.embed")
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.float64):
        yield Variant(f"weights in {dtype}", cast_weights(dtype, "q_proj"), "has weights of type")
    for value in (float("nan"), float("inf")):
        yield Variant(f"{value}", set_last_embedding(value), "NaN or infinite", reads_weights=True)


def _refused_settings() -> Iterator[Variant]:
    yield Variant("adapter", write_file("adapter_config.json", "{}"), "has adapter_config.json")
    generation = "generation_config.json"
    yield Variant("no JSON in generation", write_file(generation, "{,"), "is not valid JSON")
    yield Variant("list in generation", write_file(generation, "[]"), "not contain a JSON object")
    for value in (999, -5, "</s>", [0, 999]):
        change = edit_json(generation, eos_token_id=value)
        yield Variant(f"eos {value!r}", change, "must be from 0 to")
    tokenizer = "tokenizer_config.json"
    no_tokenizer = remove_files("tokenizer.json", tokenizer, "special_tokens_map.json")
    yield Variant("no tokenizer", no_tokenizer, "has no tokenizer")
    yield Variant(
        "tekken alone", all_of(no_tokenizer, write_file("tekken.json", "{}")), "has no tokenizer"
    )
    custom = edit_json(
        tokenizer, tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]}
    )
    yield Variant("code of the tokenizer", custom, "names the class Own")
    yield Variant(
        "unknown class", edit_json(tokenizer, tokenizer_class="BertTokenizer"), "names the"
    )
    yield Variant("damaged tokenizer", write_file("tokenizer.json", "{}"), "is not a tokenizer")
    damaged = all_of(use_sentencepiece, write_file("tokenizer.model", "x"))
    yield Variant("damaged sentencepiece", damaged, "is not a sentencepiece model")
    yield Variant("a token without embedding", add_tokens, "'<new6>' with id 294")
    small_vocabulary = all_of(  # 100 embeddings for the tokenizer's 288 tokens
        edit_config(vocab_size=100),
        edit_weights(
            lambda tensors: tensors.update(
                {name: tensors[name][:100].clone() for name in (EMBEDDING, HEAD)}
            )
        ),
    )
    yield Variant("small vocabulary", small_vocabulary, "tokens without an embedding")
