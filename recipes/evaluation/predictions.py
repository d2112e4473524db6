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

if TYPE_CHECKING:  # token_sequences imports Megatron, which TensorRT-LLM's image does not have
    from recipes.data.token_sequences import TextSequences

TEACHER = "teacher"
CHANCE_FRACTION = 0.8
"""A teacher is refused if its loss is not below this fraction of the loss of a uniform guess.

A uniform guess has a loss of ln(vocabulary). A pretrained model usually has less than half of it.
"""


@dataclass(frozen=True)
class Predictor:
    """A model as two functions: all layers up to the last hidden states, and the head."""

    run_layers: Callable[[Tensor], Tensor]
    """Maps tokens [batch, sequence] to hidden states [batch, sequence, width]."""
    head: Callable[[Tensor], Tensor]
    """Maps hidden states [n, width] to logits [n, vocabulary]."""
    vocabulary: int
    """Number of logits per position."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Predictor:
        """Splits a transformers model, which stays on its device."""
        weight = model.lm_head.weight.detach()

        def run_layers(tokens: Tensor) -> Tensor:
            output = model.model(tokens.to(weight.device), use_cache=False)
            hidden: Tensor = output.last_hidden_state
            return hidden

        return cls(run_layers, float32_head(weight), len(weight))


def float32_head(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns a head that maps hidden states [n, width] to logits [n, vocabulary] in float32.

    Between 16 and 32, bfloat16 has only multiples of 0.125. So in bfloat16, several likely tokens
    would get equal logits.
    """
    # The function keeps only the float32 copy, so that the model's own weight can be freed.
    dtype, float32_weight = weight.dtype, weight.float()

    def head(states: Tensor) -> Tensor:
        with float32_matmul_of(dtype):
            return functional.linear(states.to(float32_weight), float32_weight)

    return head


@dataclass(frozen=True)
class FinalStates:
    """The last hidden states of a model on a text, and the model's head."""

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
    """Runs a model on a text, ``micro_batch_size`` sequences at a time.

    ``progress`` receives the number of sequences that are done.
    """
    states = []
    for start in range(0, len(text), micro_batch_size):
        batch = text[start : start + micro_batch_size]
        # The last position has no next token. A variable would keep the tensor on the GPU too long.
        states.append(model.run_layers(batch.tokens)[:, :-1].cpu()[batch.prediction_mask])
        progress(start + len(batch))
    return FinalStates(torch.cat(states), model.head, model.vocabulary)


@dataclass(frozen=True)
class PredictionMetrics:
    """A model's metrics, float32 [predictions]: a value per next token that counts in the loss."""

    losses: Tensor
    """Loss of the next token, in nats."""
    divergences: Tensor
    """KL divergence KL(teacher || model), in nats."""
    agreements: Tensor
    """1 if model and teacher have the same most likely token, else 0."""


@torch.no_grad()
def compare_predictions(
    models: Mapping[str, FinalStates], text: TextSequences
) -> dict[str, PredictionMetrics]:
    """Compares each model with the teacher, on the text that ``compute_states`` ran on.

    Args:
        models: Hidden states on ``text``, by role. The role ``TEACHER`` is required.
        text: The sequences.

    Returns:
        The metrics of each role. The teacher's KL is 0.
    """
    metrics_of: dict[str, list[Tensor]] = {role: [] for role in models}
    teacher, all_targets = models[TEACHER], text.targets
    for rows in chunks(len(all_targets), teacher.vocabulary):
        teacher_scores = log_probabilities(teacher, rows)
        targets = all_targets[rows, None].to(teacher_scores.device)
        teacher_tokens = teacher_scores.argmax(-1)
        for role, model in models.items():
            scores = teacher_scores if role == TEACHER else log_probabilities(model, rows)
            losses = -scores.gather(-1, targets).squeeze(-1)
            agreements = (scores.argmax(-1) == teacher_tokens).float()
            kl = torch.zeros_like(losses)
            if role != TEACHER:
                # Σ p·(log p - log q), with p of the teacher and q of the model. ``mul_`` overwrites
                # the difference, which nothing else uses, to save memory.
                kl = (teacher_scores - scores).mul_(teacher_scores.exp()).sum(-1)
            # One column per field of ``PredictionMetrics``, in the order of its fields.
            metrics_of[role].append(torch.stack([losses, kl, agreements], dim=1).cpu())
    return {
        role: PredictionMetrics(*torch.cat(metrics).unbind(1))
        for role, metrics in metrics_of.items()
    }


def chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Yields ranges of positions whose float32 logits take at most ``LOGITS_BYTES``."""
    step = max(1, LOGITS_BYTES // (4 * vocabulary))  # a float32 logit takes 4 bytes
    return (slice(start, start + step) for start in range(0, positions, step))


def log_probabilities(model: FinalStates, rows: slice) -> Tensor:
    """Returns log-probabilities of the next token at positions ``rows``, [n, vocabulary]."""
    return torch.log_softmax(model.head(model.states[rows]).float(), dim=-1)


def require_better_than_chance(loss: float, vocabulary: int, fix: str = "") -> None:
    """Refuses a teacher that predicts text no better than chance, such as one with random weights.

    Args:
        loss: The teacher's next-token loss, in nats.
        vocabulary: Size of the teacher's vocabulary.
        fix: Text to append to the error's fix.

    Raises:
        RecipeError: The loss is near or above the loss of a uniform guess, or NaN.
    """
    chance = math.log(vocabulary)
    if not loss < CHANCE_FRACTION * chance:  # also catches NaN
        raise RecipeError(
            f"the teacher's loss is {loss:.2f}, hardly below chance ({chance:.2f}); it must be "
            f"below {CHANCE_FRACTION * chance:.2f}",
            "use text in the teacher's language, or correct weights" + fix,
        )
