"""Lists variants whose settings have unusual values. transformers 4 or 5 refuses most of them."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.folder_changes import (
    ABSENT,
    GENERATION,
    TOKENIZER,
    all_of,
    edit_config,
    edit_json,
    remove_files,
)
from tests.support.variant import Variant, variants_of_values


def variants_of_settings() -> Iterator[Variant]:
    """Yields all variants. Those without a ``refusal`` must be converted exactly."""
    yield from _generation()
    yield from _tokenizers()
    yield from _added_tokens()


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
    for texts, beams in ((4, 2), (4, "4")):  # more texts than beams, or not a number
        change = edit_json(GENERATION, num_return_sequences=texts, num_beams=beams)
        yield Variant(f"{texts} texts of {beams!r} beams", change, f"num_return_sequences={texts}")
    refused_by_transformers = {
        "num_return_sequences": ("2", None, 0),
        "max_new_tokens": (0,),
        "early_stopping": ("x", None),
        "cache_implementation": ("x",),
        "compile_config": ({},),
        "watermarking_config": (5, {"a": 1}, {"seeding_scheme": "x"}, {"context_width": 0}),
        "pad_token_id": ("<pad>",),
    }
    yield from variants_of_values(GENERATION, "has {key}=.*refuses", refused_by_transformers)
    greedy = edit_json(GENERATION, num_return_sequences=2, do_sample=False)
    yield Variant("several greedy texts", greedy, "num_return_sequences=2 with num_beams=1")
    refused = {
        "bad_words_ids": ([1],),
        "cache_implementation": ("quantized",),
        "constraints": ([],),
        "dola_layers": ("low",),
        "guidance_scale": ("x",),
        "min_length": ("x",),
        "no_repeat_ngram_size": ("x",),
        "num_beam_groups": (2,),
        "num_beams": (0, None),
        "penalty_alpha": (0.6,),
        "repetition_penalty": (-1,),
        "streamer": (None,),
        "suppress_tokens": ("x",),
        "top_k": ("x", 10**30),
        # ``do_sample`` is true, so 0 is not possible. transformers requires a float.
        "temperature": ("0.5", float("nan"), 0, 2),
        "top_p": ([0.5],),
        "min_p": (-0.1,),
        "typical_p": (0.0,),
        "length_penalty": ("x",),
        "do_sample": ("false",),
        "max_length": (-1,),
        "pad_token_id": (294,),
        "transformers_version": (None,),
    }
    yield from variants_of_values(GENERATION, "generation_config.json has {key}", refused)


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
    invalid = {
        "split_special_tokens": ("x", None),
        "additional_special_tokens": ([{"content": "<x>"}], "<a>", {"a": "<a>"}),
        "self": (None,),  # settings become arguments of the tokenizer class's constructor
        "init_inputs": (5,),
        "extra_special_tokens": (None, 5),
        "auto_map": (None,),
        "bos_token": (5, {"content": "<s>"}),
        "eos_token": ({**token, "lstrip": "x"},),
        "model_input_names": (None, "input_ids", [1]),
        "model_max_length": ("x",),
        "padding_side": ("middle",),
        "truncation_side": (None,),
        "tokenizer_file": ("/absent.json", None),
        "from_slow": (True,),
        "add_prefix_space": ("x", 1),
    }
    yield from variants_of_values(TOKENIZER, "invalid {key}=", invalid)
    decoders = (
        [],
        {"0": {"content": "<unk>", "special": "x"}},
        {"x": {"content": "<a>"}},
        {"5": "<a>"},
    )
    yield from variants_of_values(TOKENIZER, "invalid {key}", {"added_tokens_decoder": decoders})
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
