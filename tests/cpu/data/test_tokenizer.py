"""Tokens of documents and conversations: special tokens, loss masks, and packing."""

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

MARKS = ["<end>", "<start>", "<stop>"]
END, START, STOP = range(3)
TURN = "<start>{{ m.role }}\n{{ m.content }}<stop>\n"
ASK = "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
MARKED = (
    "{% for m in messages %}<start>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<stop>{% endgeneration %}{% else %}{{ m.content }}<stop>"
    "{% endif %}{{ '\n' }}{% endfor %}" + ASK
)
FORGETS = (  # what was thought is only in the last turn, as Qwen3's template has it
    "{% for m in messages %}<start>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>{% endif %}{{ m.content }}<stop>\n{% endfor %}" + ASK
)
ALTERNATES = "{{ raise_exception('roles must alternate') }}"
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
SAID = {"role": "assistant", "content": "So."}
LONG = 200


def saved(folder: Path, template: str | None, seq_length: int = LONG) -> ChatTokenizer:
    """A tokenizer of bytes and three marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*MARKS, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(MARKS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<stop>", additional_special_tokens=MARKS[:2]
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return ChatTokenizer(folder, END, seq_length)


def encoded(tokenizer: ChatTokenizer, messages: list[dict[str, str]]) -> Encoded:
    [found] = tokenizer.encode([json.dumps(messages)])
    return found


def spoken(tokenizer: ChatTokenizer, found: Encoded) -> list[str]:
    """The stretches that count in the loss, as text."""
    assert found.loss_mask is not None
    edges = np.flatnonzero(np.diff(np.concatenate([[0], found.loss_mask, [0]])))
    parts = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer._tokenizer.decode(found.ids[start:stop]) for start, stop in parts]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_words_of_the_assistant_count_in_the_loss(tmp_path: Path, template: str) -> None:
    tokenizer = saved(tmp_path, template)
    again = {"role": "assistant", "content": "Thus, since ü."}
    found = encoded(tokenizer, [*ASKED, SAID, {"role": "user", "content": "And?"}, again])
    whole = (
        "<start>system\nBe brief.<stop>\n<start>user\nWhy?<stop>\n<start>assistant\nSo.<stop>\n"
        "<start>user\nAnd?<stop>\n<start>assistant\nThus, since ü.<stop>\n<end>"
    )
    assert tokenizer._tokenizer.decode(found.ids) == whole
    assert spoken(tokenizer, found) == ["So.<stop>", "Thus, since ü.<stop>"]
    assert (found.shortened, found.left_out) == (False, "")
    copy = pickle.loads(pickle.dumps(tokenizer))  # as to another process
    first = encoded(copy, [*ASKED, SAID]).ids.tolist()
    assert first == [*found.ids.tolist()[: len(first) - 1], END]


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (PLAIN, ASKED, chat.NO_ANSWER),
        (ALTERNATES, [*ASKED, SAID], chat.TEMPLATE),
        (FORGETS, [*ASKED, SAID, *ASKED, SAID], chat.NO_PREFIX),
        (PLAIN, [SAID], chat.NO_PREFIX),
        (PLAIN, [*ASKED, {"role": "assistant", "content": "a <stop> b"}], chat.NAMES_MARK),
        (PLAIN, [*ASKED, {"role": "assistant", "content": "x" * LONG}], chat.TOO_LONG),
    ],
)
def test_unusable_conversations_are_left_out(
    tmp_path: Path, template: str, messages: list[dict[str, str]], reason: str
) -> None:
    found = encoded(saved(tmp_path, template), messages)
    assert (found.left_out, len(found.ids)) == (reason, 0)
    if template == FORGETS:  # one answer alone is found
        assert spoken(saved(tmp_path, template), encoded(saved(tmp_path, template), messages[:3]))


def test_a_long_conversation_is_shortened_to_its_last_whole_answer(tmp_path: Path) -> None:
    turns = [*ASKED, SAID, {"role": "user", "content": "And?"}, SAID]
    whole = encoded(saved(tmp_path, PLAIN), turns)
    for length in range(len(whole.ids) - 1, 63, -1):
        tokenizer = saved(tmp_path, PLAIN, length)
        found = encoded(tokenizer, turns)
        answers = 2 if length >= len(whole.ids) - 1 else 1
        assert spoken(tokenizer, found) == ["So.<stop>"] * answers, length
        assert found.shortened
        assert len(found.ids) <= length
        assert found.ids[-2:].tolist() == [STOP, END]
    first = len(found.ids)
    assert encoded(saved(tmp_path, PLAIN, first), turns).shortened
    assert encoded(saved(tmp_path, PLAIN, first - 1), turns).left_out == chat.TOO_LONG


def test_each_conversation_lies_in_one_sequence() -> None:
    generator, length = np.random.default_rng(0), 32
    for _ in range(30):
        sizes = generator.integers(2, length + 1, generator.integers(1, 40))
        given = [Encoded(np.full(n, 5 + i), np.arange(n) > 0) for i, n in enumerate(sizes)]
        position = int(generator.integers(0, 100))
        packed = list(pack(given, position, length, END))
        ids = np.concatenate([each.ids for each in packed])
        loss_mask = np.concatenate([each.loss_mask for each in packed])  # type: ignore[misc]
        places = position + np.arange(len(ids))
        for i, n in enumerate(sizes):
            [mine] = [places[ids == 5 + i]]
            assert len(mine) == n
            assert mine[0] // length == mine[-1] // length
            assert mine[-1] - mine[0] == n - 1
        assert not loss_mask[ids == END].any()
        sequences = -(-(position % length + len(ids)) // length)
        assert sequences <= len(_naive(sizes, position % length, length))


def _naive(sizes: np.ndarray, begun: int, length: int) -> list[int]:
    """Sequences where each conversation follows the one before it."""
    sequences = [begun]
    for size in sizes:
        if sequences[-1] + size > length:
            sequences.append(0)
        sequences[-1] += int(size)
    return sequences


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no chat template"):
        saved(tmp_path, None).require_template()
    saved(tmp_path, PLAIN).require_template()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "no list of messages"),
        ({"text": "a"}, "no list of messages"),
        ({"messages": []}, "no list of messages"),
        ({"messages": ["hello"]}, "message 1 has no text as its 'role'"),
        ({"messages": [*ASKED, {"role": "x"}]}, "message 3 .* 'content'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "message 1 has no text as its 'cont"),
    ],
)
def test_records_without_messages_are_refused(record: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        messages_of(record)


def saved_tokenizer(folder: Path, *marks: str, begins: bool = False, **names: str) -> Path:
    """Saves a tokenizer of letters and special tokens; ``begins`` puts ``<s>`` before texts."""
    vocabulary = {token: i for i, token in enumerate([*"abc", *marks])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(marks))
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def token_ids(tokenizer: DocumentTokenizer, texts: list[str]) -> list[list[int]]:
    return [one.ids.tolist() for one in tokenizer.encode(texts)]


@pytest.mark.parametrize(
    ("marks", "eos", "end"),
    [
        (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>"),  # SmolLM2, Qwen: base
        (["<|im_end|>", "<|endoftext|>"], "<|im_end|>", "<|endoftext|>"),  # instruct
        (["<|im_end|>", "<|end_of_text|>"], "<|im_end|>", "<|end_of_text|>"),  # Llama 3 instruct
        (["<s>", "</s>"], "</s>", "</s>"),  # Mistral: one end for all
    ],
)
def test_a_document_ends_with_the_end_of_text(
    tmp_path: Path, marks: list[str], eos: str, end: str
) -> None:
    documents = load_tokenizer(saved_tokenizer(tmp_path, *marks, eos_token=eos))
    assert documents.begin is None
    assert documents.end == 3 + marks.index(end)
    assert token_ids(documents, ["ab", "c"]) == [[0, 1, documents.end], [2, documents.end]]


def test_documents_begin_with_the_tokenizers_bos_token(tmp_path: Path) -> None:
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    documents = load_tokenizer(saved_tokenizer(tmp_path / "a", "<s>", "</s>", begins=True, **names))
    assert token_ids(documents, ["ab", "c"]) == [[3, 0, 1, 4], [3, 2, 4]]
    documents = load_tokenizer(saved_tokenizer(tmp_path / "without", "<s>", "</s>", **names))
    assert token_ids(documents, ["ab"]) == [[0, 1, 4]]


def test_the_token_between_documents_can_be_chosen(tmp_path: Path) -> None:
    folder = saved_tokenizer(tmp_path, "<|im_end|>", "<|endoftext|>", eos_token="<|im_end|>")
    assert token_ids(load_tokenizer(folder, "<|im_end|>"), ["a"]) == [[0, 3]]
    with pytest.raises(RecipeError, match="has no token </s>") as caught:
        load_tokenizer(folder, "</s>")
    assert "data.document_end" in str(caught.value)


def test_the_name_of_a_special_token_in_a_text_is_text(tmp_path: Path) -> None:
    folder = saved_tokenizer(tmp_path, "<|endoftext|>", eos_token="<|endoftext|>")
    [ids] = token_ids(load_tokenizer(folder), ["a<|endoftext|>b"])
    assert ids.index(3) == len(ids) - 1


def test_a_tokenizer_without_any_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no token eos_token"):
        load_tokenizer(saved_tokenizer(tmp_path, "<s>"))
