"""Compares models' predictions with a teacher's, a few positions at a time.

Logits are by far the largest tensor of inference. For four sequences of 8,192 tokens and a
vocabulary of 131,072, they take 17 GB in float32, and a comparison needs several such tensors. So
only the last hidden states are stored for a whole text. Logits are computed from them for a few
positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from recipes.core.errors import RecipeError
from recipes.core.precision import float32_matmul_of
from recipes.planning.transformer import LOGITS_BYTES

if TYPE_CHECKING:  # the module imports Megatron, which TensorRT-LLM's image does not have
    from recipes.data.token_sequences import TextSequences

TEACHER = "teacher"
CHANCE_FRACTION = 0.8
"""A teacher whose loss is above this fraction of ln(vocabulary) is hardly better than chance."""


@dataclass(frozen=True)
class Predictor:
    """A model split into its layers and its head."""

    run_layers: Callable[[Tensor], Tensor]
    """Maps tokens [batch, sequence] to hidden states [batch, sequence, width]."""
    head: Callable[[Tensor], Tensor]
    """Maps states [n, width] to logits [n, vocabulary]."""
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Predictor:
        """Splits a transformers model."""
        weight = model.lm_head.weight.detach()

        def run_layers(tokens: Tensor) -> Tensor:
            output = model.model(tokens.to(weight.device), use_cache=False)
            hidden: Tensor = output.last_hidden_state
            return hidden

        return cls(run_layers, float32_head(weight), len(weight))


def float32_head(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns a head that maps states [n, width] to logits [n, vocabulary] in float32.

    In bfloat16, logits of about 20 are multiples of 0.125, so likely tokens would get equal logits.
    """
    # The function keeps only the float32 copy, so that the model's own weight can be freed.
    dtype, float32_weight = weight.dtype, weight.float()

    def head(states: Tensor) -> Tensor:
        with float32_matmul_of(dtype):
            return functional.linear(states.to(float32_weight), float32_weight)

    return head


@dataclass(frozen=True)
class FinalStates:
    """The last hidden states of a model on a text, and its head."""

    states: Tensor
    """Tensor [predictions, width] on the CPU: the states of all positions whose next token counts
    in the loss."""
    head: Callable[[Tensor], Tensor]
    vocabulary: int


@torch.no_grad()
def compute_states(
    model: Predictor,
    text: TextSequences,
    micro_batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> FinalStates:
    """Runs a model on a text, ``micro_batch_size`` sequences at a time."""
    states = []
    for start in range(0, len(text), micro_batch_size):
        batch = text[start : start + micro_batch_size]
        states.append(model.run_layers(batch.tokens)[:, :-1].cpu()[batch.prediction_mask])
        progress(start + len(batch))
    return FinalStates(torch.cat(states), model.head, model.vocabulary)


@dataclass(frozen=True)
class PredictionMetrics:
    """Metrics, float32 [predictions], of all positions whose next token counts in the loss."""

    losses: Tensor
    """Loss of the next token, in nats."""
    divergences: Tensor
    """KL to the teacher, in nats."""
    agreements: Tensor
    """1 if the most likely token is the teacher's, else 0."""


@torch.no_grad()
def compare_predictions(
    models: Mapping[str, FinalStates], text: TextSequences
) -> dict[str, PredictionMetrics]:
    """Compares each model with the teacher. ``models`` maps roles to models, teacher included."""
    chunks_of: dict[str, list[Tensor]] = {role: [] for role in models}
    teacher, all_targets = models[TEACHER], text.targets
    for rows in chunks(len(all_targets), teacher.vocabulary):
        teacher_scores = log_probabilities(teacher, rows)
        targets = all_targets[rows, None].to(teacher_scores.device)
        most_likely = teacher_scores.argmax(-1)
        for role, model in models.items():
            scores = teacher_scores if role == TEACHER else log_probabilities(model, rows)
            losses = -scores.gather(-1, targets).squeeze(-1)
            agreements = (scores.argmax(-1) == most_likely).float()
            kl = torch.zeros_like(losses)
            if role != TEACHER:
                # Σ p·(log p - log q); mul_ overwrites the difference, which nothing else uses.
                kl = (teacher_scores - scores).mul_(teacher_scores.exp()).sum(-1)
            chunks_of[role].append(torch.stack([losses, kl, agreements], dim=1).cpu())
    return {role: PredictionMetrics(*torch.cat(c).unbind(1)) for role, c in chunks_of.items()}


def chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Yields ranges of positions whose float32 logits take at most ``LOGITS_BYTES``."""
    step = max(1, LOGITS_BYTES // (4 * vocabulary))
    return (slice(start, start + step) for start in range(0, positions, step))


def log_probabilities(model: FinalStates, rows: slice) -> Tensor:
    """Returns log-probabilities of the next token at some positions, float32 [n, vocabulary]."""
    return torch.log_softmax(model.head(model.states[rows]).float(), dim=-1)


def require_better_than_chance(loss: float, vocabulary: int, fix: str = "") -> None:
    """Refuses a teacher that predicts text no better than chance, such as one with random weights.

    Args:
        loss: The teacher's next-token loss, in nats.
        vocabulary: Size of the teacher's vocabulary.
        fix: Text to append to the error's fix.

    Raises:
        RecipeError: The loss is near the loss of a uniform guess.
    """
    chance = math.log(vocabulary)
    if not loss < CHANCE_FRACTION * chance:  # also catches NaN
        raise RecipeError(
            f"the teacher's loss is {loss:.2f}, hardly below chance ({chance:.2f})",
            "use text in the teacher's language, or correct weights" + fix,
        )
