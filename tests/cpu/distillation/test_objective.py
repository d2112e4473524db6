"""Tests the loss: weights of its terms, masked sums, and the hidden loss against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recipes.distillation.objective import HiddenLoss, LossReduction, Objective
from recipes.distillation.settings import HIDDEN_LOSSES

TERMS = {"kd": 2.0, "hidden": 8.0, "lm": 6.0}
"""Means of the unweighted terms, the same in two consecutive steps."""


@pytest.mark.parametrize(
    ("dynamic", "weights", "terms"),
    [
        (False, {"kd": 0.5, "hidden": 0.25, "lm": 2.0}, {"kd": 1, "hidden": 2, "lm": 12}),
        (True, {"kd": 1.0}, {"kd": 2}),
        (True, {"lm": 3.0}, {"lm": 18}),
        (True, {"hidden": 0.5}, {"hidden": 4}),
        # "hidden" is scaled to "kd", then weighted
        (True, {"kd": 1.0, "hidden": 0.5}, {"kd": 2, "hidden": 1}),
        # "kd" is scaled to "lm", then weighted
        (True, {"kd": 0.5, "lm": 1.0}, {"kd": 3, "lm": 6}),
        # "hidden" is scaled to "kd", as above; the sum of both is then scaled to "lm" times the
        # weight of "kd"
        (True, {"kd": 2.0, "hidden": 0.5, "lm": 1.0}, {"kd": 8, "hidden": 4, "lm": 6}),
        # "hidden" is scaled to "lm", then weighted
        (True, {"hidden": 1.0, "lm": 2.0}, {"hidden": 6, "lm": 12}),
    ],
)
def test_weighted_terms_of_the_second_step(
    dynamic: bool, weights: dict[str, float], terms: dict[str, float]
) -> None:
    """``weights`` are the configured weights, which dynamic weighting adapts to the last step."""
    next_weights = Objective(weights, dynamic=dynamic).weights_after(TERMS)
    weighted = {name: weight * TERMS[name] for name, weight in next_weights.items()}
    assert weighted == pytest.approx(terms)


def test_a_term_with_mean_0_keeps_its_configured_weight() -> None:
    objective = Objective({"kd": 1.0, "hidden": 0.5}, dynamic=True)
    assert objective.weights_after({"kd": 1.0, "hidden": 0.0}) == {"kd": 1.0, "hidden": 0.5}


def test_gradients_do_not_depend_on_the_micro_batch() -> None:
    """Compares one micro batch of four sequences with four micro batches of one sequence."""
    # [1 + terms, sequences, tokens]: the weighted total, then the three terms of ``TERMS``
    outputs = torch.rand(4, 4, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 7)
    mask[1:3, 2:] = 0  # masks five tokens of each of two sequences
    gradients = []
    for size in (4, 1):  # sequences of a micro batch
        reduction = LossReduction(Objective(dict.fromkeys(TERMS, 0.5), dynamic=True))
        losses = outputs.clone().requires_grad_()
        micro_batches = zip(losses.split(size, dim=1), mask.split(size), strict=True)
        for micro_batch, loss_mask in micro_batches:
            total, _, _ = reduction.forward({"loss_mask": loss_mask}, micro_batch)
            total.backward()
        gradients.append(losses.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0] is not None
    # Only the weighted total has gradients, and ten of its tokens are masked.
    assert torch.equal(gradients[0].count_nonzero(dim=(1, 2)), torch.tensor([4 * 7 - 10, 0, 0, 0]))


LENGTH, BATCH, SIZE = 13, 3, 32
"""Tokens of a sequence, sequences, and the teacher's hidden size."""


def hidden_states(seed: int, size: int) -> Tensor:
    """Returns random hidden states, float64 [s, b, size]."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(LENGTH, BATCH, size, dtype=torch.float64, generator=generator)


def make_token_weights() -> Tensor:
    """Returns a weight per token, float64 [b, s]; about a third of the weights are 0."""
    generator = torch.Generator().manual_seed(9)
    values = torch.rand(2, BATCH, LENGTH, dtype=torch.float64, generator=generator)
    weights, draws = values[0], values[1]
    return weights * (draws > 0.3)


def reference_loss(distance: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the loss [b, s] of hidden states [s, b, size] by its definition."""
    if distance == "mse":
        return ((student - teacher) ** 2).mean(-1).T
    norms = student.pow(2).sum(-1).sqrt() * teacher.pow(2).sum(-1).sqrt()
    return (1 - (student * teacher).sum(-1) / norms).T


@pytest.mark.parametrize("distance", HIDDEN_LOSSES)
@pytest.mark.parametrize("student_size", [SIZE, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_the_definition(
    distance: str, student_size: int, dtype: torch.dtype
) -> None:
    student = hidden_states(1, student_size).to(dtype).requires_grad_()
    teacher = hidden_states(2, SIZE).to(dtype).requires_grad_()
    loss = HiddenLoss(distance, student_size, SIZE)
    # Megatron's TransformerLayer returns (hidden states, context).
    losses = loss((student, None), (teacher, None))
    (losses * make_token_weights().float()).sum().backward()

    student64 = student.detach().double().requires_grad_()
    projected, projection64 = student64, None
    if loss.projection is not None:
        projection64 = loss.projection.weight.detach().double().requires_grad_()
        projected = student64 @ projection64.T
    expected = reference_loss(distance, projected, teacher.detach().double())
    (expected * make_token_weights()).sum().backward()

    assert losses.dtype == torch.float32
    assert losses.shape == (BATCH, LENGTH)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    # Gradients have the student's dtype. Neighboring bfloat16 numbers differ by up to 1/128.
    rtol = 1e-4 if dtype == torch.float32 else 8e-3
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), student64.grad, rtol=rtol, atol=1e-6)
    assert teacher.grad is None
    # There is a projection only if the hidden sizes differ.
    assert (projection64 is None) == (student_size == SIZE)
    if projection64 is not None:
        assert loss.projection is not None
        gradient = loss.projection.weight.grad
        assert gradient is not None
        torch.testing.assert_close(gradient.double(), projection64.grad, rtol=1e-4, atol=1e-5)


def test_the_cosine_loss_of_nearly_parallel_bfloat16_states_is_not_rounded() -> None:
    """Computed in bfloat16, the loss would be rounded to 0 or to 1/256."""
    teacher = hidden_states(2, SIZE)
    student = (teacher + 0.02 * hidden_states(1, SIZE)).bfloat16()
    teacher = teacher.bfloat16()
    expected = reference_loss("cosine", student.double(), teacher.double())
    assert expected.max() < 1 / 256
    losses = HiddenLoss("cosine", SIZE, SIZE)(student, teacher)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-2, atol=1e-6)


def test_every_rank_initialises_the_same_projection() -> None:
    weights = []
    for rank_seed in (1, 2):
        torch.manual_seed(rank_seed)
        projection = HiddenLoss("mse", 400, 300, dtype=torch.bfloat16).projection
        assert projection is not None
        assert projection.weight.dtype == torch.bfloat16
        weights.append(projection.weight.detach())
    assert torch.equal(weights[0], weights[1])
    # This standard deviation keeps the variance of the student's states, which have size 400.
    assert weights[0].float().std().item() == pytest.approx(400**-0.5, rel=0.02)
