"""Tests that the teacher writes a ``ChatRequest``'s conversations once, and no unfinished turns."""

from __future__ import annotations

import json
import shutil
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
"""It needs several batches: the fixture ``cache`` makes batches of 32 conversations, which have
about 20 generated tokens each."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ChatWriter:
    """Makes a random model that generates only letters and ``STOP``, the end of a turn.

    All letters have about the same probability. A turn has about ten letters.
    """
    folder = tmp_path_factory.mktemp("teacher")
    make_tokenizer(folder, PLAIN)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = random_model()
    model.lm_head.bias.data.fill_(-100)
    model.lm_head.bias.data[tokenizer(ascii_letters)["input_ids"]] = 0
    model.lm_head.bias.data[STOP] = 1.5
    model.generation_config = GenerationConfig(do_sample=True, top_k=1)  # must be ignored
    return ChatWriter(model, tokenizer, sha256="t")


def random_model() -> Any:
    """Makes a Llama of one layer. The bias of its output layer can set token probabilities.

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
    """Gives each test an empty cache, and makes batches as small as possible."""
    monkeypatch.setenv("NEMO_RECIPES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(teacher_chats, "BATCH_TOKENS", 0)  # so ``MIN_BATCH`` is the size


def test_short_conversations_come_in_larger_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch has as many conversations as fit in the requested tokens, but at least 32.

    A request of more than ``BATCH_TOKENS``, 32,768, is divided into batches of this size.
    """
    monkeypatch.undo()  # restores the real ``BATCH_TOKENS``
    large = replace(REQUEST, tokens=200_000)
    sizes = [replace(large, seq_length=n).batch_size() for n in (256, 512, 1024, 8192)]
    assert sizes == [128, 64, 32, 32]
    assert [replace(REQUEST, seq_length=9, tokens=n).batch_size() for n in (90, 900)] == [32, 100]


def write_and_read(writer: ChatWriter, request: ChatRequest) -> tuple[list[dict[str, Any]], Path]:
    """Generates a request's conversations, and returns them and their file."""
    file = write_chats(request, writer, MetricsLog(None))
    return [json.loads(line) for line in file.read_text().splitlines()], file


def test_each_request_is_written_once(teacher: ChatWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    conversations, file = write_and_read(teacher, REQUEST)
    assert len(conversations) > REQUEST.batch_size()  # there are several batches
    seed_2, seed_2_file = write_and_read(teacher, replace(REQUEST, seed=2))
    assert seed_2_file != file
    assert conversations[:9] != seed_2[:9]
    _, other_teacher_file = write_and_read(replace(teacher, sha256="u"), REQUEST)
    assert other_teacher_file not in (file, seed_2_file)
    # A repeated request generates nothing: it assembles the damaged file again from stored batches.
    file.write_text("{}\n")
    monkeypatch.delattr(teacher_chats, "_generate")
    assert write_and_read(teacher, REQUEST)[0] == conversations


def test_a_request_stops_at_the_deadline_and_resumes_after_its_last_batch(
    teacher: ChatWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as deadline:
        deadline.setenv(DEADLINE, "1")  # seconds since 1970, so it has passed
        with pytest.raises(StoppedByDeadlineError):
            write_and_read(teacher, REQUEST)
    [batch] = cache_dir().rglob("0*.json")
    batch_time = batch.stat().st_mtime_ns
    conversations, file = write_and_read(teacher, REQUEST)
    assert len(conversations) > REQUEST.batch_size()
    assert batch.stat().st_mtime_ns == batch_time
    shutil.rmtree(file.parent)
    assert write_and_read(teacher, REQUEST)[0] == conversations


def test_the_teacher_invents_conversations_that_fit_a_sequence(teacher: ChatWriter) -> None:
    conversations, file = write_and_read(teacher, REQUEST)
    encoder = ChatTokenizer(Path(teacher.tokenizer.name_or_path), END, REQUEST.seq_length)
    for conversation in conversations:
        messages = conversation["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert all(message["content"] for message in messages)
        [chat] = encoder.encode([json.dumps(messages)])
        assert (chat.shortened, chat.left_out_reason) == (False, "")
    batches = [json.loads(path.read_text()) for path in file.parent.glob("0*.json")]
    assert sum(batch["unfinished"] for batch in batches) > 0  # so unfinished turns were left out
    # The tokens of the template and the end token take all of the 20 tokens.
    with pytest.raises(RecipeError, match="finished no conversation"):
        write_and_read(teacher, replace(REQUEST, seq_length=20))


def test_prompts_without_a_finished_answer_are_an_error(
    teacher: ChatWriter, tmp_path: Path
) -> None:
    model = random_model()
    # Of large logits, sampling chooses the largest. The end token's logit is 0, so it never is.
    model.lm_head.weight.data *= 10_000
    model.lm_head.weight.data[STOP] = 0
    (tmp_path / "one.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "?"}]})
    )
    request = replace(REQUEST, prompts=str(tmp_path / "one.jsonl"))
    with pytest.raises(RecipeError, match="1 turns have no end"):
        write_and_read(replace(teacher, model=model, sha256="v"), request)


def test_questions_of_a_file_are_answered_once_each(
    teacher: ChatWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question of more than half a sequence is left out and does not shorten its batch's answers.

    With the template, the other questions have at most 41 tokens. So their answers may have
    100 - 41 - 1 = 58 tokens. The long question has 89 tokens with the template. In the batch, it
    would leave 100 - 89 - 1 = 10 tokens.
    """
    questions = [
        [
            {"role": "system", "content": "Be."},
            {"role": "user", "content": f"{n}" + "?" * (n % 7 + 1)},
        ]
        for n in range(REQUEST.batch_size() + 5)
    ]
    answer = {"role": "assistant", "content": "no"}
    long_question = [{"role": "user", "content": "?" * 70}]
    # Only the turns before the first answer are used. The other turns are to be ignored.
    lines = [
        json.dumps({"messages": [*turns, answer, turns[-1], answer]})
        for turns in [long_question, *questions]
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    request = replace(REQUEST, tokens=10**6, prompts=str(tmp_path / "questions.jsonl"))
    conversations, file = write_and_read(teacher, request)
    messages = [conversation["messages"] for conversation in conversations]
    positions = [questions.index(turns[:-1]) for turns in messages]
    # More than the 5 of the second batch, so both batches count. Answers without an end do not.
    assert 5 < len(conversations) < len(questions)
    assert positions == sorted(set(positions))  # in order, each question at most once
    assert all(len(turns) == 3 for turns in messages)  # system, user and the teacher's answer
    # More than the 10 tokens that the long question would leave.
    assert max(len(turns[-1]["content"]) for turns in messages) > 20
    assert f"1 of {len(lines)} prompts" in capsys.readouterr().out
    # If the content of the file changes, its conversations have another folder in the cache.
    (tmp_path / "questions.jsonl").write_text("\n".join(lines[:3]))
    assert write_and_read(teacher, request)[1] != file
    # Each question has more than 30 tokens, half of the shorter sequence.
    with pytest.raises(RecipeError, match="3 of 3 prompts"):
        write_and_read(teacher, replace(request, seq_length=60))


def test_prompts_that_the_template_refuses_are_left_out(
    teacher: ChatWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    make_tokenizer(tmp_path, PLAIN.replace("<start>{{ m", f"{refusal}<start>{{{{ m", 1))
    writer = replace(teacher, tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    good, bad = ([{"role": role, "content": "Why?"}] for role in ("user", "system"))
    lines = [json.dumps({"messages": messages}) for messages in (bad, good)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines))
    request = replace(REQUEST, prompts=str(file))
    assert teacher_chats._openings(request, writer) == [good]
    message = "0 of 2 prompts have more than 50 tokens, half of data.seq_length=100; the chat "
    assert message + "template refuses 1; these are left out" in capsys.readouterr().out
    file.write_text(lines[0])
    with pytest.raises(RecipeError, match="refuses 1"):
        teacher_chats._openings(request, writer)


def test_padding_of_prompts_does_not_change_their_continuations(teacher: ChatWriter) -> None:
    """Very large logits make sampling deterministic, so continuations can be compared."""
    model = random_model()
    model.load_state_dict(teacher.model.state_dict())
    model.lm_head.weight.data *= 10_000
    writer = replace(teacher, model=model)
    prompts = [[5, 6, 7], [9], [30, 31, 32, 33, 34, 35]]
    batch_continuations = teacher_chats._generate(writer, prompts, 12)
    for prompt, row in zip(prompts, batch_continuations, strict=True):
        continuation = row[: row.index(STOP)] if STOP in row else row
        [unpadded_row] = teacher_chats._generate(writer, [prompt], 12)
        assert unpadded_row[: len(continuation)] == continuation
        tokens = torch.tensor([prompt])
        for token in continuation:
            assert model(tokens).logits[0, -1].argmax() == token
            tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)


def test_text_after_the_end_of_turn_token_is_dropped(
    teacher: ChatWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns are empty if they have no end-of-turn token, or start with it."""
    a, b = teacher.tokenizer("ab")["input_ids"]
    # Each row is a prompt, padded on the left to two tokens, and four new tokens. The padding of
    # the second row is STOP, which does not end the turn.
    rows = torch.tensor([[9, 9, a, b, STOP, STOP], [STOP, 9, a, b, a, b], [9, 9, STOP, a, a, a]])
    monkeypatch.setattr(teacher.model, "generate", lambda *_, **__: rows)
    turns = teacher_chats._write_turns(teacher, [[9, 9], [9], [9]], 4)
    assert turns == [("ab", 2), ("", 0), ("", 0)]
    # Without room for new tokens, the model is not called.
    assert teacher_chats._write_turns(teacher, [[9]], 0) == [("", 0)]
