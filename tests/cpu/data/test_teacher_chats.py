"""Tests that a teacher writes conversations once per request, without unfinished turns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.core.stage import DEADLINE, StoppedByDeadlineError
from recipes.core.wheels import cache_dir
from recipes.data import teacher_chats
from recipes.data.chat import ChatTokenizer
from recipes.data.teacher_chats import ChatRequest, ChatWriter, write_chats
from tests.cpu.data.test_tokenizer import END, PLAIN, STOP, make_tokenizer

REQUEST = ChatRequest(tokens=700, seed=1, seq_length=100)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ChatWriter:
    """Makes a random model that generates all letters with about the same probability.

    The model ends a turn after about ten letters.
    """
    folder = tmp_path_factory.mktemp("teacher")
    make_tokenizer(folder, PLAIN)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = random_model()
    model.lm_head.bias.data.fill_(-100)
    model.lm_head.bias.data[tokenizer(ascii_letters)["input_ids"]] = 0
    model.lm_head.bias.data[STOP] = 1.5
    model.generation_config = GenerationConfig(do_sample=True, top_k=1)  # must not be used
    return ChatWriter(model, tokenizer, sha256="t")


def random_model() -> Any:
    """Makes a Llama of one layer whose output layer has a bias, to set token probabilities.

    The vocabulary has 256 bytes and three special tokens.
    """
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head = torch.nn.Linear(16, 259)
    return model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_RECIPES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(teacher_chats, "BATCH_TOKENS", 0)  # small batches, so there are several


def test_short_conversations_come_in_larger_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch has the requested tokens, up to ``BATCH_TOKENS``, but at least 32 conversations."""
    monkeypatch.undo()  # the real ``BATCH_TOKENS``
    large = replace(REQUEST, tokens=200_000)
    sizes = [replace(large, seq_length=n).batch_size() for n in (256, 512, 1024, 8192)]
    assert sizes == [128, 64, 32, 32]
    assert [replace(REQUEST, seq_length=9, tokens=n).batch_size() for n in (90, 900)] == [32, 100]


def write_and_read(writer: ChatWriter, request: ChatRequest) -> tuple[list[dict[str, Any]], Path]:
    """Returns a request's conversations and their file."""
    file = write_chats(request, writer, MetricsLog(None))
    return [json.loads(line) for line in file.read_text().splitlines()], file


def no_generation(*_: object) -> None:
    raise AssertionError


