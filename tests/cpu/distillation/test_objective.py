"""Weights and sums of the terms of the loss."""

from __future__ import annotations

import pytest
import torch

from recipes.distillation.objective import LossReduction, Objective

TERMS = {"kd": 2.0, "hidden": 8.0, "lm": 6.0}


def weighted_terms(weights: dict[str, float], dynamic: bool) -> dict[str, float]:
    """Returns each term of a step, weighted by means of the step before that are as large."""
    after = Objective(weights, dynamic=dynamic).weights_after(TERMS)
    return {name: weight * TERMS[name] for name, weight in after.items()}


def test_fixed_weights() -> None:
    terms = weighted_terms({"kd": 0.5, "hidden": 0.25, "lm": 2.0}, dynamic=False)
    assert terms == pytest.approx({"kd": 1, "hidden": 2, "lm": 12})


@pytest.mark.parametrize(
    ("weights", "terms"),
    [
        ({"kd": 1.0}, {"kd": 2}),
        ({"lm": 3.0}, {"lm": 18}),
        ({"hidden": 0.5}, {"hidden": 4}),
        # hidden is as large as kd
        ({"kd": 1.0, "hidden": 1.0}, {"kd": 2, "hidden": 2}),
        ({"kd": 1.0, "hidden": 0.5}, {"kd": 2, "hidden": 1}),
        # kd is as large as lm, then weighted
        ({"kd": 0.5, "lm": 1.0}, {"kd": 3, "lm": 6}),
        # both together are as large as lm
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
    """Compares one micro batch of four sequences with four of one."""
    outputs = torch.rand(4, 4, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 7)
    mask[1:3, 2:] = 0
    gradients = []
    for size in (4, 1):
        reduction = LossReduction(Objective(dict.fromkeys(TERMS, 0.5), dynamic=True))
        leaf = outputs.clone().requires_grad_()
        for part, masked in zip(leaf.split(size, dim=1), mask.split(size), strict=True):
            reduction.forward({"loss_mask": masked}, part)[0].backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0] is not None
    assert torch.equal(gradients[0].count_nonzero(dim=(1, 2)), torch.tensor([4 * 7 - 10, 0, 0, 0]))
