"""Rates that trainings are planned with, measured here."""

from __future__ import annotations

import torch

from recipes.engines.machine_rates import training_rates


def test_rates_are_those_of_a_processor() -> None:
    """Of one thread: above what a core without vector units does, below what any core can."""
    before = torch.get_num_threads()
    rates, _ = training_rates(1)
    assert 1e9 < rates.float32_flops_per_second < 1e12
    assert 1e8 < rates.flops_per_second < 1e13
    assert 5e8 < rates.bytes_per_second < 1e12
    assert torch.get_num_threads() == before
