"""Lists variants whose settings have unusual values. transformers 4 or 5 refuses most of them."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.folder_changes import (
    ABSENT,
    Variant,
    all_of,
    edit_config,
    edit_json,
    remove_files,
)

GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"


def variants_of_settings() -> Iterator[Variant]:
    """Yields all variants. Those without a ``refusal`` must be converted exactly."""
    yield from _configs()
    yield from _generation()
    yield from _tokenizers()
    yield from _added_tokens()


def _configs() -> Iterator[Variant]:
    switches = {"attention_bias": 0, "tie_word_embeddings": 0, "use_cache": 1}
    integers = edit_config(**switches, initializer_range=1, rms_norm_eps=1)
    yield Variant("switches and floats as 0 and 1", integers)
    null = edit_config(attention_dropout=None, use_cache=None, bos_token_id=None)
    yield Variant("null values", null)
    yield Variant("two end-of-text tokens", edit_config(eos_token_id=[0, 1]))
    for key, value in (
        ("bos_token_id", "<s>"),
        ("bos_token_id", [1]),
        ("bos_token_id", 10**30),  # PyTorch's integers have 64 bits
        ("rope_theta", 10**30),
        ("rms_norm_eps", 10**30),
        ("max_position_embeddings", 10**30),
        ("attention_dropout", float("inf")),
        ("transformers_version", "anything"),
        ("transformers_version", 5),
        ("transformers_version", "9" * 5000),  # more digits than Python converts
        ("eos_token_id", {"a": 1}),
        ("eos_token_id", ["</s>"]),
        ("use_cache", "x"),
        ("attention_dropout", "x"),
    ):
        name = f"{key} as {value!r}"[:60]
        yield Variant(name, edit_config(**{key: value}), f"invalid {key}=")
    for version in (None, "", "4.58.0.dev0"):
        yield Variant(f"version {version!r}", edit_config(transformers_version=version))
    # The names of all weights of so many layers might not fit in memory.
    too_many_experts = edit_config(num_experts=10**30)
    refusal = "num_experts=1000000000000000000000000000000"
    yield Variant("too many experts", too_many_experts, refusal, base="qwen3_moe")
    too_many_layers = edit_config(num_hidden_layers=2_000_000)
    yield Variant("too many layers", too_many_layers, "num_hidden_layers=2000000")


def _generation() -> Iterator[Variant]:
    for values in (
        {"num_beams": 4, "num_return_sequences": 4},
        {"watermarking_config": {"seeding_scheme": "selfhash", "bias": 2}},
    ):
        yield Variant(f"valid generation {values}", edit_json(GENERATION, **values))
    for settings in (
        {"num_return_sequences": 3, "temperature": 0.5},  # not possible without do_sample
        {"do_sample": True, "temperature": 0.5, "early_stopping": 1},
    ):
        yield Variant(f"generation in the config {settings}", edit_config(**settings))
    for settings in ({"num_return_sequences": 3}, {"top_k": -1, "do_sample": True}):
        change = all_of(remove_files(GENERATION), edit_config(**settings))
        refusal = f"config.json has {next(iter(settings))}"
        yield Variant(f"only in the config {settings}", change, refusal)
    for watermark in ({"a": 1}, {"seeding_scheme": "x"}, {"context_width": 0}):
        change = edit_json(GENERATION, watermarking_config=watermark)
        yield Variant(f"watermark {watermark}", change, "has watermarking_config=.*refuses")
    for texts, beams in ((4, 2), (4, "4")):  # more texts than beams, or not a number
        change = edit_json(GENERATION, num_return_sequences=texts, num_beams=beams)
        yield Variant(f"{texts} texts of {beams!r} beams", change, f"num_return_sequences={texts}")
    for value in ("2", None, 0):
        change = edit_json(GENERATION, num_return_sequences=value)
        yield Variant(f"{value!r} texts", change, "has num_return_sequences=.*refuses")
    for key, value in (
        ("bad_words_ids", [1]),
        ("cache_implementation", "quantized"),
        ("constraints", []),
        ("dola_layers", "low"),
        ("guidance_scale", "x"),
        ("min_length", "x"),
        ("no_repeat_ngram_size", "x"),
        ("num_beam_groups", 2),
        ("num_beams", 0),
        ("num_beams", None),
        ("penalty_alpha", 0.6),
        ("repetition_penalty", -1),
        ("streamer", None),
        ("suppress_tokens", "x"),
        ("top_k", "x"),
        ("top_k", 10**30),
        ("temperature", "0.5"),
        ("temperature", float("nan")),
        ("temperature", 0),  # do_sample is true
        ("temperature", 2),  # transformers requires a float
        ("top_p", [0.5]),
        ("min_p", -0.1),
        ("typical_p", 0.0),
        ("length_penalty", "x"),
        ("do_sample", "false"),
        ("max_length", -1),
        ("pad_token_id", 294),
        ("transformers_version", None),
    ):
        change = edit_json(GENERATION, **{key: value})
        yield Variant(
            f"generation with {key}={value!r}", change, f"generation_config.json has {key}"
        )


def _tokenizers() -> Iterator[Variant]:
    token = {"__type": "AddedToken", "content": "<x>"}
    valid = edit_json(TOKENIZER, additional_special_tokens=[token], split_special_tokens=True)
    yield Variant("list of token objects", valid)
    no_decoder = edit_json(TOKENIZER, added_tokens_decoder=ABSENT)
    # transformers 4 reads the list in the map only without added_tokens_decoder.
    token_map = edit_json("special_tokens_map.json", additional_special_tokens=[{"content": "<x>"}])
    yield Variant("list of token objects in the map", all_of(no_decoder, token_map))
    # The embedding has rows for 6 new tokens. The map overrides 4 of these 8.
    single = {key: f"<{key}>" for key in ("pad_token", "cls_token", "sep_token", "mask_token")}
    listed = [f"<listed {n}>" for n in range(4)]
    new_tokens = edit_json(TOKENIZER, additional_special_tokens=listed, **single)
    old_tokens = edit_json("special_tokens_map.json", **dict.fromkeys(single, "</s>"))
    changes = all_of(no_decoder, new_tokens, old_tokens)
    yield Variant("tokens that the map overrides", changes)
    for key, value in (
        ("split_special_tokens", "x"),
        ("split_special_tokens", None),
        ("additional_special_tokens", [{"content": "<x>"}]),
        ("self", None),  # settings become arguments of the tokenizer class's constructor
        ("init_inputs", 5),
        ("extra_special_tokens", None),
        ("auto_map", None),
        ("eos_token", {**token, "lstrip": "x"}),
        ("added_tokens_decoder", {"0": {"content": "<unk>", "special": "x"}}),
        ("model_input_names", None),
        ("model_input_names", "input_ids"),
        ("model_input_names", [1]),
    ):
        change = edit_json(TOKENIZER, **{key: value})
        yield Variant(f"{key} is {value!r}", change, f"invalid {key}")
    no_bos = edit_json(TOKENIZER, tokenizer_class="LlamaTokenizerFast", bos_token=None)
    yield Variant("no BOS for a class that adds it", no_bos, "invalid bos_token=None")


def _added_tokens() -> Iterator[Variant]:
    """Yields tokenizers with added tokens whose ids are already in use.

    transformers gives these tokens new ids, from 288 on. The embedding has 294 rows, so only 6
    tokens can be added.
    """
    listed = [f"<listed {n}>" for n in range(6)]
    mask = edit_json(TOKENIZER, mask_token="<mask>", additional_special_tokens=listed)
    yield Variant("a mask token without an embedding", mask, "has 1 tokens without an embedding")
    for number, refusal in ((6, ""), (7, "has 1 tokens without an embedding")):
        ids = {f"<new{n}>": 3 + n for n in range(number)}  # all ids below 288 are in use
        decoder = {str(i): {"content": token} for token, i in ids.items()}
        change = edit_json(TOKENIZER, added_tokens_decoder=decoder)
        yield Variant(f"{number} tokens with ids in use", change, refusal)
        change = all_of(
            edit_json(TOKENIZER, added_tokens_decoder=ABSENT), edit_json("added_tokens.json", **ids)
        )
        yield Variant(f"{number} added tokens with ids in use", change, refusal)
