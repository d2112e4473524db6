"""The loss: weights and sums of the terms. The hidden loss equals its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recipes.distillation.objective import HiddenLoss, LossReduction, Objective
from recipes.distillation.settings import HIDDEN_LOSSES

TERMS = {"kd": 2.0, "hidden": 8.0, "lm": 6.0}


def weighted_terms(weights: dict[str, float], dynamic: bool) -> dict[str, float]:
    """Returns a step's weighted terms. Unweighted, they are ``TERMS``, as in the step before."""
    next_weights = Objective(weights, dynamic=dynamic).weights_after(TERMS)
    return {name: weight * TERMS[name] for name, weight in next_weights.items()}


def test_fixed_weights() -> None:
    terms = weighted_terms({"kd": 0.5, "hidden": 0.25, "lm": 2.0}, dynamic=False)
    assert terms == pytest.approx({"kd": 1, "hidden": 2, "lm": 12})


@pytest.mark.parametrize(
    ("weights", "terms"),
    [
        ({"kd": 1.0}, {"kd": 2}),
        ({"lm": 3.0}, {"lm": 18}),
        ({"hidden": 0.5}, {"hidden": 4}),
        # "hidden" is scaled to "kd", then weighted
        ({"kd": 1.0, "hidden": 1.0}, {"kd": 2, "hidden": 2}),
        ({"kd": 1.0, "hidden": 0.5}, {"kd": 2, "hidden": 1}),
        # "kd" is scaled to "lm", then weighted
        ({"kd": 0.5, "lm": 1.0}, {"kd": 3, "lm": 6}),
        # the sum of "kd" and "hidden" is scaled to "lm", then multiplied by the weight of "kd"
        ({"kd": 1.0, "hidden": 1.0, "lm": 1.0}, {"kd": 3, "hidden": 3, "lm": 6}),
        ({"kd": 2.0, "hidden": 0.5, "lm": 1.0}, {"kd": 8, "hidden": 4, "lm": 6}),
        ({"hidden": 1.0, "lm": 2.0}, {"hidden": 6, "lm": 12}),
    ],
)
def test_dynamic_weights(weights: dict[str, float], terms: dict[str, float]) -> None:
    assert weighted_terms(weights, dynamic=True) == pytest.approx(terms)


def test_a_term_of_zero_is_not_scaled() -> None:
    objective = Objective({"kd": 1.0, "hidden": 0.5}, dynamic=True)
    assert objective.weights_after({"kd": 1.0, "hidden": 0.0}) == {"kd": 1.0, "hidden": 0.5}


def test_gradients_do_not_depend_on_the_micro_batch() -> None:
    """Compares one micro batch of four sequences with four micro batches of one sequence."""
    # [1 + terms, sequences, tokens]
    outputs = torch.rand(4, 4, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 7)
    mask[1:3, 2:] = 0
    gradients = []
    for size in (4, 1):
        reduction = LossReduction(Objective(dict.fromkeys(TERMS, 0.5), dynamic=True))
        leaf = outputs.clone().requires_grad_()
        for micro_batch, loss_mask in zip(leaf.split(size, dim=1), mask.split(size), strict=True):
            reduction.forward({"loss_mask": loss_mask}, micro_batch)[0].backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0] is not None
    # Only the first row, the weighted sum, has gradients; ten of its tokens are masked.
    assert torch.equal(gradients[0].count_nonzero(dim=(1, 2)), torch.tensor([4 * 7 - 10, 0, 0, 0]))


LENGTH, BATCH, SIZE = 13, 3, 32
EACH_LOSS = pytest.mark.parametrize("kind", HIDDEN_LOSSES)
EACH_SIZE = pytest.mark.parametrize("size", [SIZE, 24])


def states(seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(LENGTH, BATCH, size, dtype=torch.float64, generator=generator)


def make_weights() -> Tensor:
    """Returns weights per token [b, s], about a third of them 0."""
    generator = torch.Generator().manual_seed(9)
    values = torch.rand(2, BATCH, LENGTH, dtype=torch.float64, generator=generator)
    return values[0] * (values[1] > 0.3)


def reference(kind: str, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    """Computes the loss [b, s] by its definition."""
    projected = student if weight is None else torch.einsum("sbi,oi->sbo", student, weight)
    if kind == "mse":
        loss = ((projected - teacher) ** 2).sum(-1) / SIZE
    else:
        norms = projected.pow(2).sum(-1).sqrt() * teacher.pow(2).sum(-1).sqrt()
        loss = 1 - (projected * teacher).sum(-1) / norms
    return loss.transpose(0, 1)


@EACH_LOSS
@EACH_SIZE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_the_definition(
    kind: str, size: int, dtype: torch.dtype
) -> None:
    student = states(1, size).to(dtype).requires_grad_()
    teacher = states(2, SIZE).to(dtype).requires_grad_()
    loss = HiddenLoss(kind, size, SIZE)
    # Megatron's TransformerLayer returns (hidden states, context).
    losses = loss((student, None), (teacher, None))
    (losses * make_weights().float()).sum().backward()

    exact = student.detach().double().requires_grad_()
    weight = None
    if loss.projection is not None:
        weight = loss.projection.weight.detach().double().requires_grad_()
    expected = reference(kind, exact, teacher.detach().double(), weight)
    (expected * make_weights()).sum().backward()

    assert losses.dtype == torch.float32
    assert losses.shape == (BATCH, LENGTH)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    rtol = 1e-4 if dtype == torch.float32 else 8e-3
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=rtol, atol=1e-6)
    assert teacher.grad is None
    assert (weight is None) == (size == SIZE)
    if weight is not None:
        assert loss.projection is not None
        gradient = loss.projection.weight.grad
        assert gradient is not None
        torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-4, atol=1e-5)


def test_a_small_angle_survives_bfloat16() -> None:
    """In bfloat16, the loss of nearly parallel states would be rounded to 0 or to 1/256."""
    teacher = states(2, SIZE)
    student, teacher = (x.bfloat16() for x in (teacher + 0.02 * states(1, SIZE), teacher))
    expected = reference("cosine", student.double(), teacher.double(), None)
    assert expected.max() < 1 / 256
    losses = HiddenLoss("cosine", SIZE, SIZE)(student, teacher)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-2, atol=1e-6)


def test_every_rank_initialises_the_same_projection() -> None:
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        projection = HiddenLoss("mse", 400, 300, dtype=torch.bfloat16).projection
        assert projection is not None
        assert projection.weight.dtype == torch.bfloat16
        weights.append(projection.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert weights[0].float().std().item() == pytest.approx(400**-0.5, rel=0.02)
