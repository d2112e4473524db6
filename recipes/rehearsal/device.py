"""Replaces CUDA by a device of fake tensors, which have a shape and a type, but no memory.

Operations on tensors of different devices are refused, as on a GPU. Functions that need values, and
functions that fake tensors do not support, are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from recipes.rehearsal.fake_cuda import DEVICE

aten = torch.ops.aten


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Makes all tensors fake, and replaces the device CUDA by the fake device."""
    with ExitStack() as stack:  # of the two dispatch modes, ``_FakeCuda`` is called first
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), _FakeCuda(), _Redirect()):
            stack.enter_context(mode)
        yield


def _is_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


class _Redirect(TorchFunctionMode):
    """Calls the functions of ``REPLACED``; creates tensors on the fake device instead of CUDA."""

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # pinned memory needs a CUDA driver
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = DEVICE
        replacement = REPLACED.get(func)
        return replacement(func, *args, **kwargs) if replacement else func(*args, **kwargs)


def _to(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Replaces CUDA as the positional argument of ``Tensor.to``."""
    if args and _is_cuda(args[0]):
        args = (DEVICE, *args[1:])
    return func(tensor, *args, **kwargs)


def _tensor(func: Any, data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    """Makes a tensor on the CPU, from numbers or tensors of one number, then moves the tensor."""
    if isinstance(data, (list, tuple)):
        data = tree_map_only(Tensor, Tensor.item, data)
    tensor: Tensor = func(data, *args, **kwargs)
    return tensor if device is None or torch.device(device).type == "cpu" else tensor.to(DEVICE)


def _copy(func: object, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """Copies a tensor but not its Python attributes, some of which cannot be copied."""
    copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    memo[id(tensor)] = copy
    return copy


def _split(func: Any, tensor: Tensor, sizes: Any, dim: int = 0) -> Any:
    """Splits a tensor; into equal chunks if the sizes do not add up to the size of the tensor.

    Sizes that do not add up were read from a fake tensor, so they mean nothing.
    """
    if isinstance(sizes, (list, tuple)) and sum(sizes) != tensor.shape[dim]:
        return tensor.tensor_split(len(sizes), dim)
    return func(tensor, sizes, dim)


def _set_item(func: Any, tensor: Tensor, index: Any, value: Any) -> None:
    """Fills masked elements directly. PyTorch would put the value on a real CUDA device."""
    if isinstance(value, (int, float)) and isinstance(index, Tensor) and index.dtype == torch.bool:
        while index.dim() < tensor.dim():  # a mask may cover only the first dimensions
            index = index.unsqueeze(-1)
        tensor.masked_fill_(index, value)
    else:
        func(tensor, index, value)


def _attention(
    func: object, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object
) -> Any:
    """Runs fused attention. On an unknown device, PyTorch would run several unfused operations.

    Options change no shape, so they are ignored. Only the device of a mask is checked.
    """
    tensors = [t for t in (query, key, value, *args, *kwargs.values()) if isinstance(t, Tensor)]
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise _mixed_devices("scaled_dot_product_attention", devices)
    return _FusedAttention.apply(query, key, value)


class _FusedAttention(torch.autograd.Function):
    """Stores the same tensors as flash attention: inputs, output, and one number per query.

    Queries, keys and values are [batch, heads, tokens, channels].
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        if key.shape[-2] != value.shape[-2] or query.shape[-1] != key.shape[-1]:
            raise ValueError(
                "keys and values must have equally many tokens, and queries and keys equally many "
                f"channels; got queries {query.shape}, keys {key.shape}, values {value.shape}"
            )
        batch, heads, tokens, _ = query.shape
        # The kernel's memory layout has tokens before heads.
        context = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, context, query.new_empty(query.shape[:-1]).float())
        return context

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _log_sum_exp(func: object, tensor: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Allocates the tensor of exponentials that PyTorch's kernel (``ReduceOps.cpp``) allocates."""
    return (tensor - tensor.amax(dim, keepdim=True)).exp_().sum(dim, keepdim).log_()


REPLACED: dict[Any, Callable[..., Any]] = {
    torch.tensor: _tensor,
    torch.as_tensor: _tensor,
    Tensor.to: _to,
    Tensor.split: _split,
    Tensor.__deepcopy__: _copy,
    Tensor.__format__: lambda func, tensor, spec: format(tensor.item(), spec),
    Tensor.cuda: lambda func, tensor, *args, **kwargs: tensor.to(DEVICE),
    Tensor.pin_memory: lambda func, tensor, *args: tensor,
    Tensor.logsumexp: _log_sum_exp,
    Tensor.bincount: lambda func, tensor: tensor.new_ones(1),
    Tensor.is_cuda.__get__: lambda func, tensor: tensor.device == DEVICE,
    Tensor.__setitem__: _set_item,
    torch.nn.functional.scaled_dot_product_attention: _attention,
}
"""Maps functions to replacements, which get the original as first argument. The length of the
result of ``bincount`` depends on values, so this length is 1 here."""


def _read_real_number(real: Tensor) -> Any:
    with unset_fake_temporarily():
        return real.item()


def _all_indices(index: Tensor | None) -> list[Tensor | None]:
    """Returns the indices that replace one index of ``aten.index``.

    A mask becomes one index per dimension of the mask, as if the mask selected all elements.
    """
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.int64)] * index.dim()


