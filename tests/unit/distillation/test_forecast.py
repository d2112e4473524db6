"""Forecasts of curves whose end is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from recipes.distillation.forecast import FEWEST, averaged, fit, forecast, in_words

TOKENS, RATE = 1000, 500.0


def steps(
    count: int,
    floor: float = 0.02,
    drop: float = 0.7,
    scale: float = 2e4,
    power: float = 0.8,
    noise: float = 0.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Records of a training whose loss is such a power law."""
    done = np.arange(1, count + 1)
    losses = floor + drop * (1 + TOKENS * done / scale) ** -power
    losses = losses + np.random.default_rng(seed).normal(0, noise, count)
    return [
        {"done": int(n), "kd": float(loss), "tokens_per_second": RATE}
        for n, loss in zip(done, losses, strict=True)
    ]


def true_tokens(share: float) -> float:
    """Where that curve has lost so much of what it begins with."""
    left = (1 - share) * 0.72 - 0.02
    return float(2e4 * ((0.7 / left) ** (1 / 0.8) - 1))


def test_a_curve_without_noise_is_found_again() -> None:
    found = forecast(steps(300), TOKENS, hourly=2.0)
    ninety = found.rows[0]
    assert ninety.tokens is not None
    assert ninety.tokens.value == pytest.approx(true_tokens(0.9), rel=0.1)
    assert ninety.hours is not None
    assert ninety.dollars is not None
    assert ninety.hours.value == pytest.approx((ninety.tokens.value - 300 * TOKENS) / RATE / 3600)
    assert ninety.dollars.value == pytest.approx(2 * ninety.hours.value)
    assert found.limit is not None
    assert found.limit.value == pytest.approx(0.7 / 0.72, abs=0.02)
    assert "90% at" in in_words(found)


def test_what_was_brought_back_before_the_training_counts() -> None:
    """Half of what was lost is back before the first step: 90% of all is 80% of the rest."""
    found = forecast(steps(300), TOKENS, left=0.5)
    whole = forecast(steps(300), TOKENS)
    assert found.recovered is not None
    assert found.limit is not None
    assert whole.recovered is not None
    assert whole.limit is not None
    assert found.recovered.value == pytest.approx(0.5 + 0.5 * whole.recovered.value)
    assert found.limit.value == pytest.approx(0.5 + 0.5 * whole.limit.value)
    assert found.rows[0].tokens is not None
    assert found.rows[0].tokens.value == pytest.approx(true_tokens(0.8), rel=0.1)
    nothing_left = forecast(steps(300), TOKENS, left=0.05).rows[0]
    assert nothing_left.tokens is not None
    assert nothing_left.tokens.value == 0


def test_intervals_hold_what_is_true_as_often_as_they_say() -> None:
    """95% of them would; 30 curves can show that it is not half."""
    goal = 0.02 + 0.7 * (1 + 600 * TOKENS / 2e4) ** -0.8
    inside = 0
    for seed in range(30):
        curve = [(TOKENS * s["done"], s["kd"]) for s in steps(200, noise=0.03, seed=seed)]
        found = fit(averaged(curve)).loss(600 * TOKENS)
        inside += found.low <= goal <= found.high
    assert inside >= 24


def test_a_long_curve_says_what_a_short_one_says() -> None:
    curve = [(TOKENS * s["done"], s["kd"]) for s in steps(3000, noise=0.02)]
    few = averaged(curve)
    assert len(few) == 500
    assert few[0] == (
        pytest.approx(3.5 * TOKENS),
        pytest.approx(np.mean([y for _, y in curve[:6]])),
    )
    assert fit(few).loss(3e6).value == pytest.approx(fit(curve).loss(3e6).value, rel=0.02)


@pytest.mark.parametrize(
    ("records", "why"),
    [
        (steps(FEWEST - 1), "are too few"),
        (steps(100, drop=1e-6, noise=0.1), "does not fall by more than its noise"),
        ([{"done": n, "lm": 3.0, "tokens_per_second": 1} for n in range(100)], "0 steps with"),
    ],
)
def test_a_curve_that_says_nothing_has_no_forecast(records: list[dict[str, Any]], why: str) -> None:
    found = forecast(records, TOKENS)
    assert why in found.why
    assert found.rows == ()
    assert why in in_words(found)


def test_what_a_curve_does_not_support_is_not_said() -> None:
    """A floor at half of the start; and tokens that a short and noisy curve leaves open."""
    high = forecast(steps(400, floor=0.5, noise=0.005), TOKENS)
    assert [row.tokens for row in high.rows] == [None] * 3
    assert {row.why for row in high.rows} == {"more than this curve comes to"}
    assert high.limit is not None
    assert high.limit.high < 0.7
    assert "; 90%, 95%, 99%: more than this curve comes to" in in_words(high)
    short = forecast(steps(40, noise=0.05), TOKENS)
    assert short.rows[-1].tokens is None
    assert "does not say more yet" in short.rows[-1].why
