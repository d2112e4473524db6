"""Collectives and pipeline messages of a rank whose peers are not there: checked, not sent.

Tensors are held to what NCCL demands (torch's ``ProcessGroupNCCL.cpp``: ``_allgather_base``,
``_reduce_scatter_base``, ``alltoall_base``, ``check_gpu_single_tensor``). Of messages between two
ranks the shape is noted, to be compared with what the rehearsal of the other expects.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.rehearsal.fake_cuda import DEVICE, NAME
from recipes.rehearsal.job import Message

FAKE = "fake"
_on_cpu: set[str] = set()
"""Names of the groups that were asked of gloo."""


class MessageError(Exception):
    """A collective that would fail on real ranks, or hang."""


def stand_in() -> None:
    """Replaces process groups by ones of any size that hold this process alone, for good."""
    distributed.Backend.backend_capability[FAKE].append(NAME)
    init, new_group = distributed.init_process_group, distributed.new_group

    def init_process_group(backend: str | None = None, *args: object, **kwargs: object) -> None:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        init(FAKE, rank=rank, world_size=world, store=FakeStore())
        _note(distributed.group.WORLD, backend)

    def group(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        made = new_group(*args, backend=FAKE, **kwargs)
        _note(made, backend)
        return made

    # Objects would be pickled into tensors, which have no bytes here.
    def all_gather_object(found: list[Any], value: Any, group: object = None) -> None:
        found[:] = [value] * len(found)

    def gather_object(
        value: Any, found: list[Any] | None = None, *args: object, **kw: object
    ) -> None:
        if found is not None:
            found[:] = [value] * len(found)

    distributed.init_process_group, distributed.new_group = init_process_group, group
    distributed.all_gather_object, distributed.gather_object = all_gather_object, gather_object
    distributed.broadcast_object_list = lambda *args, **kwargs: None


def _note(group: Any, backend: str | None) -> None:
    if backend == "gloo" and isinstance(group, distributed.ProcessGroup):
        _on_cpu.add(group.group_name)


class Checked(TorchDispatchMode):
    """Looks at every collective before it is not sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Message] = []
        self.expected: list[Message] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("c10d::")
        boxed = next(a for a in args if isinstance(a, torch.ScriptObject))
        group = distributed.ProcessGroup.unbox(boxed)
        tensors = [t for a in args for t in _flat(a)]
        if name != "barrier" and group.group_name not in _on_cpu:
            _require_device(name, tensors)
        if (check := CHECKS.get(name)) is not None:
            check(name, args, group.size())
        if name in ("send", "recv_"):
            self._note(name, tensors[0], group, args[2])
        if name in COALESCED:  # which has no weightless form; its parts have
            return COALESCED[name](*args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, tensor: Tensor, group: Any, peer: int) -> None:
        own, other = distributed.get_rank(), distributed.get_global_rank(group, peer)
        shape, dtype = list(tensor.shape), str(tensor.dtype)
        if name == "send":
            self.sent.append(Message(own, other, shape, dtype))
        else:
            self.expected.append(Message(other, own, shape, dtype))


def _flat(value: object) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in _flat(each)]
    return [value] if isinstance(value, Tensor) else []


def _require_device(name: str, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.device != DEVICE:
            raise MessageError(
                f"{name} of a tensor {list(tensor.shape)} on {tensor.device}: NCCL needs all "
                "tensors on the GPU"
            )
        if not tensor.is_contiguous():
            raise MessageError(f"{name} of a tensor {list(tensor.shape)} that is not contiguous")


def _require(name: str, fits: bool, what: str) -> None:
    if not fits:
        raise MessageError(f"{name}: {what}")


def _gather_base(name: str, args: tuple[Any, ...], size: int) -> None:
    whole, part = args[:2]
    what = f"{list(part.shape)} of each of {size} ranks into {list(whole.shape)}"
    _require(name, whole.numel() == size * part.numel() and whole.dtype == part.dtype, what)


def _scatter_base(name: str, args: tuple[Any, ...], size: int) -> None:
    part, whole = args[:2]
    what = f"{list(whole.shape)} over {size} ranks into {list(part.shape)}"
    _require(name, whole.numel() == size * part.numel() and whole.dtype == part.dtype, what)


def _gather(name: str, args: tuple[Any, ...], size: int) -> None:
    outputs, inputs = args[:2]
    for parts, own in zip(outputs, inputs, strict=True):
        same = all(part.shape == own.shape and part.dtype == own.dtype for part in parts)
        what = f"{list(own.shape)} into {[list(p.shape) for p in parts]} of {size} ranks"
        _require(name, same and len(parts) == size, what)


def _all_to_all(name: str, args: tuple[Any, ...], size: int) -> None:
    output, own, _, received, sent = args[:5]
    for tensor, split in ((output, received), (own, sent)):
        length = len(tensor)
        fits = sum(split) == length and len(split) == size if split else length % size == 0
        _require(name, fits, f"{list(tensor.shape)} split as {list(split)} over {size} ranks")


def _pairs(check: Callable[..., None]) -> Callable[..., None]:
    def each(name: str, args: tuple[Any, ...], size: int) -> None:
        for pair in zip(*args[:2], strict=True):
            check(name, pair, size)

    return each


CHECKS: dict[str, Callable[[str, tuple[Any, ...], int], None]] = {
    "_allgather_base_": _gather_base,
    "_reduce_scatter_base_": _scatter_base,
    "allgather_": _gather,
    "alltoall_base_": _all_to_all,
    "allgather_into_tensor_coalesced_": _pairs(_gather_base),
    "reduce_scatter_tensor_coalesced_": _pairs(_scatter_base),
}


def _one_by_one(collective: Callable[..., Any]) -> Callable[..., Any]:
    def each(outputs: Sequence[Tensor], parts: Sequence[Tensor], *args: Any) -> Any:
        done = [collective(*pair, *args) for pair in zip(outputs, parts, strict=True)]
        return done[-1][1]

    return each


def _all_reduce(tensors: Sequence[Tensor], group: Any, operation: Any, *args: Any) -> Any:
    return torch.ops.c10d.allreduce_(tensors, group, operation, None, *args)[1]


COALESCED: dict[str, Callable[..., Any]] = {
    "allgather_into_tensor_coalesced_": _one_by_one(torch.ops.c10d._allgather_base_),
    "reduce_scatter_tensor_coalesced_": _one_by_one(torch.ops.c10d._reduce_scatter_base_),
    "allreduce_coalesced_": _all_reduce,
}
