"""Text that a teacher writes itself, plain or as conversations: once, and kept in the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipes.core.errors import RecipeError
from recipes.core.files import read_json, sha256_of, write_json, write_text_atomically
from recipes.core.fingerprint import code_fingerprint, digest
from recipes.core.metrics import MetricsLog
from recipes.core.versions import installed
from recipes.core.wheels import cache_dir
from recipes.data.chat import ANSWERS
from recipes.data.corpus import read_source
from recipes.data.sources import CHAT

BATCH, BATCH_TOKENS = 32, 1 << 15
"""Texts written at a time, and more of them where many short ones are wanted: a token of one costs
nearly as much as of many. Other numbers give other text."""
VAIN_BATCHES = 5
"""Batches without a finished text after which a teacher is given up on."""
BLANK = "\0"
"""Stands where a user would say something, to find what a template has before it."""
FILE, ABOUT = "text.jsonl", "about.json"
Record = dict[str, Any]


@dataclass(frozen=True)
class Order:
    """What is to be written; together with the teacher it decides every token."""

    kind: str
    """``text`` or ``chat``."""
    tokens: int
    """To write; of conversations, those of the assistant and of made-up users."""
    seed: int
    longest: int
    """Tokens of a text, or of a conversation with all its marks."""
    end: int
    """Token between documents, after which a teacher begins one."""
    prompts: str | None = None
    """Source of conversations to answer from their first turns on; made up where there is none."""

    def batch(self) -> int:
        """Texts written at a time, in one state of the random numbers."""
        return max(BATCH, min(self.tokens, BATCH_TOKENS) // self.longest)


@dataclass(frozen=True)
class TextGenerator:
    """The model that generates text, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    """Of its weights, config and tokenizer."""


@dataclass(frozen=True)
class GeneratedText:
    """The generated text: a file of records."""

    sha256: str
    tokens: int
    records: int
    unfinished: int
    """Turns that were too long, and left out."""


def write(order: Order, teacher: TextGenerator, log: MetricsLog) -> tuple[Path, GeneratedText]:
    """Returns what a teacher wrote to order, from the cache if it did before.

    A process that was killed is gone on from after its last whole batch.

    Raises:
        RecipeError: It finishes nothing.
    """
    folder = cache_dir() / "written" / _name(order, teacher)
    file, about = folder / FILE, folder / ABOUT
    if about.exists():
        done = GeneratedText(**read_json(about))
        if file.exists() and sha256_of(file) == done.sha256:
            return file, done
    folder.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    tokens = unfinished = 0
    for number, batch in enumerate(_batches(order, teacher, folder)):
        records += batch["records"]
        tokens += batch["tokens"]
        unfinished += batch["unfinished"]
        log.progress("write", min(tokens, order.tokens), order.tokens)
        if tokens >= order.tokens:
            break
        if not records and number + 1 == VAIN_BATCHES:
            raise RecipeError(
                f"the teacher finished none of {unfinished} turns within {order.longest} tokens.",
                "raise data.seq_length, or use an instruct model",
            )
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text_atomically(file, text)
    done = GeneratedText(sha256_of(file), tokens, len(records), unfinished)
    write_json(about, asdict(done))
    return file, done


def _name(order: Order, teacher: TextGenerator) -> str:
    prompts = None if order.prompts is None else _content(order.prompts)
    libraries = [f"{name} {installed(name)}" for name in ("torch", "transformers")]
    made_of = {**asdict(order), "prompts": prompts, "teacher": teacher.sha256}
    return digest([made_of, code_fingerprint(__name__), libraries])[:32]


def _content(prompts: str) -> str:
    return digest([document.text for document in read_source(prompts, "", chat=True)])


def _batches(order: Order, teacher: TextGenerator, folder: Path) -> Iterator[Mapping[str, Any]]:
    """What each batch came to, those that are kept first."""
    turns = _asked(order) if order.prompts else None
    number = 0
    while True:
        asked = None if turns is None else list(islice(turns, order.batch()))
        if asked == []:
            return
        kept = folder / f"{number:05d}.json"
        if not kept.exists():
            with torch.random.fork_rng():
                torch.manual_seed(int(digest([order.seed, number])[:15], 16))
                write_json(kept, _write_batch(order, teacher, asked))
        yield read_json(kept)
        number += 1


