"""The distillation loss against an independent reference in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recipes.kd_loss import CHUNK_TOKENS, LogitsKL, cross_entropy

REPO = Path(__file__).resolve().parents[2]
LENGTH, BATCH, VOCABULARY = 37, 3, 101  # more tokens than one chunk, and not a multiple of it


def reference(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) [batch, sequence], by its definition."""
    p = (teacher / temperature).softmax(-1)
    q = (student / temperature).softmax(-1)
    return (temperature**2 * (p * (p / q).log()).sum(-1)).t()


def make_logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(LENGTH, BATCH, VOCABULARY, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_equal_the_reference(temperature: float) -> None:
    assert LENGTH * BATCH > CHUNK_TOKENS
    teacher, expected_student = make_logits(1), make_logits(2).requires_grad_()
    weights = torch.rand(BATCH, LENGTH, dtype=torch.float64)
    expected = reference(expected_student, teacher, temperature)
    (expected * weights).sum().backward()

    student = make_logits(2).float().requires_grad_()
    losses = LogitsKL(temperature)((student, None), (teacher.float(), None))
    (losses * weights.float()).sum().backward()

    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), expected_student.grad, rtol=1e-4, atol=1e-6)


def test_equal_models_have_zero_loss_and_gradient() -> None:
    student = make_logits(1).float().requires_grad_()
    losses = LogitsKL()(student, student.detach().clone())
    losses.sum().backward()
    assert losses.abs().max() < 1e-6
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_temperature_keeps_the_gradient_scale() -> None:
    """Without T² the gradient at T=4 would be about 16 times smaller than at T=1."""
    norms = []
    for temperature in (1.0, 4.0):
        student = make_logits(2).float().requires_grad_()
        LogitsKL(temperature)(student, make_logits(1).float()).mean().backward()
        assert student.grad is not None
        norms.append(student.grad.norm().item())
    assert 0.2 < norms[1] / norms[0] < 5


def test_cross_entropy_equals_torch() -> None:
    logits = make_logits(3)
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH))
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(0, 1).reshape(-1, VOCABULARY), labels.reshape(-1)
    )
    torch.testing.assert_close(cross_entropy(logits.float(), labels, None).double(), expected)


SPLIT_SCRIPT = """
import sys, torch, torch.distributed as dist
from recipes.kd_loss import LogitsKL, cross_entropy
dist.init_process_group("gloo")
rank, half = dist.get_rank(), 60
torch.manual_seed(0)
whole_s, whole_t = 3 * torch.randn(37, 3, 120), 3 * torch.randn(37, 3, 120)
labels = torch.randint(120, (3, 37))
columns = slice(rank * half, (rank + 1) * half)
part = whole_s[..., columns].clone().requires_grad_()
split = LogitsKL(2.0, dist.group.WORLD)(part, whole_t[..., columns].clone())
split.mean().backward()
full = whole_s.clone().requires_grad_()
expected = LogitsKL(2.0)(full, whole_t)
expected.mean().backward()
torch.testing.assert_close(split, expected, rtol=1e-5, atol=1e-5)
torch.testing.assert_close(part.grad, full.grad[..., columns], rtol=1e-4, atol=1e-7)
torch.testing.assert_close(
    cross_entropy(whole_s[..., columns], labels, dist.group.WORLD),
    cross_entropy(whole_s, labels, None),
)
dist.barrier()
dist.destroy_process_group()
"""


def test_vocabulary_split_over_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "split.py"
    script.write_text(SPLIT_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
