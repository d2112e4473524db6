"""Optional torch.compile for elementwise kernels.

Eager PyTorch reads and writes all data of a norm or a loss once per operation. Inductor makes one
kernel of such a function: C++ on a CPU, Triton on a GPU.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

VECTOR_BITS = {"AVX2": 256, "AVX512": 512}
"""Vector width of the instruction sets that PyTorch distinguishes on x86."""
P = ParamSpec("P")
R = TypeVar("R")
_enabled = False


def missing_compiler() -> tuple[str, str] | None:
    """Returns a missing requirement of CPU compilation and how to install it, or ``None``."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return compiler, "on Debian or Ubuntu, apt-get install g++"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h", "on Debian or Ubuntu, apt-get install python3-dev"
    return None


@contextmanager
def compilation(enabled: bool = True) -> Iterator[None]:
    """Runs ``compilable`` functions compiled; each is compiled on its first call."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a function for ``compilation``; it may write only into its arguments."""

    @functools.cache
    def compiled() -> Callable[..., R]:
        import torch

        # The key of Inductor's cache lacks the instruction set (PyTorch 2.13). C++ that was
        # cached for AVX512 reads past its data if it is built for AVX2: wrong losses, no error.
        # So Inductor's own vector width is set explicitly, which makes it a part of the key.
        width = VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())
        options: dict[str, Any] = {"cpp.simdlen": width}
        kernel: Callable[..., R] = torch.compile(function, fullgraph=True, options=options)

        def run_kernel(*args: Any, **kwargs: Any) -> R:
            if not torch.is_grad_enabled():
                # Arguments that differ only in whether they require gradients would recompile it.
                args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
            return kernel(*args, **kwargs)

        return run_kernel

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return compiled()(*args, **kwargs) if _enabled else function(*args, **kwargs)

    return run
