"""Optional torch.compile for elementwise kernels.

In eager PyTorch, each elementwise operation of RMSNorm or of a loss reads and writes all data.
torch.compile makes one kernel of all these operations. Its compiler, Inductor, generates C++ for a
CPU and Triton for a GPU.
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
"""Vector width in bits of each x86 instruction set, by the name that PyTorch reports."""
P = ParamSpec("P")
R = TypeVar("R")
_enabled = False
"""Whether ``compilable`` functions run compiled. ``compilation`` sets this."""


def missing_compiler() -> tuple[str, str] | None:
    """Returns what is missing to compile C++, and how to install it; ``None`` if nothing is."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return compiler, "on Debian or Ubuntu, apt-get install g++"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h", "on Debian or Ubuntu, apt-get install python3-dev"
    return None


@contextmanager
def compilation(enabled: bool = True) -> Iterator[None]:
    """Sets whether ``compilable`` functions run compiled in the ``with`` block."""
    global _enabled
    previous, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = previous


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """Returns a function that runs compiled inside ``compilation``, and eagerly elsewhere.

    ``function`` must have no side effects, except that it may write into its arguments.
    """

    @functools.cache  # calls torch.compile once, when the function first runs compiled
    def compiled_function() -> Callable[..., R]:
        import torch

        # The key of Inductor's on-disk cache (PyTorch 2.13) lacks the instruction set. So a machine
        # with AVX2 may find C++ that was generated for AVX512. Built for AVX2, it reads past its
        # data: losses are wrong, and no error is raised. A vector width becomes part of the key.
        width = VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())
        options: dict[str, Any] = {"cpp.simdlen": width}
        kernel: Callable[..., R] = torch.compile(function, fullgraph=True, options=options)

        def run_kernel(*args: Any, **kwargs: Any) -> R:
            if not torch.is_grad_enabled():
                # The kernel would be compiled once for each value of ``requires_grad``, which has
                # no effect here. Detached tensors all have ``requires_grad=False``.
                args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
            return kernel(*args, **kwargs)

        return run_kernel

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return compiled_function()(*args, **kwargs) if _enabled else function(*args, **kwargs)

    return run
