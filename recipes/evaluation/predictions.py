"""What models predict where it counts, compared with a teacher a few positions at a time.

Logits are by far the largest tensor of a model that only reads: four windows of 8,192 tokens over a
vocabulary of 131,072 take 17 GB in float32, and a comparison holds several such tensors. So a model
is taken in two parts. What goes into its head is kept for a whole text, in a fraction of the space;
logits are made of it for a few positions, and are gone again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from recipes.core.precision import products_of
from recipes.data.token_windows import TextWindows
from recipes.planning.transformer import LOGITS_BYTES

TEACHER = "teacher"


@dataclass(frozen=True)
class Predictor:
    """A model in two parts."""

    states: Callable[[Tensor], Tensor]
    """Maps tokens [batch, sequence] to what the head reads [batch, sequence, width]."""
    head: Callable[[Tensor], Tensor]
    """Maps states [n, width] to logits [n, vocabulary]."""
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Predictor:
        """A transformers model."""
        weight = model.lm_head.weight.detach()

        def states(tokens: Tensor) -> Tensor:
            found: Tensor = model.model(tokens.to(weight.device), use_cache=False).last_hidden_state
            return found

        return cls(states, float32_head(weight), len(weight))


def float32_head(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Maps states [n, width] to logits [n, vocabulary], by a weight [vocabulary, width].

    They are in float32 whatever the model is in: bfloat16 logits of about 20 are 0.125 apart, so
    that many of the likeliest tokens would share their place with others.
    """
    stored, whole = weight.dtype, weight.float()

    def head(states: Tensor) -> Tensor:
        with products_of(stored):
            return functional.linear(states.to(whole), whole)

    return head


@dataclass(frozen=True)
class FinalStates:
    """The last hidden states of a model on a text, and the head that makes logits of them."""

    states: Tensor
    """Of the positions whose predictions count [predictions, width], on the CPU."""
    head: Callable[[Tensor], Tensor]
    vocabulary: int


@torch.no_grad()
def read(
    model: Predictor,
    text: TextWindows,
    micro_batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> FinalStates:
    """Runs a model over a text, ``micro_batch_size`` windows at a time."""
    found = []
    for start in range(0, len(text), micro_batch_size):
        part = text[start : start + micro_batch_size]
        found.append(model.states(part.tokens)[:, :-1].cpu()[part.counted])
        progress(start + len(part))
    return FinalStates(torch.cat(found), model.head, model.vocabulary)


@dataclass(frozen=True)
class Figures:
    """What a model's predictions come to, where they count: float32 [predictions], in order."""

    losses: Tensor
    """Of the next token, in nats."""
    divergences: Tensor
    """KL to the teacher, in nats."""
    agreements: Tensor
    """1 where the likeliest token is the teacher's."""


@torch.no_grad()
def compare(readings: Mapping[str, FinalStates], text: TextWindows) -> dict[str, Figures]:
    """Figures of each model by role, one of which is the teacher."""
    found: dict[str, list[Tensor]] = {role: [] for role in readings}
    targets, teacher = text.targets, readings[TEACHER]
    for rows in chunks(len(targets), teacher.vocabulary):
        reference = log_probabilities(teacher, rows)
        chosen = targets[rows, None].to(reference.device)
        likeliest = reference.argmax(-1)
        for role, reading in readings.items():
            scores = reference if role == TEACHER else log_probabilities(reading, rows)
            losses = -scores.gather(-1, chosen).squeeze(-1)
            agreements = (scores.argmax(-1) == likeliest).float()
            kl = torch.zeros_like(losses)
            if role != TEACHER:
                kl = (reference - scores).mul_(reference.exp()).sum(-1)
            found[role].append(torch.stack([losses, kl, agreements], dim=1).cpu())
    return {role: Figures(*torch.cat(parts).unbind(1)) for role, parts in found.items()}


def chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """So many positions at a time that their float32 logits are no more than ``LOGITS_BYTES``."""
    step = max(1, LOGITS_BYTES // (4 * vocabulary))
    return (slice(start, start + step) for start in range(0, positions, step))


def log_probabilities(reading: FinalStates, rows: slice) -> Tensor:
    """Of every next token at some positions, float32 [n, vocabulary]."""
    return torch.log_softmax(reading.head(reading.states[rows]).float(), dim=-1)
