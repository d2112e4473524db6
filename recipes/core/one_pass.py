"""Chains of operations on tensors that are one pass over their data, where that is asked for.

As they are written, each operation of a norm or a loss reads and writes all of its data. PyTorch's
compiler, Inductor, makes one kernel of a chain: C++ on a CPU, Triton on a GPU.
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

P = ParamSpec("P")
R = TypeVar("R")
_wanted = False


def missing_compiler() -> tuple[str, str] | None:
    """What a CPU's kernels are made with and is not here, and how to get it; ``None`` if all is."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return compiler, "on Debian or Ubuntu, apt-get install g++"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h", "on Debian or Ubuntu, apt-get install python3-dev"
    return None


@contextmanager
def one_pass(wanted: bool = True) -> Iterator[None]:
    """Runs what is ``fusable`` as compiled kernels; each is made when it is first needed."""
    global _wanted
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def fusable(chain: Callable[P, R]) -> Callable[P, R]:
    """Marks a chain of operations: a function of tensors, which writes into none but given ones."""

    @functools.cache
    def compiled() -> Callable[..., R]:
        import torch

        kernels: Callable[..., R] = torch.compile(chain, fullgraph=True)

        def run_kernels(*args: Any, **kwargs: Any) -> R:
            if not torch.is_grad_enabled():  # or they are made anew for what has one elsewhere
                args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
            return kernels(*args, **kwargs)

        return run_kernels

    @functools.wraps(chain)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return compiled()(*args, **kwargs) if _wanted else chain(*args, **kwargs)

    return run
