"""The losses on logits, computed by their definition."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.distillation.losses import LogitsLoss


def loss_by_definition(student: Tensor, teacher: Tensor, loss: LogitsLoss) -> Tensor:
    """Computes the loss per token by its definition."""
    p, q = (teacher / loss.temperature).softmax(-1), (student / loss.temperature).softmax(-1)
    if loss.top_k not in (None, teacher.shape[-1]):  # with the whole vocabulary the tail is empty
        ids = teacher.topk(loss.top_k).indices
        others = torch.ones_like(teacher).scatter(1, ids, 0)
        p, q = (
            torch.cat([x.gather(1, ids), (x * others).sum(-1, keepdim=True)], 1) for x in (p, q)
        )
    m = loss.beta * p + (1 - loss.beta) * q
    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: loss.beta * kl(p, m) + (1 - loss.beta) * kl(q, m),
    }[loss.divergence]()
    return loss.temperature**2 * value


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)
