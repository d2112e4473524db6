"""Checks the collectives and pipeline messages of a rank without sending them.

Tensors must meet the requirements of NCCL (torch's ``ProcessGroupNCCL.cpp``: ``_allgather_base``,
``_reduce_scatter_base``, ``alltoall_base``, ``check_gpu_single_tensor``). Messages between two
ranks are recorded. Each rank is rehearsed alone; the records are compared afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.backend.patches import apply, constant, patches, replace_with, wrap
from recipes.rehearsal.fake_cuda import DEVICE, NAME
from recipes.rehearsal.job import Message

FAKE = "fake"
Args = tuple[Any, ...]
_gloo_groups: set[str] = set()
"""Names of groups that were requested with gloo, whose tensors are on the CPU."""


class MessageError(Exception):
    """A collective that would fail or hang on real ranks."""


def install() -> None:
    """Replaces process groups by fake ones of any size, for the rest of the process."""
    distributed.Backend.backend_capability[FAKE].append(NAME)
    apply(PATCHES)


def _init_process_group(
    original: Any, backend: str | None = None, *args: object, **kwargs: object
) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    original(FAKE, rank=rank, world_size=world, store=FakeStore())
    _record_backend(distributed.group.WORLD, backend)


def _new_group(original: Any, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
    group = original(*args, backend=FAKE, **kwargs)
    _record_backend(group, backend)
    return group


def _all_gather_object(outputs: list[Any], value: Any, group: object = None) -> None:
    """Assumes that every rank's object equals this rank's."""
    outputs[:] = [value] * len(outputs)


def _gather_object(value: Any, outputs: Any = None, *args: object, **kwargs: object) -> None:
    if outputs is not None:
        outputs[:] = [value] * len(outputs)


def _record_backend(group: Any, backend: str | None) -> None:
    if backend == "gloo" and isinstance(group, distributed.ProcessGroup):
        _gloo_groups.add(group.group_name)


class MessageChecker(TorchDispatchMode):
    """Checks every collective, and records messages between two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Message] = []
        self.expected: list[Message] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: Args = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("c10d::")
        boxed = next(a for a in args if isinstance(a, torch.ScriptObject))
        group = distributed.ProcessGroup.unbox(boxed)
        tensors = [t for a in args for t in _tensors(a)]
        if name != "barrier" and group.group_name not in _gloo_groups:
            _require_device(name, tensors)
        if (check := CHECKS.get(name)) is not None:
            check(name, args, group.size())
        if name in ("send", "recv_"):
            self._record(name, tensors[0], group, args[2])
        if name in COALESCED:  # only the separate collectives work on fake tensors
            return COALESCED[name](*args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, tensor: Tensor, group: Any, peer: int) -> None:
        own, other = distributed.get_rank(), distributed.get_global_rank(group, peer)
        shape, dtype = list(tensor.shape), str(tensor.dtype)
        if name == "send":
            self.sent.append(Message(own, other, shape, dtype))
        else:
            self.expected.append(Message(other, own, shape, dtype))


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in _tensors(each)]
    return [value] if isinstance(value, Tensor) else []


def _require_device(name: str, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        _require(
            name,
            tensor.device == DEVICE,
            f"a tensor {list(tensor.shape)} is on {tensor.device}, but NCCL needs all on the GPU",
        )
        _require(name, tensor.is_contiguous(), f"{list(tensor.shape)} is not contiguous")


def _require(name: str, fits: bool, what: str) -> None:
    if not fits:
        raise MessageError(f"{name}: {what}")


def _check_gather_base(name: str, args: Args, size: int) -> None:
    whole, shard = args[:2]
    what = (
        f"the whole tensor is {list(whole.shape)} {whole.dtype}, but must hold {size} shards of "
        f"{list(shard.shape)} {shard.dtype}"
    )
    _require(name, whole.numel() == size * shard.numel() and whole.dtype == shard.dtype, what)


def _check_scatter_base(name: str, args: Args, size: int) -> None:
    _check_gather_base(name, (args[1], args[0]), size)


def _check_gather(name: str, args: Args, size: int) -> None:
    for outputs, own in zip(*args[:2], strict=True):
        fits = all(output.shape == own.shape and output.dtype == own.dtype for output in outputs)
        what = (
            f"needs {size} outputs of {list(own.shape)} {own.dtype}, got "
            f"{[list(output.shape) for output in outputs]}"
        )
        _require(name, fits and len(outputs) == size, what)


def _check_all_to_all(name: str, args: Args, size: int) -> None:
    output, own, _, received, sent = args[:5]
    for tensor, split in ((output, received), (own, sent)):
        length = len(tensor)
        fits = sum(split) == length and len(split) == size if split else length % size == 0
        _require(name, fits, f"{list(tensor.shape)} split as {list(split)} over {size} ranks")


def _check_pairs(check: Callable[..., None]) -> Callable[..., None]:
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


def _separately(collective: Callable[..., Any]) -> Callable[..., Any]:
    def run_each(outputs: Sequence[Tensor], inputs: Sequence[Tensor], *args: Any) -> Any:
        results = [collective(*pair, *args) for pair in zip(outputs, inputs, strict=True)]
        _, work = results[-1]  # the coalesced operator returns the last work
        return work

    return run_each


def _all_reduce(tensors: Sequence[Tensor], group: Any, operation: Any, *args: Any) -> Any:
    return torch.ops.c10d.allreduce_(tensors, group, operation, None, *args)[1]


COALESCED: dict[str, Callable[..., Any]] = {
    "allgather_into_tensor_coalesced_": _separately(torch.ops.c10d._allgather_base_),
    "reduce_scatter_tensor_coalesced_": _separately(torch.ops.c10d._reduce_scatter_base_),
    "allreduce_coalesced_": _all_reduce,
}


GROUPS = "groups have ranks that are not here"
PICKLED = "objects are pickled into tensors, and fake tensors have no data"
PATCHES = patches(
    "torch.distributed:",
    ("init_process_group", GROUPS, "b26b016e14cc", wrap(_init_process_group)),
    ("new_group", GROUPS, "8c5521f14690", wrap(_new_group)),
    ("all_gather_object", PICKLED, "df42d97f87f9", replace_with(_all_gather_object)),
    ("gather_object", PICKLED, "a147590828d6", replace_with(_gather_object)),
    ("broadcast_object_list", PICKLED, "8dded8659019", constant(None)),
)
