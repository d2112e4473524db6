"""Compares the distillation loss at full length and vocabulary size with its definition."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from recipes.backend.device import device
from recipes.distillation.losses import LogitsLoss, distillation_loss
from tests.gpu.small import on_gpu, record
from tests.support.losses import loss_by_definition

TOKENS, VOCABULARIES = (8192, (64_128, 128_256)) if on_gpu() else (64, (1000, 2000))
ROWS = 512
"""Tokens that ``reference`` computes at a time, to limit the size of its float64 tensors."""
LOSSES = {
    "T=1": LogitsLoss(),
    "T=2": LogitsLoss(temperature=2.0),
    "reverse": LogitsLoss("reverse_kl"),
    "jsd": LogitsLoss("jsd"),
    "top-k": LogitsLoss(top_k=64),
}


def logits(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Returns bfloat16 logits of student and teacher. The teacher's top 64 are unambiguous."""
    generator = torch.Generator(device()).manual_seed(vocabulary)
    shape = (TOKENS, vocabulary)
    student = 3 * torch.randn(shape, device=device(), generator=generator)
    # Each row of the teacher has 64 distinct values, in equally spaced columns; the rest is 0.
    spacing = vocabulary // 64
    rows, columns = (torch.arange(n, device=device()) for n in (TOKENS, 64))
    largest = (1 + columns / 8).to(torch.bfloat16).expand(TOKENS, 64)
    teacher = torch.zeros(shape, device=device(), dtype=torch.bfloat16)
    teacher.scatter_(1, columns * spacing + rows[:, None] % spacing, largest)
    return student.to(torch.bfloat16), teacher


def reference(student: Tensor, teacher: Tensor, loss: LogitsLoss) -> tuple[Tensor, Tensor]:
    """Computes losses and gradients in float64 by their definition, ``ROWS`` tokens at a time."""
    values, gradients = [], []
    for start in range(0, TOKENS, ROWS):
        q_logits = student[start : start + ROWS].double().requires_grad_()
        t_logits = teacher[start : start + ROWS].double()
        value = loss_by_definition(q_logits, t_logits, loss)
        value.sum().backward()
        assert q_logits.grad is not None
        values.append(value.detach())
        gradients.append(q_logits.grad.float())
    return torch.cat(values), torch.cat(gradients)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_match_their_definition(name: str, vocabulary: int) -> None:
    student, teacher = logits(vocabulary)
    leaf = student.clone().requires_grad_()
    losses = distillation_loss(leaf, teacher.clone(), LOSSES[name])
    losses.sum().backward()
    expected, expected_gradient = reference(student, teacher, LOSSES[name])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.float(), expected_gradient, rtol=1.5e-2, atol=1e-6)


@pytest.mark.skipif(not on_gpu(), reason="memory is measured only on a GPU")
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_memory_is_below_that_of_nemos_loss(vocabulary: int, results: Path) -> None:
    from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss

    student, teacher = logits(vocabulary)
    nemo_loss = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1))

    def ours(student: Tensor) -> Tensor:
        return distillation_loss(student, teacher.clone(), LogitsLoss())

    def nemo(student: Tensor) -> Tensor:
        loss: Tensor = nemo_loss(student[:, None], teacher[:, None])[0]
        return loss

    metrics = {"ours": measure(ours, student), "nemo": measure(nemo, student)}
    record(results, f"loss-{vocabulary}", tokens=TOKENS, vocabulary=vocabulary, **metrics)
    assert metrics["ours"]["bytes"] < metrics["nemo"]["bytes"]


def measure(loss: Callable[[Tensor], Tensor], student: Tensor) -> dict[str, float]:
    """Returns the time of a forward and a backward pass, and the peak of the memory they add."""
    seconds = []
    for _ in range(4):
        leaf = student.detach().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        bytes_before, start = torch.cuda.memory_allocated(), time.monotonic()
        loss(leaf).sum().backward()
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - start)
    return {
        "seconds": min(seconds[1:]),  # without the first, which is a warm-up
        "bytes": torch.cuda.max_memory_allocated() - bytes_before,
    }
