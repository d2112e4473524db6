"""Tokenizes conversations with the model's template, marks answers, and packs sequences."""

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

ASSISTANT = "assistant"
"""Role of the messages whose tokens are in the loss."""
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Jinja tag that starts an answer, in templates that mark answers."""
NO_ANSWER, TEMPLATE, NO_PREFIX, SPECIAL_TOKEN, TOO_LONG = (
    "no answer",
    "refused by the template",
    "answers not found",
    "contains a special token",
    "too long",
)
"""Reasons to leave a conversation out. ``NO_PREFIX``: the template renders the turns before an
answer differently once the answer is there, so the answer's tokens cannot be identified."""


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with a chat template, and the length that conversations must fit in."""

    folder: Path
    """Folder of a Hugging Face model or a NeMo checkpoint."""
    end: int
    """Token after every conversation, also used as padding."""
    seq_length: int

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def require_template(self) -> None:
        """Raises ``RecipeError`` if the tokenizer has no chat template."""
        if self._tokenizer.chat_template is None:
            raise RecipeError(
                f"the tokenizer in {self.folder} has no chat template.",
                "use an instruct model, or train on plain text: data.format=text",
            )

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Tokenizes conversations; each text is the JSON of a conversation's messages."""
        return [self._encoded(json.loads(text)) for text in texts]

    def _encoded(self, messages: list[dict[str, Any]]) -> Encoded:
        from jinja2 import TemplateError

        if not any(message["role"] == ASSISTANT for message in messages):
            return Encoded.without(NO_ANSWER)
        special = self._tokenizer.all_special_tokens
        if any(token in message["content"] for message in messages for token in special):
            return Encoded.without(SPECIAL_TOKEN)
        try:
            marked = self._tokens_and_mask(messages)
        except TemplateError:
            return Encoded.without(TEMPLATE)
        if marked is None:
            return Encoded.without(NO_PREFIX)
        ids, loss_mask = np.append(marked[0], self.end), np.append(marked[1], False)
        loss_mask[0] = False  # the first token has no context
        if not loss_mask.any():
            return Encoded.without(NO_ANSWER)
        return self._cut_to_fit(ids.astype(np.int32), loss_mask)

    def _cut_to_fit(self, ids: np.ndarray, loss_mask: np.ndarray) -> Encoded:
        """Cuts a conversation that is too long after the last answer that fits."""
        if len(ids) <= self.seq_length:
            return Encoded(ids, loss_mask)
        last_of_answer = loss_mask[:-1] & ~loss_mask[1:]
        stops = np.flatnonzero(last_of_answer[: self.seq_length - 1]) + 1
        if not len(stops):
            return Encoded.without(TOO_LONG)
        ids = np.append(ids[: stops[-1]], np.int32(self.end))
        return Encoded(ids, np.append(loss_mask[: stops[-1]], False), shortened=True)

    def _tokens_and_mask(
        self, messages: list[dict[str, Any]]
    ) -> tuple[list[int], list[bool]] | None:
        """Returns ids and loss mask; ``None`` if the answers' tokens cannot be identified."""
        render = self._tokenizer.apply_chat_template
        if _GENERATION_TAG.search(self._tokenizer.get_chat_template()):
            output = render(messages, return_dict=True, return_assistant_tokens_mask=True)
            return output["input_ids"], [bool(mask) for mask in output["assistant_masks"]]
        ids = render(messages)
        loss_mask = [False] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            if number == 0:  # templates cannot render an empty prompt
                return None
            before = render(messages[:number], add_generation_prompt=True)
            after = render(messages[: number + 1])
            start, stop = len(before), len(after)
            if start > stop or ids[:start] != before or ids[:stop] != after:
                return None
            # Text after the end-of-turn token, such as a line break, is not part of the answer.
            ends = [n for n in range(start, stop) if ids[n] == self._tokenizer.eos_token_id]
            stop = ends[-1] + 1 if ends else stop
            loss_mask[start:stop] = [True] * (stop - start)
        return ids, loss_mask


def pack(
    conversations: Sequence[Encoded], position: int, seq_length: int, end: int
) -> Iterator[Encoded]:
    """Orders and pads conversations so that each lies within one sequence (first-fit decreasing).

    The padding of a sequence is put before the first conversation of the next one.

    Args:
        conversations: Tokenized conversations, each of at most ``seq_length`` tokens.
        position: Tokens already written; sequences start at multiples of ``seq_length``.
        seq_length: Tokens of a sequence.
        end: Padding token, excluded from the loss.
    """
    sequences: list[list[Encoded]] = [[]]
    free = [-position % seq_length]
    for each in sorted(conversations, key=lambda one: -len(one.ids)):
        target = next((n for n, tokens in enumerate(free) if len(each.ids) <= tokens), len(free))
        if target == len(free):
            sequences.append([])
            free.append(seq_length)
        sequences[target].append(each)
        free[target] -= len(each.ids)
    padding = 0
    for sequence, remainder in zip(sequences, free, strict=True):
        for each in sequence:
            assert each.loss_mask is not None
            ids = np.concatenate([np.full(padding, end, np.int32), each.ids])
            loss_mask = np.concatenate([np.zeros(padding, bool), each.loss_mask])
            yield replace(each, ids=ids, loss_mask=loss_mask)
            padding = 0
        padding += remainder
