"""Checks and records a rank's collectives and point-to-point messages without sending them.

Tensors must meet the requirements of NCCL, as in ``_allgather_base``, ``_reduce_scatter_base``,
``alltoall_base`` and ``check_gpu_single_tensor`` of torch's ``ProcessGroupNCCL.cpp``. A rehearsed
rank runs alone, on fake tensors, which have no values. The module ``agreement`` compares the
records of all rehearsed ranks afterwards.
"""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.backend.patches import apply, patches, replace_with, wrap
from recipes.core.files import REPO_ROOT
from recipes.rehearsal.agreement import WORLD, Call, Channel
from recipes.rehearsal.fake_cuda import DEVICE, NAME

FAKE = "fake"
"""Name of torch's backend whose collectives do nothing."""
MAX_CALLERS = 3
"""Largest number of callers that ``_site`` returns. Each caller is in another file."""
SKIPPED_FILES = ("/torch/", "/recipes/rehearsal/", "/contextlib.py", "/typing_extensions.py")
"""Substrings of paths of files that are not listed as callers."""
ROOTS = (f"{REPO_ROOT}/", *(f"{folder}/" for folder in site.getsitepackages()))
"""Prefixes that are removed from the paths of callers."""
MESSAGES = ("send", "recv_")
"""Operators of c10d for messages between two ranks; all other operators are collectives."""
EQUAL_ARGUMENT = {"allgather_": 1, "gather_": 1}
"""By collective: index of the argument whose shapes must be equal on all ranks; 0 for others."""
WITHOUT_EQUAL_SHAPES = ("barrier", "monitored_barrier_", "alltoall_base_")
"""Collectives without an argument whose shapes must be equal on all ranks."""
Args = tuple[Any, ...]
_channels: dict[str, Channel] = {}
"""Records of this rank's calls, by name: of process groups, and of messages between two ranks."""
_backends: dict[str, str | None] = {}
"""The requested backend of each process group, by the group's name."""
_reduction = ""
"""Operation of the running reduction, with a space before it (`` SUM``); otherwise empty."""


class MessageError(Exception):
    """A collective or message that would fail or hang on real ranks."""


def install() -> None:
    """Makes all process groups of this process fake, so that they can have any size."""
    distributed.Backend.backend_capability[FAKE].append(NAME)
    apply(PATCHES)


def recorded_channels() -> list[Channel]:
    """Returns this rank's channels, with the calls so far."""
    return list(_channels.values())


def _init_process_group(
    original: Any, backend: str | None = None, *args: object, **kwargs: object
) -> None:
    """Creates a fake group of all ranks, without waiting for them."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    original(FAKE, rank=rank, world_size=world, store=FakeStore())
    _register(distributed.group.WORLD, backend)


def _new_group(
    original: Any, ranks: Any = None, *args: Any, backend: str | None = None, **kwargs: Any
) -> Any:
    """Creates a fake group, and records the creation. ``ranks=None`` means all ranks."""
    world_group = distributed.group.WORLD
    members = list(range(distributed.get_world_size())) if ranks is None else list(ranks)
    _record(world_group, f"new_group of {_describe_ranks(members)}")
    group = original(ranks, *args, backend=FAKE, **kwargs)
    if isinstance(group, distributed.ProcessGroup):  # this rank is a member
        _register(group, backend or _backends[world_group.group_name])  # type: ignore[union-attr]
    return group


def _register(group: Any, backend: str | None) -> None:
    """Stores a group's requested backend, and creates its channel."""
    _backends[group.group_name] = backend
    _channel(group)


def _channel(group: Any) -> Channel:
    """Returns a process group's channel, which the first call creates."""
    ranks = distributed.get_process_group_ranks(group)
    name = WORLD
    if group is not distributed.group.WORLD:
        name = f"{group.group_desc} (group {group.group_name} of {_describe_ranks(ranks)})"
    return _channels.setdefault(name, Channel(name, ranks))


