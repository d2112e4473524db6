"""Compares the communication of rehearsed ranks: a difference is a hang on a cluster.

Each rank records its calls by channel. A channel is a process group, or one direction between two
ranks. All ranks of a channel must make the same calls in the same order. Does not import torch.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

WORLD = "the process group of all ranks"


@dataclass(frozen=True)
class Call:
    """A collective, a message between two ranks, or the creation of a process group."""

    what: str
    """Operation, shapes, types and root. It must be the same on all ranks of the channel."""
    site: str
    """The callers, innermost first, as ``FILE:LINE``."""


@dataclass(frozen=True)
class Channel:
    """Calls of one rank: in a process group, or in one direction between it and another rank."""

    name: str
    ranks: list[int]
    """Ranks that take part."""
    calls: list[Call] = field(default_factory=list)


def distinct_ranks(world: int, tensor: int, context: int, pipeline: int, expert: int) -> list[int]:
    """Returns one rank for each index in tensor, context, expert and pipeline parallel groups.

    Ranks that differ only in their data-parallel index run the same code on other text. Only the
    last of them is added, because rank 0 often does more than others. Megatron numbers ranks by
    tensor, context, data and pipeline index. An expert group spans context and data indices.
    """
    per_stage, per_block = world // pipeline, tensor * math.lcm(context, expert)
    blocks = [stage * per_stage for stage in range(pipeline)]
    last_replica = {per_stage - per_block} if per_stage > per_block else set()
    return sorted({first + rank for first in blocks for rank in range(per_block)} | last_replica)


def differences(channels: Mapping[int, Sequence[Channel]]) -> Iterator[str]:
    """Yields the first difference of each channel between the ranks that take part in it.

    Args:
        channels: The channels of each rehearsed rank.
    """
    by_name: dict[str, dict[int, Channel]] = {}
    for rank, own in channels.items():
        for channel in own:
            by_name.setdefault(channel.name, {})[rank] = channel
    for name, by_rank in by_name.items():
        members = {rank for channel in by_rank.values() for rank in channel.ranks}
        calls = {
            rank: by_rank[rank].calls if rank in by_rank else []
            for rank in sorted(members & channels.keys())
        }
        yield from _first_difference(name, calls)


def _first_difference(name: str, calls: Mapping[int, Sequence[Call]]) -> Iterator[str]:
    first, *others = calls
    for other in others:
        one, two = calls[first], calls[other]
        if [call.what for call in one] == [call.what for call in two]:
            continue
        # Of two equal calls in a row one may be missing: the callers show which.
        pairs = zip(one, two, strict=False)
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))
        yield (
            f"call {position + 1} in {_shorten(name)} differs:\n"
            f"  rank {first}: {_describe(one, position)}\n"
            f"  rank {other}: {_describe(two, position)}"
        )
        return


def _describe(calls: Sequence[Call], position: int) -> str:
    if position < len(calls):
        return f"{_shorten(calls[position].what)}, at {calls[position].site}"
    return f"none; the last is at {calls[-1].site}" if calls else "none"


def _shorten(text: str) -> str:
    """Leaves out most of a long list of ranks."""
    return textwrap.shorten(text, 120, placeholder=" …")
