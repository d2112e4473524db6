"""Tests tokens of documents and conversations: special tokens, loss masks, and packing."""

from __future__ import annotations

import json
import pickle
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
ALTERNATES = "{{ raise_exception('roles must alternate') }}"
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
ANSWER = {"role": "assistant", "content": "So."}
LONG = 200


def make_tokenizer(folder: Path, template: str | None, seq_length: int = LONG) -> ChatTokenizer:
    """Saves a tokenizer of bytes and three special tokens, with a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*SPECIAL_TOKENS, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    # As in SmolLM2's files, only the list of added tokens says that the others are special.
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<stop>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return ChatTokenizer(folder, END, seq_length)


def encode(tokenizer: ChatTokenizer, messages: list[dict[str, str]]) -> Encoded:
    [conversation] = tokenizer.encode([json.dumps(messages)])
    return conversation


def texts_in_loss(tokenizer: ChatTokenizer, conversation: Encoded) -> list[str]:
    """Returns the text of each contiguous run of tokens that are targets of the loss."""
    assert conversation.loss_mask is not None
    edges = np.flatnonzero(np.diff(np.concatenate([[0], conversation.loss_mask, [0]])))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer._tokenizer.decode(conversation.ids[start:stop]) for start, stop in runs]


@pytest.mark.parametrize("template", [PLAIN, WITH_GENERATION_TAGS])
def test_only_the_words_of_the_assistant_count_in_the_loss(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(tmp_path, template)
    second_turn = [
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Thus, since ü."},
    ]
    conversation = encode(tokenizer, [*QUESTION, ANSWER, *second_turn])
    expected = (
        "<start>system\nBe brief.<stop>\n<start>user\nWhy?<stop>\n<start>assistant\nSo.<stop>\n"
        "<start>user\nAnd?<stop>\n<start>assistant\nThus, since ü.<stop>\n<end>"
    )
    assert tokenizer._tokenizer.decode(conversation.ids) == expected
    assert texts_in_loss(tokenizer, conversation) == ["So.<stop>", "Thus, since ü.<stop>"]
    assert (conversation.shortened, conversation.left_out_reason) == (False, "")
    copy = pickle.loads(pickle.dumps(tokenizer))  # as when it is sent to another process
    first = encode(copy, [*QUESTION, ANSWER]).ids.tolist()
    assert first == [*conversation.ids.tolist()[: len(first) - 1], END]


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (PLAIN, QUESTION, chat.NO_ANSWER),
        (ALTERNATES, [*QUESTION, ANSWER], chat.TEMPLATE_ERROR),
        (PLAIN, [ANSWER], chat.ANSWERS_NOT_FOUND),
        *(
            (PLAIN, [*QUESTION, {"role": "assistant", "content": f"a {t} b"}], chat.SPECIAL_TOKEN)
            for t in SPECIAL_TOKENS
        ),
        (PLAIN, [*QUESTION, {"role": "assistant", "content": "x" * LONG}], chat.TOO_LONG),
    ],
)
def test_unusable_conversations_are_left_out(
    tmp_path: Path, template: str, messages: list[dict[str, str]], reason: str
) -> None:
    conversation = encode(make_tokenizer(tmp_path, template), messages)
    assert (conversation.left_out_reason, len(conversation.ids)) == (reason, 0)


def test_answers_that_the_template_renders_without_their_reasoning_are_not_in_the_loss(
    tmp_path: Path,
) -> None:
    tokenizer = make_tokenizer(tmp_path, THINK_IN_LAST_TURN)
    for messages in ([*QUESTION, ANSWER], [*QUESTION, ANSWER, *QUESTION, ANSWER]):
        assert texts_in_loss(tokenizer, encode(tokenizer, messages)) == ["<think>So.<stop>"]


def test_a_long_conversation_is_shortened_to_its_last_whole_answer(tmp_path: Path) -> None:
    turns = [*QUESTION, ANSWER, {"role": "user", "content": "And?"}, ANSWER]
    unshortened = encode(make_tokenizer(tmp_path, PLAIN), turns)
    # With the first length, only the last line break does not fit. With the other lengths, down to
    # 64, the last question and answer do not fit.
    for length in range(len(unshortened.ids) - 1, 63, -1):
        tokenizer = make_tokenizer(tmp_path, PLAIN, length)
        conversation = encode(tokenizer, turns)
        answers = 2 if length >= len(unshortened.ids) - 1 else 1
        assert texts_in_loss(tokenizer, conversation) == ["So.<stop>"] * answers, length
        assert conversation.shortened
        assert len(conversation.ids) <= length
        assert conversation.ids[-2:].tolist() == [STOP, END]
    one_answer = len(conversation.ids)  # length with the first answer alone
    assert encode(make_tokenizer(tmp_path, PLAIN, one_answer), turns).shortened
    assert (
        encode(make_tokenizer(tmp_path, PLAIN, one_answer - 1), turns).left_out_reason
        == chat.TOO_LONG
    )


def test_each_conversation_lies_in_one_sequence() -> None:
    generator, length = np.random.default_rng(0), 32
    for _ in range(30):
        sizes = generator.integers(2, length + 1, generator.integers(1, 40))
        conversations = [Encoded(np.full(n, 5 + i), np.arange(n) > 0) for i, n in enumerate(sizes)]
        position = int(generator.integers(0, 100))
        packed = list(pack(conversations, position, length, END))
        ids = np.concatenate([encoded.ids for encoded in packed])
        loss_mask = np.concatenate([encoded.loss_mask for encoded in packed])  # type: ignore[misc]
        positions = position + np.arange(len(ids))
        for i, n in enumerate(sizes):
            of_conversation = positions[ids == 5 + i]
            first, last = of_conversation[0], of_conversation[-1]
            assert len(of_conversation) == n
            assert first // length == last // length
            assert last - first == n - 1
        assert not loss_mask[ids == END].any()
        sequences = -(-(position % length + len(ids)) // length)
        assert sequences <= len(_pack_in_order(sizes, position % length, length))


def _pack_in_order(sizes: np.ndarray, first: int, length: int) -> list[int]:
    """Returns the tokens in each sequence if conversations are packed in order.

    The first sequence already has ``first`` tokens.
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
        ({"text": "a"}, "no list of messages"),
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
def test_records_without_messages_are_refused(record: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        messages_of(record)


@pytest.mark.parametrize("tools", ["[]", "", None, []])
def test_empty_lists_of_tools_are_ignored(tools: object) -> None:
    messages = [*QUESTION, {**ANSWER, "tool_calls": []}]
    assert messages_of({"messages": messages, "tools": tools}) == [*QUESTION, ANSWER]


def save_tokenizer(folder: Path, *special: str, adds_bos: bool = False, **names: str) -> Path:
    """Saves a tokenizer of letters and special tokens; ``adds_bos`` puts ``<s>`` before texts."""
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
        (["<s>", "</s>"], "</s>", "</s>"),  # Mistral: documents and turns end alike
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
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    folder = save_tokenizer(tmp_path / "with", "<s>", "</s>", adds_bos=True, **names)
    assert token_ids(load_tokenizer(folder), ["ab", "c"]) == [[3, 0, 1, 4], [3, 2, 4]]
    folder = save_tokenizer(tmp_path / "without", "<s>", "</s>", **names)
    assert token_ids(load_tokenizer(folder), ["ab"]) == [[0, 1, 4]]


def test_the_token_between_documents_can_be_chosen(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, "<|im_end|>", "<|endoftext|>", eos_token="<|im_end|>")
    assert token_ids(load_tokenizer(folder, "<|im_end|>"), ["a"]) == [[0, 3]]
    with pytest.raises(RecipeError, match="has no token </s>") as caught:
        load_tokenizer(folder, "</s>")
    assert "data.document_end" in str(caught.value)


def test_a_special_token_written_in_a_document_is_encoded_as_text(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, "<|endoftext|>", eos_token="<|endoftext|>")
    [ids] = token_ids(load_tokenizer(folder), ["a<|endoftext|>b"])
    assert ids.index(3) == len(ids) - 1


def test_a_tokenizer_without_any_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no token eos_token"):
        load_tokenizer(save_tokenizer(tmp_path, "<s>"))
