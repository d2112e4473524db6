"""What a teacher writes: once for each order, whatever interrupts it, and each turn to its end."""

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
from recipes.data import written
from recipes.data.chat import ChatTokenizer
from recipes.data.written import GeneratedText, Order, TextGenerator, write
from tests.cpu.data.test_chat import END, PLAIN, STOP, saved

TEXT = Order("text", tokens=600, seed=1, longest=60, end=END)
CHAT = Order("chat", tokens=700, seed=1, longest=100, end=END)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    """Says any letter with about the same probability, and ends a turn after about ten."""
    folder = tmp_path_factory.mktemp("teacher")
    saved(folder, PLAIN)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = random_model()
    model.lm_head.bias.data.fill_(-100)
    model.lm_head.bias.data[tokenizer(ascii_letters)["input_ids"]] = 0
    model.lm_head.bias.data[STOP] = 1.5
    model.generation_config = GenerationConfig(do_sample=True, top_k=1)  # a model's own taste
    return TextGenerator(model, tokenizer, "t")


def random_model() -> Any:
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
    monkeypatch.setattr(written, "BATCH_TOKENS", 0)  # so that there are several batches


def test_more_is_written_at_a_time_where_much_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    much = replace(CHAT, tokens=200_000)
    assert [replace(much, longest=n).batch() for n in (256, 512, 1024, 8192)] == [128, 64, 32, 32]
    assert [replace(CHAT, longest=9, tokens=n).batch() for n in (90, 900)] == [32, 100]


def order(teacher: TextGenerator, what: Order) -> tuple[list[dict[str, Any]], GeneratedText, Path]:
    file, about = write(what, teacher, MetricsLog(None))
    return [json.loads(line) for line in file.read_text().splitlines()], about, file


def nothing_is_written(*_: object) -> None:
    raise AssertionError


def test_text_is_written_once_for_each_order(
    teacher: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, about, file = order(teacher, TEXT)
    assert about.tokens >= TEXT.tokens > about.tokens - TEXT.batch() * TEXT.longest
    assert about.records == len(texts) > TEXT.batch()
    assert len({text["text"] for text in texts}) > 0.9 * len(texts)
    other, _, elsewhere = order(teacher, replace(TEXT, seed=2))
    assert elsewhere != file
    assert [text["text"] for text in texts[:9]] != [text["text"] for text in other[:9]]
    assert order(replace(teacher, sha256="u"), TEXT)[2] not in (file, elsewhere)
    # A whole one is taken as it is, and one that was damaged is put together again.
    monkeypatch.setattr(written, "_generate", nothing_is_written)
    assert order(teacher, TEXT)[0] == texts
    file.write_text("{}\n")
    assert order(teacher, TEXT)[:2] == (texts, about)


def test_interrupted_it_goes_on_after_its_last_batch(teacher: TextGenerator) -> None:
    texts, about, file = order(teacher, TEXT)
    batches = sorted(file.parent.glob("0*.json"))
    assert len(batches) > 1
    kept = batches[0].stat().st_mtime_ns
    for lost in (file, file.parent / "about.json", *batches[1:]):
        lost.unlink()
    assert order(teacher, TEXT)[:2] == (texts, about)
    assert batches[0].stat().st_mtime_ns == kept


def test_conversations_are_made_up_and_fit_a_window(teacher: TextGenerator, tmp_path: Path) -> None:
    talks, about, _ = order(teacher, CHAT)
    encoder = ChatTokenizer(Path(teacher.tokenizer.name_or_path), END, CHAT.longest)
    for talk in talks:
        assert [message["role"] for message in talk["messages"]] == ["user", "assistant"]
        assert all(message["content"] for message in talk["messages"])
    encoded = encoder.encode([json.dumps(talk["messages"]) for talk in talks])
    assert not any(one.cut or one.left_out for one in encoded)
    assert about.unfinished > 0
    with pytest.raises(RecipeError, match="finished none of"):
        order(teacher, replace(CHAT, longest=20))


def test_questions_of_a_file_are_answered_once_each(teacher: TextGenerator, tmp_path: Path) -> None:
    asked = [
        [{"role": "system", "content": "Be."}, {"role": "user", "content": "?" * (n % 7 + 1)}]
        for n in range(CHAT.batch() + 5)
    ]
    answer = {"role": "assistant", "content": "no"}
    lines = [json.dumps({"messages": [*one, answer, one[1], answer]}) for one in asked]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    prompts = replace(CHAT, tokens=10**6, prompts=str(tmp_path / "asked.jsonl"))
    talks, about, file = order(teacher, prompts)
    found = [talk["messages"][:-1] for talk in talks]
    places = [asked.index(one) for one in found]
    assert len(talks) + about.unfinished == len(asked)
    assert len(places) > 5
    assert all(len(talk["messages"]) == 3 for talk in talks)
    # Another file of that name is another order.
    (tmp_path / "asked.jsonl").write_text("\n".join(lines[:3]))
    assert order(teacher, prompts)[2] != file


def test_prompts_of_any_length_are_continued_alike(teacher: TextGenerator) -> None:
    """A teacher who is sure of every token leaves nothing to chance."""
    sure = random_model()
    sure.load_state_dict(teacher.model.state_dict())
    sure.lm_head.weight.data *= 10_000
    one = replace(teacher, model=sure)
    prompts = [[5, 6, 7], [9], [30, 31, 32, 33, 34, 35]]
    together = written._generate(one, prompts, 12, {STOP})
    for prompt, expected in zip(prompts, together, strict=True):
        assert written._generate(one, [prompt], 12, {STOP}) == [expected]
        tokens = torch.tensor([prompt])
        for token in expected[0]:
            assert sure(tokens).logits[0, -1].argmax() == token
            tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)


def test_a_turn_ends_where_the_teacher_ends_it(
    teacher: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generated(*_: object, **__: object) -> torch.Tensor:
        return torch.tensor([[9, 9, 5, 6, STOP, STOP], [STOP, 9, 5, 6, 7, 8]])

    monkeypatch.setattr(teacher.model, "generate", generated)
    found = written._generate(teacher, [[9, 9], [9]], 4, {STOP})
    assert found == [([5, 6], True), ([5, 6, 7, 8], False)]