def _asked(order: Order) -> Iterator[list[Record]]:
    """What each conversation has before its first answer."""
    assert order.prompts is not None
    for document in read_source(order.prompts, "", chat=True):
        messages = json.loads(document.text)
        roles = [message["role"] for message in messages]
        before = messages[: roles.index(ANSWERS)] if ANSWERS in roles else messages
        if before:
            yield before


def _write_batch(
    order: Order, teacher: TextGenerator, asked: list[list[Record]] | None
) -> Mapping[str, Any]:
    if order.kind != CHAT:
        ends = {order.end, teacher.tokenizer.eos_token_id}
        found = _generate(teacher, [[order.end]] * order.batch(), order.longest, ends)
        texts = [_words(teacher, ids) for ids, _ in found]
        records: list[Record] = [{"text": text} for text in texts if text]
        return {"records": records, "tokens": sum(len(ids) for ids, _ in found), "unfinished": 0}
    tokens = unfinished = 0
    if asked is None:
        openings = [_opening(teacher)] * order.batch()
        found = _generate(teacher, openings, order.longest // 2, _stops(teacher))
        said = [(_words(teacher, ids), len(ids)) for ids, done in found if done]
        asked = [[{"role": "user", "content": text}] for text, _ in said if text]
        tokens = sum(length for text, length in said if text)
        unfinished = len(openings) - len(asked)
    render = teacher.tokenizer.apply_chat_template
    prompts = [list(render(turns, add_generation_prompt=True)) for turns in asked]  # type: ignore[arg-type]
    room = order.longest - max(map(len, prompts), default=0) - 1
    if room < 1:  # each would be left out as too long
        return {"records": [], "tokens": 0, "unfinished": unfinished + len(asked)}
    records = []
    for turns, (ids, done) in zip(
        asked, _generate(teacher, prompts, room, _stops(teacher)), strict=True
    ):
        answer = _words(teacher, ids)
        unfinished += not (done and answer)
        if done and answer:
            records.append({"messages": [*turns, {"role": ANSWERS, "content": answer}]})
            tokens += len(ids)
    return {"records": records, "tokens": tokens, "unfinished": unfinished}


def _opening(teacher: TextGenerator) -> list[int]:
    """What a template has before the words of a user (arXiv:2406.08464)."""
    turn = [{"role": "user", "content": BLANK}]
    rendered = str(teacher.tokenizer.apply_chat_template(turn, tokenize=False))
    opening: list[int] = teacher.tokenizer(rendered.partition(BLANK)[0], add_special_tokens=False)[
        "input_ids"
    ]
    return opening or [int(teacher.tokenizer.eos_token_id)]


def _stops(teacher: TextGenerator) -> set[int]:
    """Tokens that end a turn."""
    return {int(teacher.tokenizer.eos_token_id)}


def _words(teacher: TextGenerator, ids: list[int]) -> str:
    words = teacher.tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(words).strip()


@torch.no_grad()
def _generate(
    teacher: TextGenerator, prompts: list[list[int]], most: int, stops: set[int]
) -> list[tuple[list[int], bool]]:
    """Continues prompts at temperature 1, and says whether each came to an end.

    Returns:
        New tokens, at most so many and without what ended them.
    """
    if not prompts:
        return []
    longest, lasts = max(map(len, prompts)), {prompt[-1] for prompt in prompts}
    # Any will do, as it is masked; at a prompt's end transformers would take it for padding.
    pad = next(token for token in range(len(lasts) + 1) if token not in lasts)
    rows = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    tokens = torch.tensor(rows)
    real = torch.tensor([[n >= longest - len(p) for n in range(longest)] for p in prompts])
    device = teacher.model.device
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=most,
        eos_token_id=sorted(stops), pad_token_id=pad,
    )  # fmt: skip
    found: Tensor = teacher.model.generate(  # type: ignore[operator]
        tokens.to(device),
        attention_mask=real.long().to(device),
        generation_config=settings,
        use_model_defaults=False,
    )
    continued = []
    for row in found[:, longest:].tolist():
        stop = next((n for n, token in enumerate(row) if token in stops), None)
        continued.append((row[:stop], stop is not None))
    return continued
