"""Finds the device that models run on, and selects the GPU of a rank."""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longest time that ranks wait for each other, for example while one rank writes a model."""
QUERIES_AT_ONCE = 128
"""Number of queries per block in the backward pass of ``training_layers.attend_in_blocks``. It
is in this module, so that plans can read it without an import of torch."""


def device() -> str:
    """Returns the device that models run on: ``cuda``, or ``cpu`` on a machine without a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def collective_backend() -> str:
    """Returns the backend of ``torch.distributed``."""
    return "nccl" if device() == "cuda" else "gloo"


def select_gpu() -> torch.device | None:
    """Selects and returns this rank's GPU; returns ``None`` on a machine without a GPU.

    By default, PyTorch uses the first GPU on every rank.
    """
    import torch

    if device() == "cpu":
        return None
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(gpu)
    return gpu


def release_cached_memory() -> None:
    """Deletes unreachable objects, and frees GPU memory that PyTorch's allocator caches."""
    import torch

    gc.collect()
    if device() != "cpu":
        torch.cuda.empty_cache()


class FakeStream:
    """Replaces CUDA streams and events on machines without a GPU, where operations run in order.

    Every method does nothing and returns this object.
    """

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and other protocols must not find a special method
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *error: object) -> None: ...
