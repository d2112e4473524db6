"""Lets a teacher write conversations, once per request, and stores them in the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json, write_text_atomically
from recipes.core.fingerprint import code_fingerprint, digest
from recipes.core.metrics import MetricsLog
from recipes.core.stage import require_time_left
from recipes.core.versions import installed_version
from recipes.core.wheels import cache_dir
from recipes.data.chat import ASSISTANT
from recipes.data.corpus import read_source

MIN_BATCH, BATCH_TOKENS = 32, 1 << 15
"""A batch has as many conversations as fit in the requested tokens and in ``BATCH_TOKENS``, but at
least ``MIN_BATCH``, because a generation step costs nearly the same for many sequences as for one.
Both constants affect the text that is generated."""
MAX_EMPTY_BATCHES = 5
"""The stage fails if so many batches at the start have no finished conversation."""
BLANK = "\0"
"""Placeholder for a user's words, which marks where the template puts them."""
FILE = "chats.jsonl"
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class ChatRequest:
    """A request for conversations. Together with the teacher, it determines every token."""

    tokens: int
    """Tokens to generate: answers, and users' turns that the teacher invents."""
    seed: int
    seq_length: int
    """Maximum tokens of a conversation, all special tokens included."""
    prompts: str | None = None
    """Source of conversations. Only the turns before the first assistant turn are used; the teacher
    answers them. Without a source, the teacher also invents the user's turn."""

    def batch_size(self) -> int:
        """Returns the number of conversations per batch; each batch has its own random seed."""
        return max(MIN_BATCH, min(self.tokens, BATCH_TOKENS) // self.seq_length)


@dataclass(frozen=True)
class ChatWriter:
    """The teacher as transformers loads it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    """SHA-256 of the teacher's weights, config and tokenizer."""


def write_chats(request: ChatRequest, writer: ChatWriter, log: MetricsLog) -> Path:
    """Writes a request's conversations, one per line, and returns the file.

    Finished batches are stored in the cache. So a repeated request generates nothing, and a killed
    process resumes after the last finished batch.

    Raises:
        RecipeError: The first ``MAX_EMPTY_BATCHES`` batches have no finished conversation.
        StoppedByDeadlineError: The deadline has passed. The finished batches are stored.
    """
    prompts = [document.text for document in _documents(request)] if request.prompts else None
    libraries = [f"{name} {installed_version(name)}" for name in ("torch", "transformers")]
    settings = {**asdict(request), "prompts": prompts, "teacher": writer.sha256}
    key = digest([settings, code_fingerprint(__name__), libraries])[:32]
    folder = cache_dir() / "teacher_chats" / key
    folder.mkdir(parents=True, exist_ok=True)
    conversations: list[Messages] = []
    tokens = unfinished = 0
    for number, batch in enumerate(_batches(request, writer, folder), 1):
        conversations += batch["conversations"]
        tokens += batch["tokens"]
        unfinished += batch["unfinished"]
        log.progress("write", min(tokens, request.tokens), request.tokens)
        if tokens >= request.tokens:
            break
        if not conversations and number == MAX_EMPTY_BATCHES:
            raise RecipeError(
                f"the teacher finished none of {unfinished} turns within {request.seq_length} "
                "tokens.",
                "raise data.seq_length, or use an instruct model",
            )
        require_time_left(f"batch {number + 1} of the teacher's conversations")
    lines = (json.dumps({"messages": turns}, ensure_ascii=False) for turns in conversations)
    write_text_atomically(folder / FILE, "".join(f"{line}\n" for line in lines))
    return folder / FILE


def _documents(request: ChatRequest) -> Iterator[Any]:
    assert request.prompts is not None
    return iter(read_source(request.prompts, "", chat=True))


def _batches(request: ChatRequest, writer: ChatWriter, folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yields batches; reads finished batches from the folder, and generates further batches."""
    all_openings = iter(_openings(request, writer)) if request.prompts else None
    size = request.batch_size()
    for number in count():
        openings = None if all_openings is None else list(islice(all_openings, size))
        if openings == []:
            return
        file = folder / f"{number:05d}.json"
        if not file.exists():
            with torch.random.fork_rng():
                # 15 hexadecimal digits are the most that fit in a signed 64-bit seed.
                torch.manual_seed(int(digest([request.seed, number])[:15], 16))
                write_json(file, _write_batch(request, writer, openings))
        yield read_json(file)


def _openings(request: ChatRequest, writer: ChatWriter) -> list[Messages]:
    """Returns the messages of each conversation before its first answer.

    Leaves out those of more than half a sequence, since they would shorten all answers of a batch.

    Raises:
        RecipeError: All are left out.
    """
    limit, openings, too_long = request.seq_length // 2, list[Messages](), 0
    for document in _documents(request):
        messages = json.loads(document.text)
        roles = [message["role"] for message in messages]
        opening = messages[: roles.index(ASSISTANT)] if ASSISTANT in roles else messages
        if opening and len(_prompt_tokens(writer, opening)) > limit:
            too_long += 1
        elif opening:
            openings.append(opening)
    if too_long:
        what = f"{too_long} of {too_long + len(openings)} prompts have more than {limit} tokens"
        if not openings:
            raise RecipeError(f"{what}, half of a sequence.", "raise data.seq_length")
        print(f"{what}, half of data.seq_length, and are left out", flush=True)
    return openings


def _prompt_tokens(writer: ChatWriter, opening: Messages) -> list[int]:
    return list(writer.tokenizer.apply_chat_template(opening, add_generation_prompt=True))  # type: ignore[arg-type]


def _write_batch(
    request: ChatRequest, writer: ChatWriter, openings: list[Messages] | None
) -> Mapping[str, Any]:
    """Writes one answer to each opening; without openings, the teacher invents them."""
    tokens = unfinished = 0
    if openings is None:
        prefixes = [_user_prefix(writer)] * request.batch_size()
        # At most half of the sequence is for the user's turn, the remainder for the answer.
        turns = _write_turns(writer, prefixes, request.seq_length // 2)
        openings = [[{"role": "user", "content": text}] for text, _ in turns if text]
        tokens = sum(length for _, length in turns)
        unfinished = len(turns) - len(openings)
    prompts = [_prompt_tokens(writer, opening) for opening in openings]
    # 1 is for the token that ``ChatTokenizer`` adds after a conversation.
    new_tokens = request.seq_length - max(map(len, prompts), default=0) - 1
    answers = _write_turns(writer, prompts, new_tokens)
    conversations = [
        [*opening, {"role": ASSISTANT, "content": text}]
        for opening, (text, _) in zip(openings, answers, strict=True)
        if text
    ]
    return {
        "conversations": conversations,
        "tokens": tokens + sum(length for _, length in answers),
        "unfinished": unfinished + len(answers) - len(conversations),
    }


def _user_prefix(writer: ChatWriter) -> list[int]:
    """Returns the template's tokens before a user's words, so that the teacher writes these words.

    The method is Magpie, arXiv:2406.08464.
    """
    turn = [{"role": "user", "content": BLANK}]
    rendered = str(writer.tokenizer.apply_chat_template(turn, tokenize=False))
    encoded = writer.tokenizer(rendered.partition(BLANK)[0], add_special_tokens=False)
    return list(encoded["input_ids"]) or [int(writer.tokenizer.eos_token_id)]


def _write_turns(
    writer: ChatWriter, prompts: list[list[int]], new_tokens: int
) -> list[tuple[str, int]]:
    """Generates a turn after each prompt; returns each turn's text and number of tokens.

    A turn that does not end, or has no text, is ``("", 0)``.
    """
    if not prompts or new_tokens < 1:
        return [("", 0)] * len(prompts)
    end = int(writer.tokenizer.eos_token_id)
    turns = []
    for row in _generate(writer, prompts, new_tokens):
        ids = row[: row.index(end)] if end in row else []
        text = writer.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        stripped = str(text).strip()
        turns.append((stripped, len(ids) if stripped else 0))
    return turns


@torch.no_grad()
def _generate(writer: ChatWriter, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Samples a continuation of each prompt at temperature 1: at most ``new_tokens`` tokens."""
    longest, last_tokens = max(map(len, prompts)), {prompt[-1] for prompt in prompts}
    # Padding is masked, so it can be any token. But transformers warns if a prompt ends with it.
    pad = next(token for token in range(len(last_tokens) + 1) if token not in last_tokens)
    rows = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[int(n >= longest - len(p)) for n in range(longest)] for p in prompts]
    device = writer.model.device
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens,
        eos_token_id=writer.tokenizer.eos_token_id, pad_token_id=pad,
    )  # fmt: skip
    output: Tensor = writer.model.generate(  # type: ignore[operator]
        torch.tensor(rows, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=settings,
        # The settings above must not be completed from the model's generation_config.json.
        use_model_defaults=False,
    )
    continuations: list[list[int]] = output[:, longest:].tolist()
    return continuations
