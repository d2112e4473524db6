"""How the terms of the loss add up."""

from __future__ import annotations

import pytest
import torch

from recipes.distillation.objective import Objective

TERMS = {"kd": 2.0, "hidden": 8.0, "lm": 6.0}


def total(weights: dict[str, float], dynamic: bool) -> tuple[float, dict[str, float]]:
    """The total, and how much of it is each term's gradient times the term."""
    terms = {name: torch.tensor(TERMS[name], requires_grad=True) for name in weights}
    value = Objective(weights, dynamic=dynamic).total(terms)
    value.backward()
    shares = {name: float(term.grad * term.detach()) for name, term in terms.items()}
    return float(value), shares


def test_fixed_weights() -> None:
    value, shares = total({"kd": 0.5, "hidden": 0.25, "lm": 2.0}, dynamic=False)
    assert value == pytest.approx(1 + 2 + 12)
    assert shares == pytest.approx({"kd": 1, "hidden": 2, "lm": 12})


@pytest.mark.parametrize(
    ("weights", "shares"),
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
        ({"hidden": 1.0, "lm": 2.0}, {"hidden": 6, "lm": 12}),
    ],
)
def test_dynamic_scales(weights: dict[str, float], shares: dict[str, float]) -> None:
    value, found = total(weights, dynamic=True)
    assert found == pytest.approx(shares)
    assert value == pytest.approx(sum(shares.values()))


def test_a_term_of_nothing_stays_finite() -> None:
    terms = {"kd": torch.tensor(1.0), "hidden": torch.tensor(0.0)}
    weights = {"kd": 1.0, "hidden": 1.0}
    assert Objective(weights, dynamic=True).total(terms) == pytest.approx(1.0)