def _describe_ranks(ranks: list[int]) -> str:
    """Lists ranks: "ranks 0, 3, 4", or shorter if equally spaced: "ranks 0 to 6 by 2"."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 0
    if step > 0 and ranks == list(range(ranks[0], ranks[-1] + 1, step)):
        return f"ranks {ranks[0]} to {ranks[-1]}" + (f" by {step}" if step > 1 else "")
    return f"ranks {', '.join(map(str, ranks))}"


def _record(group: Any, operation: str) -> None:
    _channel(group).calls.append(Call(operation, _site()))


def _record_message(source: int, destination: int, operation: str) -> None:
    name = f"messages from rank {source} to rank {destination}"
    channel = _channels.setdefault(name, Channel(name, [source, destination]))
    channel.calls.append(Call(operation, _site()))


def _site() -> str:
    """Returns the innermost callers, one per file, without files of ``SKIPPED_FILES``."""
    frame: FrameType | None = sys._getframe(1)
    callers: dict[str, int] = {}
    while frame is not None and len(callers) < MAX_CALLERS:
        file = frame.f_code.co_filename
        if not any(skipped in file for skipped in SKIPPED_FILES):
            callers.setdefault(file, frame.f_lineno)
        frame = frame.f_back
    return " < ".join(f"{_short(file)}:{line}" for file, line in callers.items())


def _short(file: str) -> str:
    """Returns a path relative to the repository, or to the folder of installed packages."""
    for root in ROOTS:
        file = file.removeprefix(root)
    return file


def _all_gather_object(outputs: list[Any], value: Any, group: Any = None) -> None:
    """Assumes that the objects of all ranks equal this rank's object."""
    _record(group or distributed.group.WORLD, "all_gather_object")
    outputs[:] = [value] * len(outputs)


def _gather_object(
    value: Any, outputs: Any = None, dst: int | None = None, group: Any = None, **kwargs: object
) -> None:
    """Assumes that the objects of all ranks equal this rank's object."""
    _record(group or distributed.group.WORLD, f"gather_object to {dst or 0}")
    if outputs is not None:
        outputs[:] = [value] * len(outputs)


def _broadcast_object_list(
    objects: list[Any], src: int | None = None, group: Any = None, **kwargs: object
) -> None:
    """Keeps this rank's objects."""
    _record(group or distributed.group.WORLD, f"broadcast_object_list from {src or 0}")


def _reduce(original: Any, group: Any, *tensors_and_options: Any) -> Any:
    """Runs a reduction. Sets ``_reduction``, since c10d's operators hide the operation (SUM)."""
    global _reduction
    _reduction = f" {tensors_and_options[-1].reduceOp.op.name}"
    try:
        return original(group, *tensors_and_options)
    finally:
        _reduction = ""


