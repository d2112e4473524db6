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
"""Jinja tag with which some templates mark the start of an answer."""
NO_ANSWER, TEMPLATE_ERROR, ANSWERS_NOT_FOUND, SPECIAL_TOKEN, TOO_LONG = (
    "no answer",
    "refused by the template",
    "answers not found",
    "contains a special token",
    "too long",
)
"""Reasons to leave a conversation out. ``ANSWERS_NOT_FOUND``: no answer's tokens can be identified,
because the conversation starts with an answer, or because the template renders the turns before an
answer differently once the answer is there."""


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with a chat template, for conversations of at most ``seq_length`` tokens."""

    folder: Path
    """Folder of a Hugging Face model or a NeMo checkpoint."""
    end: int
    """Token after every conversation, also used as padding."""
    seq_length: int

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    @cached_property
    def _special_tokens(self) -> set[str]:
        # ``all_special_tokens`` lacks tokens that are special, but are not named in the config.
        added = self._tokenizer.added_tokens_decoder.values()
        named: list[str] = self._tokenizer.all_special_tokens
        return {*named, *(token.content for token in added if token.special)}

    def require_template(self) -> None:
        """Raises ``RecipeError`` if the tokenizer has no chat template."""
        if self._tokenizer.chat_template is None:
            raise RecipeError(
                f"the tokenizer in {self.folder} has no chat template.",
                "use an instruct model, or train on plain text: data.format=text",
            )

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Tokenizes conversations; each text is the JSON of a conversation's messages."""
        return [self._encode_conversation(json.loads(text)) for text in texts]

    def _encode_conversation(self, messages: list[dict[str, Any]]) -> Encoded:
        from jinja2 import TemplateError

        if not any(message["role"] == ASSISTANT for message in messages):
            return Encoded.left_out_because(NO_ANSWER)
        contents = [message["content"] for message in messages]
        if any(token in content for content in contents for token in self._special_tokens):
            return Encoded.left_out_because(SPECIAL_TOKEN)
        try:
            tokens_and_mask = self._tokens_and_mask(messages)
        except TemplateError:
            return Encoded.left_out_because(TEMPLATE_ERROR)
        if tokens_and_mask is None:
            return Encoded.left_out_because(ANSWERS_NOT_FOUND)
        ids = np.append(tokens_and_mask[0], self.end)
        loss_mask = np.append(tokens_and_mask[1], False)
        loss_mask[0] = False  # the first token has no context
        if not loss_mask.any():
            return Encoded.left_out_because(NO_ANSWER)
        return self._truncate(ids.astype(np.int32), loss_mask)

    def _truncate(self, ids: np.ndarray, loss_mask: np.ndarray) -> Encoded:
        """Truncates a conversation that is too long, after the last answer that fits."""
        if len(ids) <= self.seq_length:
            return Encoded(ids, loss_mask)
        is_last_of_answer = loss_mask[:-1] & ~loss_mask[1:]
        # One position of the sequence is for ``end``.
        stops = np.flatnonzero(is_last_of_answer[: self.seq_length - 1]) + 1
        if not len(stops):
            return Encoded.left_out_because(TOO_LONG)
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
            prompt_ids = render(messages[:number], add_generation_prompt=True)
            answered_ids = render(messages[: number + 1])
            start, stop = len(prompt_ids), len(answered_ids)
            if start > stop or ids[:start] != prompt_ids or ids[:stop] != answered_ids:
                # The model never writes this answer like this. For example, Qwen3's template
                # leaves the reasoning out of earlier answers.
                continue
            # Text after the last end-of-turn token, such as a line break, is not in the answer.
            ends = [n for n in range(start, stop) if ids[n] == self._tokenizer.eos_token_id]
            stop = ends[-1] + 1 if ends else stop
            loss_mask[start:stop] = [True] * (stop - start)
        return (ids, loss_mask) if any(loss_mask) else None


def pack(
    conversations: Sequence[Encoded], written_tokens: int, seq_length: int, end: int
) -> Iterator[Encoded]:
    """Orders and pads conversations so that each lies within one sequence (first-fit decreasing).

    The padding of a sequence is added to the start of the next sequence's first conversation. So
    the last sequence is not padded, and the conversations of a later call may fill it.

    Args:
        conversations: Tokenized conversations, each of at most ``seq_length`` tokens.
        written_tokens: Tokens already in the split; sequences start at multiples of ``seq_length``.
        seq_length: Tokens of a sequence.
        end: Padding token, excluded from the loss.
    """
    # The first sequence is the last one of the split, which may have free tokens.
    sequences: list[list[Encoded]] = [[]]
    free = [-written_tokens % seq_length]  # free tokens of each sequence
    for conversation in sorted(conversations, key=lambda item: -len(item.ids)):
        size = len(conversation.ids)
        target = next((n for n, tokens in enumerate(free) if size <= tokens), len(free))
        if target == len(free):
            sequences.append([])
            free.append(seq_length)
        sequences[target].append(conversation)
        free[target] -= size
    padding = 0
    for sequence, remainder in zip(sequences, free, strict=True):
        for conversation in sequence:
            assert conversation.loss_mask is not None
            ids = np.concatenate([np.full(padding, end, np.int32), conversation.ids])
            loss_mask = np.concatenate([np.zeros(padding, bool), conversation.loss_mask])
            yield replace(conversation, ids=ids, loss_mask=loss_mask)
            padding = 0
        padding += remainder
