"""Tests how documents and conversations are tokenized, masked and packed."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from recipes.core.errors import RecipeError
from recipes.data import chat
from recipes.data.chat import ChatTokenizer, pack
from recipes.data.corpus import messages_of
from recipes.data.tokenizer import DocumentTokenizer, Encoded, load_tokenizer

SPECIAL_TOKENS = ["<end>", "<start>", "<stop>"]
END, START, STOP = range(3)
# Chat templates. TURN and ASK are parts of the other templates; ASK starts the assistant's answer.
TURN = "<start>{{ m.role }}\n{{ m.content }}<stop>\n"
ASK = "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
WITH_GENERATION_TAGS = (
    "{% for m in messages %}<start>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<stop>{% endgeneration %}{% else %}{{ m.content }}<stop>"
    "{% endif %}{{ '\n' }}{% endfor %}" + ASK
)
THINK_IN_LAST_TURN = (  # only the last turn keeps its reasoning, as in Qwen3's template
    "{% for m in messages %}<start>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>{% endif %}{{ m.content }}<stop>\n{% endfor %}" + ASK
)
ALWAYS_FAILS = "{{ raise_exception('roles must alternate') }}"
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
ANSWER = {"role": "assistant", "content": "So."}
SEQ_LENGTH = 200
"""Tokens per sequence. Conversations of these tests fit, unless a test makes them long."""


def make_tokenizer(folder: Path, template: str | None) -> ChatTokenizer:
    """Saves a tokenizer of three special tokens and 256 bytes, with a chat template."""
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *byte_tokens])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))  # without merges: each byte is a token
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    # The config names only <stop>. As in SmolLM2's files, only the list of added tokens says that
    # the other two are special.
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<stop>")
    hf_tokenizer.chat_template = template
    hf_tokenizer.save_pretrained(folder)
    return ChatTokenizer(folder, END, SEQ_LENGTH)


def encode(tokenizer: ChatTokenizer, messages: list[dict[str, str]]) -> Encoded:
    [conversation] = tokenizer.encode([json.dumps(messages)])
    return conversation


def texts_in_loss(tokenizer: ChatTokenizer, conversation: Encoded) -> list[str]:
    """Returns the text of each contiguous run of tokens that are targets of the loss."""
    assert conversation.loss_mask is not None
    # The mask changes where a run starts and where it stops, so starts and stops alternate.
    changes = np.flatnonzero(np.diff(np.concatenate([[0], conversation.loss_mask, [0]])))
    runs = zip(changes[::2], changes[1::2], strict=True)
    return [tokenizer._tokenizer.decode(conversation.ids[start:stop]) for start, stop in runs]


@pytest.mark.parametrize("template", [PLAIN, WITH_GENERATION_TAGS])
def test_only_the_answers_of_the_assistant_are_in_the_loss(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(tmp_path, template)
    second_turn = [
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Thus, since ü."},  # ü takes two tokens
    ]
    # A tokenizer with merges would merge the spaces around an answer with the template's text.
    spaced_answer = {**ANSWER, "content": "\n  So.\n"}
    conversation = encode(tokenizer, [*QUESTION, spaced_answer, *second_turn])
    expected = (
        "<start>system\nBe brief.<stop>\n<start>user\nWhy?<stop>\n<start>assistant\nSo.<stop>\n"
        "<start>user\nAnd?<stop>\n<start>assistant\nThus, since ü.<stop>\n<end>"
    )
    assert tokenizer._tokenizer.decode(conversation.ids) == expected
    assert texts_in_loss(tokenizer, conversation) == ["So.<stop>", "Thus, since ü.<stop>"]
    assert (conversation.shortened, conversation.left_out_reason) == (False, "")
    # A worker process gets a pickled copy of the tokenizer. A conversation without the second turn
    # has the same first tokens, followed by END.
    copy = pickle.loads(pickle.dumps(tokenizer))
    without_second_turn = encode(copy, [*QUESTION, ANSWER]).ids.tolist()
    length = len(without_second_turn) - 1
    assert without_second_turn == [*conversation.ids[:length].tolist(), END]


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (PLAIN, QUESTION, chat.NO_ANSWER),
        (PLAIN, [*QUESTION, {**ANSWER, "content": " \n"}], chat.NO_ANSWER),
        (PLAIN, [{"role": "user", "content": "-"}, ANSWER], chat.NO_QUESTION),
        (ALWAYS_FAILS, [*QUESTION, ANSWER], chat.TEMPLATE_ERROR),
        (PLAIN, [ANSWER], chat.ANSWERS_NOT_FOUND),
        (PLAIN, [*QUESTION, {**ANSWER, "content": "a <stop> b"}], chat.SPECIAL_TOKEN),
        (PLAIN, [*QUESTION, {**ANSWER, "reasoning_content": "<start>"}], chat.SPECIAL_TOKEN),
        (PLAIN, [*QUESTION, {**ANSWER, "content": "x" * SEQ_LENGTH}], chat.TOO_LONG),
    ],
)
def test_unusable_conversations_are_left_out(
    tmp_path: Path, template: str, messages: list[dict[str, str]], reason: str
) -> None:
    conversation = encode(make_tokenizer(tmp_path, template), messages)
    assert (conversation.left_out_reason, len(conversation.ids)) == (reason, 0)


@pytest.mark.parametrize("template", [PLAIN, WITH_GENERATION_TAGS])
def test_blank_answers_are_not_in_the_loss(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(tmp_path, template)
    blank = {"role": "assistant", "content": " "}
    conversation = encode(tokenizer, [*QUESTION, blank, *QUESTION, ANSWER])
    assert texts_in_loss(tokenizer, conversation) == ["So.<stop>"]
    reasoning = [*QUESTION, {**blank, "reasoning_content": "Because."}]
    assert texts_in_loss(tokenizer, encode(tokenizer, reasoning)) == ["<stop>"]


def test_templates_that_write_the_date_give_the_same_tokens_every_day(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, "{{ strftime_now('%d %b %Y') }}" + PLAIN)
    conversation = encode(tokenizer, [*QUESTION, ANSWER])
    text = tokenizer._tokenizer.decode(conversation.ids)
    assert text.startswith("26 Jul 2024<start>system")


def test_answers_that_the_template_renders_without_their_reasoning_are_not_in_the_loss(
    tmp_path: Path,
) -> None:
    tokenizer = make_tokenizer(tmp_path, THINK_IN_LAST_TURN)
    # In the longer conversation, the template renders the first answer without "<think>".
    for messages in ([*QUESTION, ANSWER], [*QUESTION, ANSWER, *QUESTION, ANSWER]):
        assert texts_in_loss(tokenizer, encode(tokenizer, messages)) == ["<think>So.<stop>"]


def test_a_long_conversation_is_shortened_to_its_last_whole_answer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, PLAIN)
    turns = [*QUESTION, ANSWER, {"role": "user", "content": "And?"}, ANSWER]
    unshortened = encode(tokenizer, turns)
    # After the last answer, the unshortened conversation has a line break and END. With one token
    # less, only the line break does not fit. With even less, the last answer does not fit.
    only_line_break_does_not_fit = len(unshortened.ids) - 1
    for length in range(only_line_break_does_not_fit, 63, -1):
        conversation = encode(replace(tokenizer, seq_length=length), turns)
        answers = 2 if length == only_line_break_does_not_fit else 1
        assert texts_in_loss(tokenizer, conversation) == ["So.<stop>"] * answers, length
        assert conversation.shortened
        assert len(conversation.ids) <= length
        assert conversation.ids[-2:].tolist() == [STOP, END]
    # After the loop, ``conversation`` has only the first answer. This is the shortest length.
    shortest = len(conversation.ids)
    assert encode(replace(tokenizer, seq_length=shortest), turns).shortened
    too_long = encode(replace(tokenizer, seq_length=shortest - 1), turns)
    assert too_long.left_out_reason == chat.TOO_LONG


def test_each_conversation_lies_in_one_sequence() -> None:
    """Packs random conversations. Conversation i consists of the token 5 + i."""
    generator, length = np.random.default_rng(0), 32  # tokens per sequence
    for _ in range(30):
        sizes = generator.integers(2, length + 1, generator.integers(1, 40))
        conversations = [Encoded(np.full(n, 5 + i), np.arange(n) > 0) for i, n in enumerate(sizes)]
        written_tokens = int(generator.integers(0, 100))
        packed = list(pack(conversations, written_tokens, length, END))
        ids = np.concatenate([encoded.ids for encoded in packed])
        loss_mask = np.concatenate([encoded.loss_mask for encoded in packed])  # type: ignore[misc]
        positions = written_tokens + np.arange(len(ids))
        for i, n in enumerate(sizes):
            conversation_positions = positions[ids == 5 + i]
            first, last = conversation_positions[0], conversation_positions[-1]
            assert len(conversation_positions) == n
            assert first // length == last // length  # in the same sequence
            assert last - first == n - 1  # without a gap
        assert not loss_mask[ids == END].any()  # padding
        # Packing needs no more sequences than without a change of the order.
        last_sequence_tokens = written_tokens % length
        sequences = -(-(last_sequence_tokens + len(ids)) // length)  # rounded up
        assert sequences <= len(_pack_in_order(sizes, last_sequence_tokens, length))


def _pack_in_order(sizes: np.ndarray, first: int, length: int) -> list[int]:
    """Returns the number of tokens in each sequence if conversations are packed in their order.

    The first sequence already has ``first`` tokens. A sequence has at most ``length`` tokens.
    """
    sequences = [first]
    for size in sizes:
        if sequences[-1] + size > length:
            sequences.append(0)
        sequences[-1] += int(size)
    return sequences


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no chat template"):
        make_tokenizer(tmp_path, None).require_template()
    make_tokenizer(tmp_path, PLAIN).require_template()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "no list of messages"),
        ({"messages": []}, "no list of messages"),
        ({"messages": ["hello"]}, "message 1 has no text as its 'role'"),
        ({"messages": [*QUESTION, {"role": "x"}]}, "message 3 .* 'content'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "message 1 has no text as its 'cont"),
        ({"messages": [*QUESTION, {**ANSWER, "content": None, "tool_calls": [{}]}]}, "has tools"),
        ({"messages": [*QUESTION, {**ANSWER, "tool_calls": [{"name": "f"}]}]}, "has tools"),
        ({"messages": [*QUESTION, ANSWER], "tools": [{"name": "f"}]}, "has tools"),
        ({"messages": [*QUESTION, ANSWER], "tools": '[{"name": "f"}]'}, "has tools"),
    ],
)
def test_records_without_messages_or_with_tools_are_refused(record: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        messages_of(record)


@pytest.mark.parametrize("tools", ["[]", "", None, []])
def test_empty_lists_of_tools_are_ignored(tools: object) -> None:
    messages = [*QUESTION, {**ANSWER, "tool_calls": []}]
    assert messages_of({"messages": messages, "tools": tools}) == [*QUESTION, ANSWER]


def save_tokenizer(folder: Path, *special: str, adds_bos: bool = False, **names: str) -> Path:
    """Saves a tokenizer of the letters a, b and c (ids 0 to 2) and special tokens (ids from 3).

    With ``adds_bos``, it adds ``<s>`` before a text. The config has ``names``, such as
    ``eos_token``.
    """
    vocabulary = {token: i for i, token in enumerate([*"abc", *special])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def token_ids(tokenizer: DocumentTokenizer, texts: list[str]) -> list[list[int]]:
    return [document.ids.tolist() for document in tokenizer.encode(texts)]


@pytest.mark.parametrize(
    ("special", "eos", "end"),
    [
        (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>"),  # base models of SmolLM2, Qwen
        (["<|im_end|>", "<|endoftext|>"], "<|im_end|>", "<|endoftext|>"),  # instruct models
        (["<|im_end|>", "<|end_of_text|>"], "<|im_end|>", "<|end_of_text|>"),  # Llama 3 instruct
        (["<s>", "</s>"], "</s>", "</s>"),  # Mistral: also ends turns
    ],
)
def test_a_document_ends_with_the_end_of_text_token(
    tmp_path: Path, special: list[str], eos: str, end: str
) -> None:
    documents = load_tokenizer(save_tokenizer(tmp_path, *special, eos_token=eos))
    assert documents.begin is None
    assert documents.end == 3 + special.index(end)  # after the ids of a, b and c
    assert token_ids(documents, ["ab", "c"]) == [[0, 1, documents.end], [2, documents.end]]


def test_documents_begin_with_the_tokenizers_bos_token(tmp_path: Path) -> None:
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}  # ids 3 and 4
    folder = save_tokenizer(tmp_path / "with", "<s>", "</s>", adds_bos=True, **names)
    assert token_ids(load_tokenizer(folder), ["ab", "c"]) == [[3, 0, 1, 4], [3, 2, 4]]
    folder = save_tokenizer(tmp_path / "without", "<s>", "</s>", **names)
    assert token_ids(load_tokenizer(folder), ["ab"]) == [[0, 1, 4]]


def test_the_token_at_the_end_of_documents_can_be_chosen(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, "<|im_end|>", "<|endoftext|>", eos_token="<|im_end|>")
    assert token_ids(load_tokenizer(folder, "<|im_end|>"), ["a"]) == [[0, 3]]
    with pytest.raises(RecipeError, match="has no token </s>") as caught:
        load_tokenizer(folder, "</s>")
    assert "data.document_end" in str(caught.value)


def test_a_special_token_written_in_a_document_is_encoded_as_text(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, "<|endoftext|>", eos_token="<|endoftext|>")
    [ids] = token_ids(load_tokenizer(folder), ["a<|endoftext|>b"])
    assert ids.index(3) == len(ids) - 1  # the special token's id, 3, is only at the end


def test_a_tokenizer_without_any_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no token eos_token"):
        load_tokenizer(save_tokenizer(tmp_path, "<s>"))