INDEXING = {"index", "index_put", "_index_put_impl"}
"""Operations whose indices may be on the CPU while the tensor is on the GPU."""
MIXING = {
    *("copy", "_to_copy", "_foreach_copy", "slice_scatter", "select_scatter"),
    *("fill", "index_fill", "floor_divide"),  # element-wise, but without PyTorch's tag for this
}
"""Other operations that accept tensors of two devices."""


@cache
def _is_elementwise(name: str) -> bool:
    """Returns whether an operation is element-wise, by PyTorch's tags."""
    packet = getattr(aten, name, None) or getattr(aten, f"{name}_")  # some exist only in place
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def _require_one_device(func: Any, args: Any, kwargs: Any) -> None:
    """Refuses mixed devices that CUDA's kernels refuse but ``FakeTensor`` accepts.

    ``FakeTensor`` accepts a 0-dimensional CPU tensor in any operation. On CUDA, only element-wise
    operations and those of ``MIXING`` accept such a tensor. Other kernels would read it through a
    pointer, so PyTorch checks its device (``native_functions.yaml``). An index on the CPU can
    select from a GPU tensor, but not the reverse.

    Raises:
        RuntimeError: The operation would fail on CUDA.
    """
    if func.namespace != "aten":
        return
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) < 2:
        return
    name = func._schema.name.removeprefix("aten::").removesuffix("_")  # "aten::add_" becomes "add"
    if name in INDEXING:
        is_legal = tensors[0].device == DEVICE
    elif name.startswith("_foreach_") and name not in MIXING:
        # Element-wise operations on lists: 0-dimensional tensors may be on another device.
        is_legal = len({tensor.device for tensor in tensors if tensor.dim() > 0}) < 2
    else:
        is_legal = name in MIXING or _is_elementwise(name)
    if not is_legal:
        raise _mixed_devices(name, devices)


def _mixed_devices(name: str, devices: set[str]) -> RuntimeError:
    problem = "expected all tensors on one device, but found at least two devices"
    return RuntimeError(f"{name}: {problem}, {' and '.join(sorted(devices))}")


class _FakeCuda(TorchDispatchMode):
    """Checks devices, and returns a number where code reads one from a fake tensor (``item``).

    Stores each number that code copies to the device, so that ``item`` can return it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._numbers = WeakIdKeyDictionary()  # known numbers by tensor

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        _require_one_device(func, args, kwargs)
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._read_number(args[0])
        if func is aten.equal.default:  # tensors without values count as equal
            return True
        if func is aten._to_copy.default and kwargs.get("device") == DEVICE:
            return self._move(func, args[0], kwargs)
        if func is aten.index.Tensor:
            args = (args[0], [i for index in args[1] for i in _all_indices(index)])
        # A write in place makes the number unknown, unless a collective (not in ``aten``) writes.
        if func._schema.is_mutable and func.namespace == "aten" and isinstance(args[0], Tensor):
            self._numbers.pop(args[0], None)
        return func(*args, **kwargs)

    def _read_number(self, tensor: FakeTensor) -> Any:
        """Returns the tensor's number if it is known, otherwise 1 in the tensor's type."""
        if tensor.constant is not None:
            return _read_real_number(tensor.constant)
        if tensor in self._numbers:
            return self._numbers[tensor]
        if tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.is_floating_point() else 1

    def _move(self, func: Any, tensor: FakeTensor, kwargs: Any) -> Tensor:
        """Moves a tensor to the fake device, and stores its number if it is known.

        PyTorch may keep a fake tensor's value in a real tensor, ``constant``, and would move this
        constant to a real CUDA device. So the constant is removed during the move.
        """
        constant, tensor.constant = tensor.constant, None
        moved: Tensor = func(tensor, **kwargs)
        tensor.constant = constant
        if constant is not None and constant.numel() == 1:
            self._numbers[moved] = _read_real_number(constant)
        return moved
