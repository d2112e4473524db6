"""Tests that compiled kernels have the values and gradients of eager execution."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from recipes.backend.training_layers import SwiGLU, _RMSNorm
from recipes.core.compiled import compilable, compilation, missing_compiler
from recipes.core.files import REPO_ROOT
from recipes.distillation.losses import LogitsLoss, LossTargets, combined_loss
from recipes.distillation.vocabulary import CHUNK_BYTES, top_k
from tests.support.gradients import random_tensors, value_and_gradients

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason="needs a C++ compiler")
TOKENS, VOCABULARY = 40, 101
CHUNK = 4 * VOCABULARY * 16  # bytes of 16 tokens, so the last chunk of 40 tokens is not full
LABELS = torch.arange(TOKENS) * 7 % VOCABULARY


def loss_function(live: bool) -> Callable[[Tensor], Tensor]:
    """Returns the sum of KD loss and 0.2 · LM loss as a function of the student's logits.

    Args:
        live: Whether the teacher has all logits, as if it ran in each step. Otherwise it is cached:
            it has the 7 largest logits and 5 samples of the tail per token.
    """
    generator, loss = torch.Generator().manual_seed(1), LogitsLoss()
    logits = 3 * torch.randn(TOKENS, VOCABULARY, generator=generator)
    quantiles = ((torch.arange(5) + 0.3) / 5).expand(TOKENS, -1)
    teacher = logits if live else top_k(logits, 7, 1.0, quantiles=quantiles)
    targets = LossTargets(teacher, LABELS, (1.0, 0.2))
    return lambda student: combined_loss(student, targets, loss)[0]


CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "RMSNorm": (lambda x, w: _RMSNorm.apply(x, w, 1e-5), [(9, 2, 24), (24,)]),
    "swiglu": (lambda x: SwiGLU(None)(x), [(9, 2, 24)]),
    "loss, live": (loss_function(live=True), [(TOKENS, VOCABULARY)]),
    "loss, cached": (loss_function(live=False), [(TOKENS, VOCABULARY)]),
}
"""Functions with compilable kernels, and the shapes of their arguments, by name."""


@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_have_the_values_and_gradients_of_eager_execution(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", CHUNK)
    function, shapes = CASES[name]
    tensors = [tensor.float() for tensor in random_tensors(*shapes)]
    eager = value_and_gradients(function, tensors)
    graphs_before = counters["stats"]["unique_graphs"]
    with compilation():
        compiled = value_and_gradients(function, tensors)
    assert counters["stats"]["unique_graphs"] > graphs_before  # something was compiled
    assert len(eager) > 1  # the value, and the gradient of at least one argument
    for actual, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_compiled_when_disabled() -> None:
    was_compiled: list[bool] = []  # for each call of ``doubled``

    @compilable
    def doubled(x: Tensor) -> Tensor:
        was_compiled.append(torch.compiler.is_compiling())
        return 2 * x

    with compilation(False):
        assert doubled(torch.ones(2)).tolist() == [2, 2]
    with compilation(), compilation(False):
        doubled(torch.ones(2))
    assert was_compiled == [False, False]


SOFTMAX_SCRIPT = """
import torch
from recipes.core.compiled import compilable, compilation

x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
softmax = lambda x: x.float().softmax(-1)
with compilation():
    torch.testing.assert_close(compilable(softmax)(x), softmax(x))
"""


@pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="needs two instruction sets"
)
def test_instruction_sets_do_not_share_cached_kernels(tmp_path: Path) -> None:
    """Both processes have the same cache. C++ code for AVX512 gives wrong results with AVX2."""
    for instruction_set in ("avx512", "avx2"):
        variables = {
            "ATEN_CPU_CAPABILITY": instruction_set,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": str(REPO_ROOT),
        }
        command = [sys.executable, "-c", SOFTMAX_SCRIPT]
        subprocess.run(command, env={**os.environ, **variables}, check=True)
