"""Conversations as tokens: by the model's own template, each whole in a window, answers marked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from recipes.core.errors import RecipeError
from recipes.data.tokenizer import Encoded

ANSWERS = "assistant"
"""The role whose words are learnt."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a template has around an answer if it says itself where answers are."""
NO_ANSWER, TEMPLATE, NO_PREFIX, NAMES_MARK, TOO_LONG = (
    "no answer",
    "refused by the template",
    "answers not found",
    "names a mark of the template",
    "too long",
)
"""Why a conversation is left out: ``NO_PREFIX`` where what comes before an answer is rendered in
another way as soon as the answer is there, so that nobody can say which tokens are the answer's."""


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with a chat template, and the windows that conversations must fit in."""

    folder: Path
    """A Hugging Face model's, or a NeMo checkpoint's."""
    end: int
    """Token after every conversation, which also fills a window."""
    seq_length: int

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def require_template(self) -> None:
        """Refuses a model that was never told what a conversation is.

        Raises:
            RecipeError: Its tokenizer has no chat template.
        """
        if self._tokenizer.chat_template is None:
            raise RecipeError(
                f"the tokenizer in {self.folder} has no chat template.",
                "use an instruct model, or train on plain text: data.format=text",
            )

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Tokens of each conversation, given as the JSON of its messages."""
        return [self._encoded(json.loads(text)) for text in texts]

    def _encoded(self, messages: list[dict[str, Any]]) -> Encoded:
        from jinja2 import TemplateError

        if not any(message["role"] == ANSWERS for message in messages):
            return Encoded.without(NO_ANSWER)
        marks = self._tokenizer.all_special_tokens
        if any(mark in message["content"] for message in messages for mark in marks):
            return Encoded.without(NAMES_MARK)
        try:
            found = self._marked(messages)
        except TemplateError:
            return Encoded.without(TEMPLATE)
        if found is None:
            return Encoded.without(NO_PREFIX)
        ids, learnt = np.append(found[0], self.end), np.append(found[1], False)
        learnt[0] = False  # nothing comes before it
        if not learnt.any():
            return Encoded.without(NO_ANSWER)
        return self._fitted(Encoded(ids.astype(np.int32), learnt))

    def _fitted(self, whole: Encoded) -> Encoded:
        """A conversation that is too long ends after the last answer that a window has room for."""
        if len(whole.ids) <= self.seq_length:
            return whole
        assert whole.learnt is not None
        last_of_answer = whole.learnt[:-1] & ~whole.learnt[1:]
        stops = np.flatnonzero(last_of_answer[: self.seq_length - 1]) + 1
        if not len(stops):
            return Encoded.without(TOO_LONG)
        ids = np.append(whole.ids[: stops[-1]], np.int32(self.end))
        return Encoded(ids, np.append(whole.learnt[: stops[-1]], False), cut=True)

    def _marked(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]] | None:
        """All tokens, and which of them an assistant says; ``None`` where that cannot be told."""
        if _MARKS.search(self._tokenizer.get_chat_template()):
            found = self._tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            return found["input_ids"], [bool(said) for said in found["assistant_masks"]]
        ids = self._rendered(messages)
        learnt = [False] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] != ANSWERS:
                continue
            if number == 0:  # a template renders no prompt of nothing
                return None
            before = self._rendered(messages[:number], add_generation_prompt=True)
            after = self._rendered(messages[: number + 1])
            start, stop = len(before), len(after)
            if start > stop or ids[:start] != before or ids[:stop] != after:
                return None
            stop = self._turn_end(ids, start, stop)
            learnt[start:stop] = [True] * (stop - start)
        return ids, learnt

    def _rendered(self, messages: list[dict[str, Any]], **settings: bool) -> list[int]:
        found: list[int] = self._tokenizer.apply_chat_template(messages, **settings)
        return found

    def _turn_end(self, ids: list[int], start: int, stop: int) -> int:
        """A model stops at the end of its turn, so that line breaks behind it are not its own."""
        ends = [n for n in range(start, stop) if ids[n] == self._tokenizer.eos_token_id]
        return ends[-1] + 1 if ends else stop


def pack(
    conversations: Sequence[Encoded], position: int, seq_length: int, end: int
) -> Iterator[Encoded]:
    """Puts conversations in such an order that none runs over the end of a window.

    The longest go first, each into the first window that has room. What a window has left is filled
    in front of the conversation that begins the next one.

    Args:
        conversations: None of them longer than a window.
        position: Tokens that are there already; windows begin at multiples of ``seq_length``.
        seq_length: Tokens a window.
        end: What to fill with; nothing is learnt of it.
    """
    windows: list[list[Encoded]] = [[]]
    rooms = [-position % seq_length]
    for each in sorted(conversations, key=lambda one: -len(one.ids)):
        fits = next((n for n, room in enumerate(rooms) if len(each.ids) <= room), len(rooms))
        if fits == len(rooms):
            windows.append([])
            rooms.append(seq_length)
        windows[fits].append(each)
        rooms[fits] -= len(each.ids)
    fill = 0
    for window, room in zip(windows, rooms, strict=True):
        for each in window:
            yield _behind(each, fill, end)
            fill = 0
        fill += room


def _behind(one: Encoded, fill: int, end: int) -> Encoded:
    if not fill:
        return one
    assert one.learnt is not None
    ids = np.concatenate([np.full(fill, end, np.int32), one.ids])
    return replace(one, ids=ids, learnt=np.concatenate([np.zeros(fill, bool), one.learnt]))
