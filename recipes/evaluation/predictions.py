"""Compares models' predictions with a teacher's.

Logits are by far the largest tensor of inference. For four sequences of 8,192 tokens and a
vocabulary of 131,072, they take 17 GB in float32. So only the last hidden states are stored for a
whole text. Logits are computed from the hidden states for a few positions at a time.
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
"""Role of the model with which all others are compared."""
CHANCE_FRACTION = 0.8
"""A teacher's loss must be below this fraction of ln(vocabulary), the loss of a uniform guess. A
pretrained model's loss is usually below half of ln(vocabulary)."""


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
        """Splits a transformers model. The functions run on the model's device."""
        weight = model.lm_head.weight.detach()

        def run_layers(tokens: Tensor) -> Tensor:
            output = model.model(tokens.to(weight.device), use_cache=False)
            hidden: Tensor = output.last_hidden_state
            return hidden

        return cls(run_layers, float32_head(weight), len(weight))


def float32_head(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns a head that maps hidden states [n, width] to logits [n, vocabulary] in float32.

    Between 16 and 32, bfloat16 has only multiples of 0.125. So bfloat16 would give several likely
    tokens equal logits.
    """
    # ``head`` refers only to these two, so that the weight in the model's dtype can be freed.
    dtype, float32_weight = weight.dtype, weight.float()

    def head(states: Tensor) -> Tensor:
        with float32_matmul_of(dtype):
            return functional.linear(states.to(float32_weight), float32_weight)

    return head


@dataclass(frozen=True)
class FinalStates:
    """The last hidden states of a model on a text, and the model's head."""

    states: Tensor
    """[predictions, width] on the CPU: all positions whose next token counts in the loss."""
    head: Callable[[Tensor], Tensor]
    """As in ``Predictor``."""
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
        # The last position has no next token. No variable refers to the states of all positions,
        # because it would keep them on the GPU during the next forward pass.
        states.append(model.run_layers(batch.tokens)[:, :-1].cpu()[batch.prediction_mask])
        progress(start + len(batch))
    return FinalStates(torch.cat(states), model.head, model.vocabulary)


@dataclass(frozen=True)
class PredictionMetrics:
    """A model's metrics, float32 [predictions], for each next token that counts in the loss."""

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
    """Returns the metrics of each model, by role. The teacher's KL is 0.

    ``models`` maps roles, including ``TEACHER``, to results of ``compute_states`` on ``text``.
    """
    metrics_of: dict[str, list[Tensor]] = {role: [] for role in models}
    teacher, all_targets = models[TEACHER], text.targets
    for rows in chunks(len(all_targets), teacher.vocabulary):
        teacher_log_p = log_probabilities(teacher, rows)
        targets = all_targets[rows, None].to(teacher_log_p.device)
        teacher_tokens = teacher_log_p.argmax(-1)
        for role, model in models.items():
            log_q = teacher_log_p if role == TEACHER else log_probabilities(model, rows)
            losses = -log_q.gather(-1, targets).squeeze(-1)
            agreements = (log_q.argmax(-1) == teacher_tokens).float()
            if role == TEACHER:
                kl = torch.zeros_like(losses)
            else:
                # Σ p·(log p - log q), with p of the teacher and q of the model. ``mul_`` saves
                # memory: it overwrites the difference, which nothing else uses.
                kl = (teacher_log_p - log_q).mul_(teacher_log_p.exp()).sum(-1)
            # One column per field of ``PredictionMetrics``, in the order of the fields.
            metrics_of[role].append(torch.stack([losses, kl, agreements], dim=1).cpu())
    return {
        role: PredictionMetrics(*torch.cat(metrics).unbind(1))
        for role, metrics in metrics_of.items()
    }


def chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Yields ranges of positions whose float32 logits take at most ``LOGITS_BYTES``."""
    step = max(1, LOGITS_BYTES // (4 * vocabulary))  # a float32 logit takes 4 bytes
    for start in range(0, positions, step):
        yield slice(start, start + step)


def log_probabilities(model: FinalStates, rows: slice) -> Tensor:
    """Returns log-probabilities of the next token at positions ``rows``, [n, vocabulary]."""
    return torch.log_softmax(model.head(model.states[rows]).float(), dim=-1)


def require_better_than_chance(loss: float, vocabulary: int, fix: str = "") -> None:
    """Refuses a teacher that predicts text no better than chance, such as one with random weights.

    Raises ``RecipeError`` if the next-token ``loss``, in nats, is not below ``CHANCE_FRACTION`` of
    a uniform guess's loss. ``fix`` is appended to the fix in the error.
    """
    chance = math.log(vocabulary)
    limit = CHANCE_FRACTION * chance
    if not loss < limit:  # also catches NaN
        raise RecipeError(
            f"the teacher's loss is {loss:.2f}, hardly below chance ({chance:.2f}); it must be "
            f"below {limit:.2f}",
            "use text in the teacher's language, or correct weights" + fix,
        )
