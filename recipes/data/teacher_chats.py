"""Generates conversations with the teacher model, and caches them on disk by request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json, write_text_atomically
from recipes.core.fingerprint import code_fingerprint, digest
from recipes.core.metrics import MetricsLog
from recipes.core.stage import require_time_left
from recipes.core.versions import installed_version
from recipes.core.wheels import cache_dir
from recipes.data.chat import ASSISTANT, render
from recipes.data.corpus import read_source

MIN_BATCH = 32
"""Smallest number of conversations in a batch. A generation step costs nearly the same for many
sequences as for one. Each batch has its own random seed, so the generated text depends on the batch
size."""
BATCH_TOKENS = 1 << 15
"""Maximum tokens of a batch of more than ``MIN_BATCH`` conversations."""
MAX_EMPTY_BATCHES = 5
"""The stage fails if this number of batches, from the first, has no finished conversation."""
BLANK = "\0"
"""Placeholder for a user's message in a rendered template."""
FILE = "chats.jsonl"
"""File with all conversations of a request, in the request's folder of the cache."""
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class ChatRequest:
    """A request for conversations. Together with the teacher, it determines every token."""

    tokens: int
    """Tokens to generate: answers, and users' turns that the teacher invents."""
    seed: int
    seq_length: int
    """Maximum tokens of a conversation, special tokens included."""
    prompts: str | None = None
    """Source of conversations. The teacher answers the turns before their first assistant turn.
    Without a source, the teacher also invents the user's turn."""

    def batch_size(self) -> int:
        """Returns the number of conversations per batch."""
        return max(MIN_BATCH, min(self.tokens, BATCH_TOKENS) // self.seq_length)


@dataclass(frozen=True)
class ChatWriter:
    """The teacher model and its tokenizer, both loaded by transformers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    """SHA-256 of the teacher's weights, config and tokenizer."""


def write_chats(request: ChatRequest, writer: ChatWriter, log: MetricsLog) -> Path:
    """Writes a request's conversations, one per line, and returns the path of the file.

    Generation stops at ``request.tokens`` tokens, or after the last conversation of
    ``request.prompts``. Finished batches are stored in the cache, so a repeated request generates
    nothing, and a killed process resumes after the last finished batch.

    Raises:
        RecipeError: The first ``MAX_EMPTY_BATCHES`` batches have no finished conversation, or
            none of ``request.prompts`` leads to a finished conversation.
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
        if tokens >= request.tokens or (not conversations and number == MAX_EMPTY_BATCHES):
            break
        require_time_left(f"batch {number + 1} of the teacher's conversations")
    if not conversations:
        raise RecipeError(
            f"the teacher finished no conversation within {request.seq_length} tokens; "
            f"{unfinished} turns have no end or no text.",
            "raise data.seq_length, or use an instruct model",
        )
    lines = (json.dumps({"messages": turns}, ensure_ascii=False) for turns in conversations)
    write_text_atomically(folder / FILE, "".join(f"{line}\n" for line in lines))
    return folder / FILE


def _documents(request: ChatRequest) -> Iterator[Any]:
    """Yields a document for each conversation of ``request.prompts``: the JSON of its messages."""
    assert request.prompts is not None
    return iter(read_source(request.prompts, "", chat=True))


def _batches(request: ChatRequest, writer: ChatWriter, folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yields the result of ``_write_batch`` for each batch.

    Stores each result in a file of ``folder``. If the file exists, reads the result from it.
    """
    all_openings = iter(_openings(request, writer)) if request.prompts else None
    size = request.batch_size()
    for number in count():
        openings = None if all_openings is None else list(islice(all_openings, size))
        if openings == []:  # all prompts are used; without prompts, ``openings`` is None
            return
        file = folder / f"{number:05d}.json"
        if not file.exists():
            with torch.random.fork_rng():
                # 15 hexadecimal digits are the most that fit in a signed 64-bit seed.
                torch.manual_seed(int(digest([request.seed, number])[:15], 16))
                write_json(file, _write_batch(request, writer, openings))
        yield read_json(file)


def _openings(request: ChatRequest, writer: ChatWriter) -> list[Messages]:
    """Returns the opening of each conversation: its messages before the first answer.

    Leaves out openings that the chat template refuses, and those of more than half a sequence. One
    long opening would shorten all answers of a batch, because they have the same maximum length.

    Raises:
        RecipeError: All openings are left out.
    """
    max_tokens = request.seq_length // 2
    openings: list[Messages] = []
    too_long = refused = 0
    for document in _documents(request):
        opening = list(takewhile(lambda m: m["role"] != ASSISTANT, json.loads(document.text)))
        try:
            if opening and len(_prompt_tokens(writer, opening)) > max_tokens:
                too_long += 1
            elif opening:
                openings.append(opening)
        except TemplateError:
            refused += 1
    if too_long or refused:
        message = (
            f"{too_long} of {too_long + refused + len(openings)} prompts have more than "
            f"{max_tokens} tokens, half of data.seq_length={request.seq_length}; the chat template "
            f"refuses {refused}"
        )
        if not openings:
            fix = "raise data.seq_length" if too_long else "use prompts that the template accepts"
            raise RecipeError(f"{message}.", fix)
        print(f"{message}; these are left out", flush=True)
    return openings


def _prompt_tokens(writer: ChatWriter, opening: Messages) -> list[int]:
    """Returns the token ids of an opening, up to where the assistant's answer starts."""
    return list(render(writer.tokenizer, opening, add_generation_prompt=True))


def _write_batch(
    request: ChatRequest, writer: ChatWriter, openings: list[Messages] | None
) -> Mapping[str, Any]:
    """Generates an answer to each opening. If ``openings`` is ``None``, generates openings first.

    Returns:
        - ``conversations``: The messages of each finished conversation.
        - ``tokens``: Number of tokens in the turns that the teacher finished.
        - ``unfinished``: Number of turns that have no end or no text.
    """
    tokens = unfinished = 0
    if openings is None:
        prefixes = [_user_prefix(writer)] * request.batch_size()
        # The user's turn gets at most half of the sequence, and the answer gets the remainder.
        turns = _write_turns(writer, prefixes, request.seq_length // 2)
        openings = [[{"role": "user", "content": text}] for text, _ in turns if text]
        tokens = sum(length for _, length in turns)
        unfinished = len(turns) - len(openings)
    prompts = [_prompt_tokens(writer, opening) for opening in openings]
    # ``ChatTokenizer`` adds 1 token after a conversation.
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
    """Returns the chat template's tokens before a user's message.

    The teacher continues them with a user's message, as in Magpie, arXiv:2406.08464.
    """
    turn = [{"role": "user", "content": BLANK}]
    rendered = str(render(writer.tokenizer, turn, tokenize=False))
    encoded = writer.tokenizer(rendered.partition(BLANK)[0], add_special_tokens=False)
    # Generation needs at least one token, but a template may have nothing before the message.
    return list(encoded["input_ids"]) or [int(writer.tokenizer.eos_token_id)]


def _write_turns(
    writer: ChatWriter, prompts: list[list[int]], new_tokens: int
) -> list[tuple[str, int]]:
    """Generates a turn of at most ``new_tokens`` tokens after each prompt.

    Returns:
        Text and number of tokens of each turn; ``("", 0)`` if the turn has no end or no text.
    """
    if not prompts or new_tokens < 1:
        return [("", 0)] * len(prompts)
    end = int(writer.tokenizer.eos_token_id)
    turns = []
    for row in _generate(writer, prompts, new_tokens):
        ids = row[: row.index(end)] if end in row else []
        decoded = writer.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        text = str(decoded).strip()
        turns.append((text, len(ids) if text else 0))
    return turns


@torch.no_grad()
def _generate(writer: ChatWriter, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Samples a continuation of each prompt at temperature 1: at most ``new_tokens`` tokens.

    Shorter continuations are padded after the end-of-turn token.
    """
    # Padding is masked, so any token works. But transformers warns if a prompt ends with the
    # padding token. So the padding token is the smallest id that ends no prompt.
    last_tokens = {prompt[-1] for prompt in prompts}
    pad = next(token for token in count() if token not in last_tokens)
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    device = writer.model.device
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens,
        eos_token_id=writer.tokenizer.eos_token_id, pad_token_id=pad,
    )  # fmt: skip
    output: Tensor = writer.model.generate(  # type: ignore[operator]
        torch.tensor(rows, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=settings,
        # Otherwise, the model's generation_config.json would add settings to those above.
        use_model_defaults=False,
    )
    continuations: list[list[int]] = output[:, longest:].tolist()
    return continuations
