"""Reference of the distillation (KD) losses on logits, computed by their definition."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.distillation.losses import LogitsLoss


def loss_by_definition(student: Tensor, teacher: Tensor, loss: LogitsLoss) -> Tensor:
    """Computes the KD loss per token [n] of logits [n, vocabulary]; see ``LogitsLoss``."""
    p = (teacher / loss.temperature).softmax(-1)
    q = (student / loss.temperature).softmax(-1)
    if loss.top_k not in (None, teacher.shape[-1]):  # with the whole vocabulary the tail is empty
        top_ids = teacher.topk(loss.top_k).indices
        is_tail = torch.ones_like(teacher).scatter(1, top_ids, 0)  # 1 for all other tokens

        def merge_tail(probabilities: Tensor) -> Tensor:  # [n, top_k + 1]
            tail = (probabilities * is_tail).sum(-1, keepdim=True)
            return torch.cat([probabilities.gather(1, top_ids), tail], 1)

        p, q = merge_tail(p), merge_tail(q)
    m = loss.beta * p + (1 - loss.beta) * q  # the mixture of the Jensen-Shannon divergence
    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: loss.beta * kl(p, m) + (1 - loss.beta) * kl(q, m),
    }[loss.divergence]()
    return loss.temperature**2 * value


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Computes KL(p ‖ q) of each row of probabilities."""
    return (p * (p / q).log()).sum(-1)
