"""Tokenizes conversations with the model's chat template, masks the loss, and packs sequences."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from recipes.core.errors import RecipeError
from recipes.data.corpus import LEFT_OUT
from recipes.data.tokenizer import Encoded

ASSISTANT = "assistant"
"""Role of the messages whose tokens are in the loss."""
DATE = datetime(2024, 7, 26, tzinfo=UTC)
"""Date for templates that write today's date, so that prepared text does not depend on the day. It
is the default of Llama 3.1's template."""
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""``{% generation %}``, the Jinja tag with which some templates mark the start of an answer."""

# Reasons to leave a conversation out. They name the counts in reports.
NO_ANSWER = "no answer"
NO_QUESTION = "no question"
"""The user's first message has no letter or digit. Some data sets have ``-`` in place of questions
that are stored elsewhere."""
TEMPLATE_ERROR = "refused by the template"
ANSWERS_NOT_FOUND = "answers not found"
"""The answers' tokens cannot be identified. Either the conversation starts with an answer, or the
template renders the turns before each answer differently if the answer follows."""
SPECIAL_TOKEN = "contains a special token"
TOO_LONG = "too long"
"""The first answer does not fit in a sequence of ``seq_length`` tokens."""


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with a chat template, for conversations of at most ``seq_length`` tokens."""

    folder: Path
    """Folder of a Hugging Face model or a NeMo checkpoint."""
    end: int
    """Id of the token after every conversation, also used as padding."""
    seq_length: int

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    @cached_property
    def _special_tokens(self) -> set[str]:
        # ``all_special_tokens`` has only the special tokens that the tokenizer's config names, such
        # as ``eos_token``.
        named_tokens: list[str] = self._tokenizer.all_special_tokens
        added_tokens = self._tokenizer.added_tokens_decoder.values()
        return {*named_tokens, *(token.content for token in added_tokens if token.special)}

    def require_template(self) -> None:
        """Raises ``RecipeError`` if the tokenizer has no chat template."""
        if self._tokenizer.chat_template is None:
            raise RecipeError(
                f"the tokenizer in {self.folder} has no chat template.",
                "use an instruct model, or train on plain text: data.format=text",
            )

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Returns one tokenized conversation per text.

        A text is the JSON of a conversation's messages, or the JSON ``{LEFT_OUT: reason}`` if the
        conversation is left out.
        """
        return [self._encode_content(json.loads(text)) for text in texts]

    def _encode_content(self, messages: Any) -> Encoded:
        from jinja2 import TemplateError

        if isinstance(messages, dict):  # ``{LEFT_OUT: reason}``
            return Encoded.left_out_because(messages[LEFT_OUT])
        if all(message["role"] != ASSISTANT or _is_blank(message) for message in messages):
            return Encoded.left_out_because(NO_ANSWER)
        questions = [message["content"] for message in messages if message["role"] == "user"]
        if questions and not any(map(str.isalnum, questions[0])):
            return Encoded.left_out_because(NO_QUESTION)
        # A template may render every text of a message, such as ``reasoning_content``. If a text
        # has the name of a special token, the tokenizer would encode the name as that token.
        values = (value for message in messages for value in message.values())
        texts = [value for value in values if isinstance(value, str)]
        if any(token in text for text in texts for token in self._special_tokens):
            return Encoded.left_out_because(SPECIAL_TOKEN)
        try:
            tokens_and_mask = self._tokens_and_mask(_with_stripped_answers(messages))
        except TemplateError:
            return Encoded.left_out_because(TEMPLATE_ERROR)
        if tokens_and_mask is None:
            return Encoded.left_out_because(ANSWERS_NOT_FOUND)
        token_ids, is_in_loss = tokens_and_mask
        ids = np.append(token_ids, self.end)
        loss_mask = np.append(is_in_loss, False)  # ``end`` is not part of an answer
        loss_mask[0] = False  # the first token has no context
        if not loss_mask.any():  # the template renders no answer
            return Encoded.left_out_because(NO_ANSWER)
        return self._truncate(ids.astype(np.int32), loss_mask)

    def _truncate(self, ids: np.ndarray, loss_mask: np.ndarray) -> Encoded:
        """Truncates a conversation that is too long, after the last answer that fits in a sequence.

        ``ids`` is int32 [n], including ``end``, and ``loss_mask`` bool [n].
        """
        if len(ids) <= self.seq_length:
            return Encoded(ids, loss_mask)
        is_last_of_answer = loss_mask[:-1] & ~loss_mask[1:]
        # The last position of the sequence is reserved for ``end``.
        answer_stops = np.flatnonzero(is_last_of_answer[: self.seq_length - 1]) + 1
        if not len(answer_stops):
            return Encoded.left_out_because(TOO_LONG)
        stop = answer_stops[-1]
        ids = np.append(ids[:stop], np.int32(self.end))
        return Encoded(ids, np.append(loss_mask[:stop], False), shortened=True)

    def _tokens_and_mask(
        self, messages: list[dict[str, Any]]
    ) -> tuple[list[int], list[bool]] | None:
        """Returns token ids and loss mask, without ``end``; ``None`` for ``ANSWERS_NOT_FOUND``."""
        if _GENERATION_TAG.search(self._tokenizer.get_chat_template()):
            return self._tagged_tokens_and_mask(messages)
        if messages[0]["role"] == ASSISTANT:  # templates cannot render an empty prompt
            return None
        ids = render(self._tokenizer, messages)
        loss_mask = [False] * len(ids)
        for number, message in enumerate(messages):
            # A blank answer is not in the loss: a student would learn to end its turn at once.
            if message["role"] != ASSISTANT or _is_blank(message):
                continue
            span = self._answer_span(messages, number, ids)
            if span is None:
                # For example, Qwen3's template removes the reasoning from earlier answers. A model
                # never generates an answer without its reasoning, so it is not in the loss.
                continue
            start, stop = span
            # Tokens after the last ``eos_token``, such as a line break, are not in the answer.
            eos = self._tokenizer.eos_token_id
            eos_positions = [n for n in range(start, stop) if ids[n] == eos]
            stop = eos_positions[-1] + 1 if eos_positions else stop
            loss_mask[start:stop] = [True] * (stop - start)
        return (ids, loss_mask) if any(loss_mask) else None

    def _tagged_tokens_and_mask(
        self, messages: list[dict[str, Any]]
    ) -> tuple[list[int], list[bool]] | None:
        """Reads the loss mask from the template's tags; ``None`` if a blank answer is not found."""
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        output = render(self._tokenizer, messages, **options)
        ids, loss_mask = output["input_ids"], [bool(mask) for mask in output["assistant_masks"]]
        for number, message in enumerate(messages):
            if message["role"] == ASSISTANT and _is_blank(message):
                # Removes the blank answer from the mask. Templates cannot render an empty prompt.
                span = self._answer_span(messages, number, ids) if number else None
                if span is None:
                    return None
                start, stop = span
                loss_mask[start:stop] = [False] * (stop - start)
        return ids, loss_mask

    def _answer_span(
        self, messages: list[dict[str, Any]], number: int, ids: list[int]
    ) -> tuple[int, int] | None:
        """Returns where the answer ``messages[number]`` starts and stops in the tokens ``ids``.

        Returns ``None`` if the template renders the answer, or the turns before it, differently
        when later turns follow.
        """
        prompt_ids = render(self._tokenizer, messages[:number], add_generation_prompt=True)
        answered_ids = render(self._tokenizer, messages[: number + 1])
        start, stop = len(prompt_ids), len(answered_ids)
        if start > stop or ids[:start] != prompt_ids or ids[:stop] != answered_ids:
            return None
        return start, stop


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: bool) -> Any:
    """Tokenizes messages with the chat template; templates that ask for the date get ``DATE``."""
    return tokenizer.apply_chat_template(messages, strftime_now=DATE.strftime, **options)


