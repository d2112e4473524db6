"""Mixtures of experts: how many tokens each of them gets, which only numbers tell; here all equal.

What ranks tell each other of it is checked like any message. Megatron's functions are replaced
where the size of a tensor is a sum of a mask, which has no weightless form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor


def stand_in() -> None:
    """Replaces what depends on where tokens go, for good."""
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    setattr(dispatcher, "preprocess", _evenly(dispatcher.preprocess))
    setattr(token_dispatcher, "permute", _permute)


def _evenly(count: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], np.ndarray]:
    """Numbers of tokens as the host would read them, to and from each rank and expert."""

    def preprocess(self: Any, routing_map: Tensor) -> np.ndarray:
        count(self, routing_map)
        fewest, more = divmod(self.num_out_tokens, self.num_experts)
        experts = np.arange(self.num_experts)
        tokens = fewest + (experts < more)
        mine: np.ndarray = tokens[self.local_expert_indices]
        ranks = self.tp_size * self.ep_size
        if ranks > 1:
            self.input_splits = tokens.reshape(self.ep_size, -1).sum(axis=1)
            self.output_splits = np.full(self.ep_size, mine.sum())
            self.output_splits_tp = np.full(self.tp_size, self.ep_size * mine.sum())
        self.num_global_tokens_per_local_expert = np.tile(mine, (ranks, 1))
        mine *= ranks
        return mine

    return preprocess


def _permute(
    tokens: Tensor, routing_map: Tensor, probs: Tensor, num_out_tokens: int, **settings: object
) -> tuple[Tensor, Tensor, Tensor]:
    """A row for each token and expert that it goes to, its probability, and its token's number."""
    chosen = routing_map.new_empty(num_out_tokens, dtype=torch.int64)
    likely = probs.T.contiguous().flatten().index_select(0, chosen)
    return tokens.index_select(0, chosen), likely, chosen
