"""Compares the distillation loss with its definition, for a full sequence and vocabulary."""

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
"""Tokens of a sequence, and vocabulary sizes: that of Llama 3.1 is 128,256, and 64,128 is half."""
ROWS = 512
"""Number of tokens that ``reference`` computes at a time, which limits its float64 tensors."""
LOSSES = {
    "T=1": LogitsLoss(),
    "T=2": LogitsLoss(temperature=2.0),
    "reverse": LogitsLoss("reverse_kl"),
    "jsd": LogitsLoss("jsd"),
    "top-k": LogitsLoss(top_k=64),
}


def logits(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Returns bfloat16 logits [TOKENS, vocabulary] of student and teacher.

    The teacher's 64 largest logits have no ties, so their choice in a top-k loss is unambiguous.
    """
    generator = torch.Generator(device()).manual_seed(vocabulary)
    shape = (TOKENS, vocabulary)
    student = 3 * torch.randn(shape, device=device(), generator=generator)
    # Each row of the teacher has the 64 values 1, 1.125, 1.25, ..., which bfloat16 represents
    # exactly. They are in equally spaced columns, which shift by one from row to row. All other
    # logits are 0.
    spacing = vocabulary // 64
    rows, indices = (torch.arange(count, device=device()) for count in (TOKENS, 64))
    largest = (1 + indices / 8).to(torch.bfloat16).expand(TOKENS, 64)
    teacher = torch.zeros(shape, device=device(), dtype=torch.bfloat16)
    teacher.scatter_(1, indices * spacing + rows[:, None] % spacing, largest)
    return student.to(torch.bfloat16), teacher


def reference(student: Tensor, teacher: Tensor, loss: LogitsLoss) -> tuple[Tensor, Tensor]:
    """Computes the losses [TOKENS] by their definition in float64, and the student's gradients."""
    values, gradients = [], []
    for start in range(0, TOKENS, ROWS):
        student_logits = student[start : start + ROWS].double().requires_grad_()
        teacher_logits = teacher[start : start + ROWS].double()
        value = loss_by_definition(student_logits, teacher_logits, loss)
        value.sum().backward()
        assert student_logits.grad is not None
        values.append(value.detach())
        gradients.append(student_logits.grad.float())
    return torch.cat(values), torch.cat(gradients)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_match_their_definition(name: str, vocabulary: int) -> None:
    student, teacher = logits(vocabulary)
    student_leaf = student.clone().requires_grad_()
    losses = distillation_loss(student_leaf, teacher.clone(), LOSSES[name])
    losses.sum().backward()
    expected, expected_gradient = reference(student, teacher, LOSSES[name])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)
    assert student_leaf.grad is not None
    # The gradient is in bfloat16, which has 8 significant bits.
    gradient = student_leaf.grad.float()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1.5e-2, atol=1e-6)


@pytest.mark.skipif(not on_gpu(), reason="memory is measured only on a GPU")
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_memory_is_below_that_of_nemos_loss(vocabulary: int, results: Path) -> None:
    from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss

    student, teacher = logits(vocabulary)
    nemo_loss = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1))

    def ours(student: Tensor) -> Tensor:
        return distillation_loss(student, teacher.clone(), LogitsLoss())

    def nemo(student: Tensor) -> Tensor:
        # NeMo takes [tokens, batch, vocabulary] and returns a tuple.
        loss: Tensor = nemo_loss(student[:, None], teacher[:, None])[0]
        return loss

    metrics = {"ours": measure(ours, student), "nemo": measure(nemo, student)}
    record(results, f"loss-{vocabulary}", tokens=TOKENS, vocabulary=vocabulary, **metrics)
    assert metrics["ours"]["bytes"] < metrics["nemo"]["bytes"]


def measure(loss: Callable[[Tensor], Tensor], student: Tensor) -> dict[str, float]:
    """Returns ``seconds`` of a forward and backward pass, and the peak ``bytes`` that they add."""
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