class MessageChecker(TorchDispatchMode):
    """Checks and records every collective and message."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: Args = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("c10d::")
        # Operators get their process group as a ScriptObject.
        boxed_group = next(a for a in args if isinstance(a, torch.ScriptObject))
        group = distributed.ProcessGroup.unbox(boxed_group)
        if name != "barrier":  # a barrier's tensor is a placeholder, which may be on any device
            _require_device(name, _backends[group.group_name], _tensors(args))
        if (check := CHECKS.get(name)) is not None:
            check(name, args, group.size())
        _record_call(name, func, args, group)
        if name in COALESCED:  # coalesced operators do not work on fake tensors
            return COALESCED[name](*args)
        return func(*args, **(kwargs or {}))


def _record_call(name: str, func: Any, args: Args, group: Any) -> None:
    """Records a message or a collective: the operator ``func`` with the short name ``name``."""
    this_rank = distributed.get_rank()
    if name in MESSAGES:
        # The arguments are tensors, group, the other rank's index in the group, and tag.
        other = distributed.get_global_rank(group, args[2])
        source, destination = (this_rank, other) if name == "send" else (other, this_rank)
        _record_message(source, destination, _describe(args[0]))
        return
    if name == "alltoall_base_":
        _record_all_to_all(this_rank, args, group)
    names = (argument.name for argument in func._schema.arguments)
    arguments = dict(zip(names, args, strict=False))
    root = f" from {arguments['root_rank']}" if "root_rank" in arguments else ""
    # The record has only the tensors whose shapes must be equal on all ranks.
    tensors = args[EQUAL_ARGUMENT.get(name, 0)] if name not in WITHOUT_EQUAL_SHAPES else ()
    _record(group, f"{name.strip('_')}{_reduction}{root} {_describe(tensors)}".rstrip())


def _record_all_to_all(this_rank: int, args: Args, group: Any) -> None:
    """Records an all-to-all as messages: rows to each rank, and rows from each rank.

    The number of rows may differ between pairs of ranks, so each pair is compared separately.
    """
    ranks = distributed.get_process_group_ranks(group)
    received, sent, _, received_splits, sent_splits = args[:5]
    for tensor, splits, is_sent in ((sent, sent_splits, True), (received, received_splits, False)):
        # Without splits, all ranks get equally many rows.
        split_sizes = splits or [len(tensor) // len(ranks)] * len(ranks)
        for other, rows in zip(ranks, split_sizes, strict=True):
            source, destination = (this_rank, other) if is_sent else (other, this_rank)
            operation = f"all_to_all {[rows, *tensor.shape[1:]]} {_dtype(tensor)}"
            _record_message(source, destination, operation)


def _describe(tensors: object) -> str:
    """Describes tensors by shape and dtype. Adds the strides of tensors that are not contiguous."""
    return " and ".join(
        f"{list(tensor.shape)} {_dtype(tensor)}"
        + ("" if tensor.is_contiguous() else f" strides {tensor.stride()}")
        for tensor in _tensors(tensors)
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensors(value: object) -> list[Tensor]:
    """Returns all tensors in an argument, which may be a nested list."""
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def _require_device(name: str, backend: str | None, tensors: Sequence[Tensor]) -> None:
    """Checks the device and the memory layout of tensors that NCCL would send."""
    if backend == "gloo":
        return
    for tensor in tensors:
        if tensor.device.type == "cpu" and backend != "nccl":
            continue  # a group without a requested backend sends CPU tensors by gloo
        _require(
            name,
            tensor.device == DEVICE,
            f"a tensor {list(tensor.shape)} is on {tensor.device}, but NCCL needs it on the GPU",
        )
        is_sendable = _is_dense(tensor) if name in MESSAGES else tensor.is_contiguous()
        _require(name, is_sendable, f"a tensor {list(tensor.shape)} is not contiguous")


def _is_dense(tensor: Tensor) -> bool:
    """Returns whether a tensor has no gaps in memory, in any order of its dimensions."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    is_dense: bool = tensor.permute(order).is_contiguous()
    return is_dense


def _require(name: str, is_met: bool, what: str) -> None:
    """Raises an error with the text ``what`` if a requirement of an operator is not met."""
    if not is_met:
        raise MessageError(f"{name}: {what}")


# Each check below gets the operator's name, its arguments, and the number of ranks of the group.


def _check_gather_base(name: str, args: Args, size: int) -> None:
    whole, shard = args[:2]
    what = (
        f"the whole tensor is {list(whole.shape)} {whole.dtype}, but must hold {size} shards of "
        f"{list(shard.shape)} {shard.dtype}"
    )
    _require(name, whole.numel() == size * shard.numel() and whole.dtype == shard.dtype, what)


def _check_scatter_base(name: str, args: Args, size: int) -> None:
    shard, whole = args[:2]
    _check_gather_base(name, (whole, shard), size)


def _check_gather(name: str, args: Args, size: int) -> None:
    for outputs, shard in zip(*args[:2], strict=True):
        expected = (shard.shape, shard.dtype)
        are_like_shard = all((output.shape, output.dtype) == expected for output in outputs)
        shapes = [list(output.shape) for output in outputs]
        what = f"needs {size} outputs of {list(shard.shape)} {shard.dtype}, got {shapes}"
        _require(name, are_like_shard and len(outputs) == size, what)


