"""Replaces the functions of ``torch.cuda``. The replacements describe idle GPUs, or do nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from recipes.backend.device import FakeStream
from recipes.backend.patches import Patch, apply, constant, replace_with, wrap

NAME = "fakecuda"
DEVICE = torch.device("privateuseone:0")
"""The fake device. Its type, ``privateuseone``, is PyTorch's placeholder for third-party devices.
``install`` renames this type to ``NAME``."""
CAPABILITY = (9, 0)
"""Compute capability of Hopper GPUs."""
MEMORY_BYTES = 80 << 30
"""The GPU memory that stages see, 80 GiB. A rehearsal can exceed this size: the launcher compares
the rehearsed peak with the memory of the recipe's GPU."""
PROPERTIES = SimpleNamespace(
    name="rehearsal", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY_BYTES
)
RNG_STATE = torch.zeros(8, dtype=torch.uint8)
"""Placeholder for the state of the random number generator."""
TYPE_NAMES = {torch.bfloat16: "torch.cuda.BFloat16Tensor", torch.float32: "torch.cuda.FloatTensor"}
"""Names that ``Tensor.type()`` returns on CUDA."""


def install() -> None:
    """Installs fake GPUs for the rest of this process.

    Must run before NeMo, Megatron or TransformerEngine are imported.

    Raises:
        RecipeError: PyTorch is not the version that the patches were written for.
    """
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    apply(patches())


def patches() -> Iterator[Patch]:
    """Yields the patches of PyTorch."""
    for name, (source_hash, replace) in FUNCTIONS.items():
        yield Patch(f"torch.cuda:{name}", "there is no GPU", source_hash, replace)
    reason = "Megatron compares CUDA's type names"
    yield Patch("torch:Tensor.type", reason, "49d1168ec63d", wrap(_type))
    reason = "PyTorch cannot move a fake tensor that has other references"
    yield Patch("torch:nn.Module._apply", reason, "e50d01ca9c5c", replace_with(_apply))


class _Module(_DummyBackendModule):  # type: ignore[misc]
    """PyTorch's module for the fake device. The module for CUDA is ``torch.cuda``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Returns the dtypes of automatic mixed precision."""
        return [torch.bfloat16, torch.float16]


def _count_devices() -> int:
    """Returns the number of GPUs: one for each rank of the node, as torchrun's variable says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _type(original: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Returns CUDA's type name of a tensor on the fake device; otherwise calls ``Tensor.type``."""
    if args or kwargs or tensor.device != DEVICE or tensor.dtype not in TYPE_NAMES:
        return original(tensor, *args, **kwargs)
    return TYPE_NAMES[tensor.dtype]


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Moves or casts parameters and buffers in place, as PyTorch does on a GPU."""
    if recurse:
        for child in module.children():
            child._apply(fn)
    for values in (module._parameters, module._buffers):
        for name, old in values.items():
            if old is None:
                continue
            with torch.no_grad():
                new = fn(old)
            if values is module._buffers:
                values[name] = new  # as PyTorch does
            elif new is not old:
                # Swaps the parameter's content, because other objects refer to the parameter.
                torch._C._swap_tensor_impl(old, nn.Parameter(new, old.requires_grad))
                # ``FakeTensor`` keeps its device in this Python attribute, which was not swapped.
                old.fake_device = new.device  # type: ignore[attr-defined]
    return module


FUNCTIONS = {
    "is_available": ("b91a896857c1", constant(True)),
    "is_initialized": ("0f623fc044a8", constant(True)),
    "current_device": ("6e9804168a5c", constant(0)),
    "get_device_capability": ("6809539b0a67", constant(CAPABILITY)),
    "get_device_name": ("6f35f689a571", constant("rehearsal")),
    "get_device_properties": ("cb006011f5d1", constant(PROPERTIES)),
    "is_bf16_supported": ("dd9ffd146f5f", constant(True)),
    "memory_allocated": ("0442d2549a61", constant(0)),
    "memory_reserved": ("de803da5e53c", constant(0)),
    "max_memory_allocated": ("7d74e1261dc1", constant(0)),
    "max_memory_reserved": ("60af9cdf5dca", constant(0)),
    "mem_get_info": ("f9ea28f9e6d1", constant((MEMORY_BYTES, MEMORY_BYTES))),
    "current_stream": ("ca5387f64ee1", constant(FakeStream())),
    "default_stream": ("b0a2135268c6", constant(FakeStream())),
    "stream": ("a701c622b6f5", constant(FakeStream())),
    "graph_pool_handle": ("884b90f16984", constant((0, 0))),
    "get_rng_state": ("1190f97901d7", constant(RNG_STATE)),
    "random.get_rng_state": ("1190f97901d7", constant(RNG_STATE)),
    "device_count": ("efd183354fc3", replace_with(_count_devices)),
    "Stream": ("f5b9547b4660", replace_with(FakeStream)),
    "Event": ("cc34c59c482f", replace_with(FakeStream)),
    "init": ("85035f109983", constant(None)),
    "_lazy_init": ("f6316f9c5c9b", constant(None)),
    "_lazy_call": ("237e5407a66c", constant(None)),
    "set_device": ("86c6d0bf4222", constant(None)),
    "synchronize": ("7055e6143ffe", constant(None)),
    "empty_cache": ("bce971e6854f", constant(None)),
    "ipc_collect": ("555aacca1155", constant(None)),
    "manual_seed": ("a71497712eba", constant(None)),
    "reset_peak_memory_stats": ("766ce5a529a5", constant(None)),
    "manual_seed_all": ("e9489253dd7c", constant(None)),
    "set_rng_state": ("2aaed350f20b", constant(None)),
    "memory_stats": ("4f345f0de187", constant(None)),
    "set_stream": ("6f7a1ab4ffc3", constant(None)),
}
"""Maps names in ``torch.cuda`` to fields of a patch: (fingerprint of the original, replacement)."""