def test_each_request_is_written_once(teacher: ChatWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    conversations, file = write_and_read(teacher, REQUEST)
    assert len(conversations) > REQUEST.batch_size()  # there are several batches
    other, other_file = write_and_read(teacher, replace(REQUEST, seed=2))
    assert other_file != file
    assert conversations[:9] != other[:9]
    assert write_and_read(replace(teacher, sha256="u"), REQUEST)[1] not in (file, other_file)
    # A repeated request generates nothing: it assembles the damaged file again from stored batches.
    file.write_text("{}\n")
    monkeypatch.setattr(teacher_chats, "_generate", no_generation)
    assert write_and_read(teacher, REQUEST)[0] == conversations


def test_an_interrupted_request_resumes_after_its_last_batch(teacher: ChatWriter) -> None:
    conversations, file = write_and_read(teacher, REQUEST)
    batches = sorted(file.parent.glob("0*.json"))
    assert len(batches) > 1
    modified = batches[0].stat().st_mtime_ns
    for path in (file, *batches[1:]):
        path.unlink()
    assert write_and_read(teacher, REQUEST)[0] == conversations
    assert batches[0].stat().st_mtime_ns == modified


def test_the_deadline_stops_after_a_batch(
    teacher: ChatWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as deadline:
        deadline.setenv(DEADLINE, "1")  # in 1970
        with pytest.raises(StoppedByDeadlineError):
            write_and_read(teacher, REQUEST)
    [batch] = cache_dir().rglob("0*.json")
    modified = batch.stat().st_mtime_ns
    assert len(write_and_read(teacher, REQUEST)[0]) > REQUEST.batch_size()
    assert batch.stat().st_mtime_ns == modified


def test_conversations_are_invented_and_fit_a_sequence(teacher: ChatWriter) -> None:
    conversations, file = write_and_read(teacher, REQUEST)
    encoder = ChatTokenizer(Path(teacher.tokenizer.name_or_path), END, REQUEST.seq_length)
    for conversation in conversations:
        assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"]
        assert all(message["content"] for message in conversation["messages"])
    encoded = encoder.encode(
        [json.dumps(conversation["messages"]) for conversation in conversations]
    )
    assert not any(chat.shortened or chat.left_out_reason for chat in encoded)
    assert sum(json.loads(b.read_text())["unfinished"] for b in file.parent.glob("0*.json")) > 0
    with pytest.raises(RecipeError, match="finished none of"):  # the template alone takes 19
        write_and_read(teacher, replace(REQUEST, seq_length=20))


def test_questions_of_a_file_are_answered_once_each(
    teacher: ChatWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question of more than half a sequence is left out; its batch gets answers of full length.

    Each question but this one has at most 41 tokens, so answers may have at least 58.
    """
    questions = [
        [
            {"role": "system", "content": "Be."},
            {"role": "user", "content": f"{n}" + "?" * (n % 7 + 1)},
        ]
        for n in range(REQUEST.batch_size() + 5)
    ]
    answer = {"role": "assistant", "content": "no"}
    long = [{"role": "user", "content": "?" * 70}]
    lines = [
        json.dumps({"messages": [*turns, answer, turns[-1], answer]})
        for turns in [long, *questions]
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    request = replace(REQUEST, tokens=10**6, prompts=str(tmp_path / "questions.jsonl"))
    conversations, file = write_and_read(teacher, request)
    answered = [conversation["messages"][:-1] for conversation in conversations]
    positions = [questions.index(turns) for turns in answered]
    assert 5 < len(conversations) < len(questions)  # answers that do not end are left out
    assert positions == sorted(set(positions))
    assert all(len(conversation["messages"]) == 3 for conversation in conversations)
    assert max(len(conversation["messages"][-1]["content"]) for conversation in conversations) > 20
    assert f"1 of {len(lines)} prompts" in capsys.readouterr().out
    # If the content of the file changes, the request and its folder are new.
    (tmp_path / "questions.jsonl").write_text("\n".join(lines[:3]))
    assert write_and_read(teacher, request)[1] != file
    with pytest.raises(RecipeError, match="3 of 3 prompts"):
        write_and_read(teacher, replace(request, seq_length=60))


def test_padding_of_prompts_does_not_change_their_continuations(teacher: ChatWriter) -> None:
    """Very large logits make sampling deterministic, so continuations can be compared."""
    model = random_model()
    model.load_state_dict(teacher.model.state_dict())
    model.lm_head.weight.data *= 10_000
    writer = replace(teacher, model=model)
    prompts = [[5, 6, 7], [9], [30, 31, 32, 33, 34, 35]]
    together = teacher_chats._generate(writer, prompts, 12)
    for prompt, row in zip(prompts, together, strict=True):
        expected = row[: row.index(STOP)] if STOP in row else row
        assert teacher_chats._generate(writer, [prompt], 12)[0][: len(expected)] == expected
        tokens = torch.tensor([prompt])
        for token in expected:
            assert model(tokens).logits[0, -1].argmax() == token
            tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)


def test_text_after_the_end_of_turn_token_is_dropped(
    teacher: ChatWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn without an end is returned empty, as is one that starts with the end token."""
    a, b = teacher.tokenizer("ab")["input_ids"]
    # Each row is a prompt, padded on the left to two tokens, and four new tokens.
    rows = torch.tensor([[9, 9, a, b, STOP, STOP], [STOP, 9, a, b, a, b], [9, 9, STOP, a, a, a]])
    monkeypatch.setattr(teacher.model, "generate", lambda *_, **__: rows)
    turns = teacher_chats._write_turns(teacher, [[9, 9], [9], [9]], 4)
    assert turns == [("ab", 2), ("", 0), ("", 0)]
    assert teacher_chats._write_turns(teacher, [[9]], 0) == [("", 0)]