def _with_stripped_answers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages, without spaces and line breaks around answers.

    Otherwise, a space before an answer could become one token with the template's last characters.
    """
    return [
        m | {"content": m["content"].strip()} if m["role"] == ASSISTANT else m for m in messages
    ]


def _is_blank(message: dict[str, Any]) -> bool:
    """Returns whether a message has neither text nor reasoning."""
    texts = (message["content"], message.get("reasoning_content", ""))
    return not any(str(text).strip() for text in texts)


def pack(
    conversations: Sequence[Encoded], written_tokens: int, seq_length: int, end: int
) -> Iterator[Encoded]:
    """Yields conversations, ordered and padded so that each lies within one sequence.

    Sequences are filled by first-fit decreasing bin packing. The padding at the end of a sequence
    is prepended to the next conversation. So the last sequence is not padded, and a later call may
    fill it.

    A conversation has at most ``seq_length`` tokens. The split already has ``written_tokens``, and
    its sequences start at multiples of ``seq_length``. ``end`` is the id of the padding token,
    which is excluded from the loss.
    """
    # The first sequence is the unfinished one at the end of the split. It has the tokens up to the
    # next multiple of ``seq_length``, or none.
    sequences: list[list[Encoded]] = [[]]
    free_tokens = [-written_tokens % seq_length]  # by sequence
    for conversation in sorted(conversations, key=lambda item: -len(item.ids)):
        size = len(conversation.ids)
        # The first sequence with enough free tokens, or else a new one.
        target = next((n for n, free in enumerate(free_tokens) if size <= free), len(sequences))
        if target == len(sequences):
            sequences.append([])
            free_tokens.append(seq_length)
        sequences[target].append(conversation)
        free_tokens[target] -= size
    padding = 0  # tokens to prepend to the next conversation
    for sequence, unused_tokens in zip(sequences, free_tokens, strict=True):
        for conversation in sequence:
            assert conversation.loss_mask is not None
            ids = np.concatenate([np.full(padding, end, np.int32), conversation.ids])
            loss_mask = np.concatenate([np.zeros(padding, bool), conversation.loss_mask])
            yield replace(conversation, ids=ids, loss_mask=loss_mask)
            padding = 0
        padding += unused_tokens
