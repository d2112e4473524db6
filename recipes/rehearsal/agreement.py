"""Compares the communication of rehearsed ranks. A rehearsed rank ran alone, on fake tensors.

Each rank records its calls by channel. A channel is a process group, or the messages from one rank
to another. All ranks of a channel must make the same calls in the same order, or a real job would
hang. This module does not import torch.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

WORLD = "the process group of all ranks"
"""Name of that group's channel."""


@dataclass(frozen=True)
class Call:
    """A collective, a message between two ranks, or the creation of a process group.

    The creation of a group is recorded in the channel ``WORLD``, because all ranks must create it.
    """

    operation: str
    """Name, shapes, dtypes and root rank; must be equal on all ranks of the channel."""
    site: str
    """The innermost callers, as ``FILE:LINE < FILE:LINE``; the innermost is first."""


@dataclass(frozen=True)
class Channel:
    """Calls of one rank in a process group, or its messages to or from one other rank."""

    name: str
    ranks: list[int]
    """Members of the process group, or source and destination of the messages."""
    calls: list[Call] = field(default_factory=list)
    """The rank's calls, in the order in which it made them."""


def distinct_ranks(world: int, tensor: int, context: int, pipeline: int, expert: int) -> list[int]:
    """Returns the ranks to rehearse. Every other rank runs the same code as one of them.

    These are all ranks of the first data-parallel replica, the first rank of the last replica, and
    the last rank. A replica has every combination of tensor, context, expert and pipeline index.
    Ranks that differ only in their data-parallel index run the same code on different text, except
    that the first and the last rank often do more.

    Megatron numbers ranks with the tensor index fastest, then context, data and pipeline. An expert
    group has consecutive pairs of context and data index. So a replica must have a number of pairs
    that is a multiple of both the context-parallel and the expert-parallel size.

    Args:
        world: Number of ranks.
        tensor: Tensor-parallel size.
        context: Context-parallel size.
        pipeline: Pipeline-parallel size.
        expert: Expert-parallel size.
    """
    stage_size = world // pipeline
    replica_size = tensor * math.lcm(context, expert)  # ranks of a replica in a pipeline stage
    stage_starts = [stage * stage_size for stage in range(pipeline)]
    ranks = {start + offset for start in stage_starts for offset in range(replica_size)}
    if stage_size > replica_size:  # there is more than one replica
        ranks |= {stage_size - replica_size, world - 1}
    return sorted(ranks)


def differences(channels_by_rank: Mapping[int, Sequence[Channel]]) -> Iterator[str]:
    """Yields, for each channel, the first difference between the calls of the rehearsed ranks."""
    by_name: dict[str, dict[int, Channel]] = {}
    for rank, channels in channels_by_rank.items():
        for channel in channels:
            by_name.setdefault(channel.name, {})[rank] = channel
    for name, by_rank in by_name.items():
        members = {rank for channel in by_rank.values() for rank in channel.ranks}
        calls_by_rank = {  # a member that does not have the channel made no call
            rank: by_rank[rank].calls if rank in by_rank else []
            for rank in sorted(members & channels_by_rank.keys())
        }
        yield from _first_difference(name, calls_by_rank)


def _first_difference(name: str, calls_by_rank: Mapping[int, Sequence[Call]]) -> Iterator[str]:
    """Yields at most one difference: between the first rank and the first rank that differs."""
    first_rank, *other_ranks = calls_by_rank
    expected = calls_by_rank[first_rank]
    for rank in other_ranks:
        actual = calls_by_rank[rank]
        if [call.operation for call in expected] == [call.operation for call in actual]:
            continue
        # Finds the first pair that differs in operation or call site. Operations alone would not
        # show which of two equal calls in a row a rank has left out.
        pairs = enumerate(zip(expected, actual, strict=False))
        common_length = min(len(expected), len(actual))
        position = next((i for i, (call, other) in pairs if call != other), common_length)
        yield (
            f"call {position + 1} in {_shorten(name)} differs:\n"
            f"  rank {first_rank}: {_describe(expected, position)}\n"
            f"  rank {rank}: {_describe(actual, position)}"
        )
        return


def _describe(calls: Sequence[Call], position: int) -> str:
    """Describes the call at a position, or the last call if there are fewer calls."""
    if position < len(calls):
        return f"{_shorten(calls[position].operation)}, at {calls[position].site}"
    return f"none; the last is at {calls[-1].site}" if calls else "none"


def _shorten(text: str) -> str:
    """Truncates a text, such as a name with a long list of ranks."""
    return textwrap.shorten(text, 120, placeholder=" …")