def _check_all_to_all(name: str, args: Args, size: int) -> None:
    received, sent, _, received_splits, sent_splits = args[:5]
    for tensor, splits in ((received, received_splits), (sent, sent_splits)):
        rows = len(tensor)
        # Without splits, all ranks get equally many rows.
        is_valid = (sum(splits) == rows and len(splits) == size) if splits else rows % size == 0
        what = (
            f"the rows of a tensor {list(tensor.shape)} cannot be split over {size} ranks as "
            f"{list(splits) or 'equal shards'}"
        )
        _require(name, is_valid, what)


def _check_pairs(check: Callable[..., None]) -> Callable[..., None]:
    """Returns a check that applies ``check`` to each (output, input) of a coalesced collective."""

    def check_each(name: str, args: Args, size: int) -> None:
        for pair in zip(*args[:2], strict=True):
            check(name, pair, size)

    return check_each


CHECKS: dict[str, Callable[[str, Args, int], None]] = {
    "_allgather_base_": _check_gather_base,
    "_reduce_scatter_base_": _check_scatter_base,
    "allgather_": _check_gather,
    "alltoall_base_": _check_all_to_all,
    "allgather_into_tensor_coalesced_": _check_pairs(_check_gather_base),
    "reduce_scatter_tensor_coalesced_": _check_pairs(_check_scatter_base),
}
"""Functions that check the shapes of a collective, by name. Other collectives are not checked."""


def _separately(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that runs ``collective`` for each pair (output, input) of tensors."""

    def run_each(outputs: Sequence[Tensor], inputs: Sequence[Tensor], *args: Any) -> Any:
        results = [collective(*pair, *args) for pair in zip(outputs, inputs, strict=True)]
        _, last_work = results[-1]  # a coalesced operator returns one ``Work``
        return last_work

    return run_each


def _all_reduce_list(tensors: Sequence[Tensor], group: Any, operation: Any, *args: Any) -> Any:
    """Runs one all-reduce of all tensors; returns c10d's ``Work``, for which the caller waits."""
    sparse_indices = None
    _, work = torch.ops.c10d.allreduce_(tensors, group, operation, sparse_indices, *args)
    return work


COALESCED: dict[str, Callable[..., Any]] = {
    "allgather_into_tensor_coalesced_": _separately(torch.ops.c10d._allgather_base_),
    "reduce_scatter_tensor_coalesced_": _separately(torch.ops.c10d._reduce_scatter_base_),
    "allreduce_coalesced_": _all_reduce_list,
}
"""Replacements of coalesced operators, by name."""
# Reasons of patches.
GROUPS = "groups have ranks that are not running"
PICKLED = "objects are pickled into tensors, and fake tensors have no data"
HIDDEN = "operators of c10d hide the operation of a reduction, which must be equal on all ranks"
PATCHES = patches(
    "torch.distributed:",
    ("init_process_group", GROUPS, "b26b016e14cc", wrap(_init_process_group)),
    ("new_group", GROUPS, "8c5521f14690", wrap(_new_group)),
    ("all_gather_object", PICKLED, "df42d97f87f9", replace_with(_all_gather_object)),
    ("gather_object", PICKLED, "a147590828d6", replace_with(_gather_object)),
    ("broadcast_object_list", PICKLED, "8dded8659019", replace_with(_broadcast_object_list)),
    ("ProcessGroup.allreduce", HIDDEN, "fa7df0c8186b", wrap(_reduce)),
    ("ProcessGroup.allreduce_coalesced", HIDDEN, "649b28c06be7", wrap(_reduce)),
    ("ProcessGroup.reduce", HIDDEN, "e34506d19601", wrap(_reduce)),
    ("ProcessGroup.reduce_scatter", HIDDEN, "b3c39b698e4a", wrap(_reduce)),
    ("ProcessGroup.reduce_scatter_single", HIDDEN, "b97b4a92cc18", wrap(_reduce)),
    ("ProcessGroup.reduce_scatter_single_coalesced", HIDDEN, "0d8d288e9b6e", wrap(_reduce)),
)
