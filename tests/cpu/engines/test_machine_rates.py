"""Rates that trainings are planned with, measured here."""

from __future__ import annotations

import pytest
import torch

from recipes.engines.machine_rates import ENOUGH, FEWEST, best_seconds, training_rates


def test_rates_are_those_of_a_processor() -> None:
    """Of one thread: above what a core without vector units does, below what any core can."""
    before = torch.get_num_threads()
    rates, _ = training_rates(1)
    assert 1e9 < rates.float32_flops_per_second < 1e12
    assert 1e8 < rates.flops_per_second < 1e13
    assert 5e8 < rates.bytes_per_second < 1e12
    assert torch.get_num_threads() == before
    # What helpers take is not seen at once: products of a millisecond seemed twice as fast.
    both, _ = training_rates(2)
    assert both.float32_flops_per_second < 3 * rates.float32_flops_per_second
    assert both.flops_per_second < 3 * rates.flops_per_second


@pytest.mark.parametrize(("seconds", "runs"), [(ENOUGH / 100, 9), (ENOUGH / 4, 4), (9.0, FEWEST)])
def test_what_takes_long_is_measured_less_often(seconds: float, runs: int) -> None:
    now = [0.0]

    def work() -> None:
        now.append(now[-1] + seconds)

    assert best_seconds(work, clock=lambda: now[-1], repeats=9) == pytest.approx(seconds)
    assert len(now) - 2 == runs  # the start, and a run that warms up
