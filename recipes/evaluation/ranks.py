"""Exchanges Python objects between the ranks of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from recipes.core.stage import rank, world_size

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Returns the objects of all ranks, in the order of the ranks, on every rank."""
    by_rank = [value] * world_size()  # placeholders, overwritten if there are several ranks
    if world_size() > 1:
        torch.distributed.all_gather_object(by_rank, value)
    return by_rank


def broadcast(value: T) -> T:
    """Returns rank 0's object on every rank."""
    values = [value]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Runs the block on rank 0 first, and then on all other ranks at the same time."""
    if rank() != 0:
        broadcast(None)  # waits for rank 0 to call ``broadcast`` below, after its block
    yield
    if rank() == 0:
        broadcast(None)
