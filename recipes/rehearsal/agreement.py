"""Compares the communication of ranks that were rehearsed, that is, run alone on fake tensors.

Each rank records its calls by channel. A channel is a process group, or one direction between two
ranks. All ranks of a channel must make the same calls in the same order, or a real job would hang.
Does not import torch.
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

    operation: str
    """Name, shapes, types and root rank; must be equal on all ranks of the channel."""
    site: str
    """The innermost callers, as ``FILE:LINE < FILE:LINE``."""


@dataclass(frozen=True)
class Channel:
    """Calls of one rank in a process group, or in one direction between this and another rank."""

    name: str
    ranks: list[int]
    """Members of the process group, or source and destination of the messages."""
    calls: list[Call] = field(default_factory=list)


def distinct_ranks(world: int, tensor: int, context: int, pipeline: int, expert: int) -> list[int]:
    """Returns the ranks to rehearse; every other rank does the same as one of these.

    These are the ranks with each combination of tensor, context, expert and pipeline index in the
    first data-parallel replica, one rank of the last replica, and the last rank. Ranks that differ
    only in their data-parallel index run the same code on different text, except that the first and
    the last rank often do more. So they are compared with ranks of other replicas.

    Megatron numbers ranks with the tensor index fastest, then context, data and pipeline. Expert
    groups span context and data indices.

    Args:
        world: Number of ranks.
        tensor: Tensor-parallel size.
        context: Context-parallel size.
        pipeline: Pipeline-parallel size.
        expert: Expert-parallel size.
    """
    stage_size, replica_size = world // pipeline, tensor * math.lcm(context, expert)
    starts = [stage * stage_size for stage in range(pipeline)]  # first ranks of pipeline stages
    in_last = {stage_size - replica_size, world - 1} if stage_size > replica_size else set()
    return sorted({s + rank for s in starts for rank in range(replica_size)} | in_last)


def differences(channels: Mapping[int, Sequence[Channel]]) -> Iterator[str]:
    """Yields, for each channel, the first difference between the calls of the channel's ranks.

    Args:
        channels: The channels of each rehearsed rank.
    """
    by_name: dict[str, dict[int, Channel]] = {}
    for rank, rank_channels in channels.items():
        for channel in rank_channels:
            by_name.setdefault(channel.name, {})[rank] = channel
    for name, by_rank in by_name.items():
        members = {rank for channel in by_rank.values() for rank in channel.ranks}
        calls = {  # a member that does not have the channel made no call
            rank: by_rank[rank].calls if rank in by_rank else []
            for rank in sorted(members & channels.keys())
        }
        yield from _first_difference(name, calls)


def _first_difference(name: str, calls: Mapping[int, Sequence[Call]]) -> Iterator[str]:
    """Yields the first difference between the calls of the first rank and of any other rank."""
    first_rank, *ranks = calls
    expected = calls[first_rank]
    for rank in ranks:
        actual = calls[rank]
        if [call.operation for call in expected] == [call.operation for call in actual]:
            continue
        # Also compares call sites: if a rank makes only one of two equal calls in a row, the sites
        # show which call is missing.
        pairs, shorter = zip(expected, actual, strict=False), min(len(expected), len(actual))
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
        yield (
            f"call {position + 1} in {_shorten(name)} differs:\n"
            f"  rank {first_rank}: {_describe(expected, position)}\n"
            f"  rank {rank}: {_describe(actual, position)}"
        )
        return


def _describe(calls: Sequence[Call], position: int) -> str:
    if position < len(calls):
        return f"{_shorten(calls[position].operation)}, at {calls[position].site}"
    return f"none; the last is at {calls[-1].site}" if calls else "none"


def _shorten(text: str) -> str:
    """Truncates a text, such as a name with a long list of ranks."""
    return textwrap.shorten(text, 120, placeholder=" …")
