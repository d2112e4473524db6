"""Rates that trainings are planned with, measured here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nemo_convert.architecture import Architecture
from recipes.engines import machine_rates
from recipes.engines.machine_rates import (
    ENOUGH_SECONDS,
    MIN_REPEATS,
    TOKENS,
    best_seconds,
    training_rates,
)

SMOLLM2 = Architecture(
    "LlamaForCausalLM", 30, 576, 1536, 9, 3, 64, 49152, 8192, tied_embeddings=True
)


def test_rates_are_those_of_a_processor() -> None:
    """Of one thread: above what a core without vector units does, below what any core can."""
    before = torch.get_num_threads()
    rates, _ = training_rates(1)
    assert 1e9 < rates.float32_flops_per_second < 1e12
    assert 1e8 < rates.flops_per_second < 1e13
    assert 5e8 < rates.bytes_per_second < 1e12
    assert torch.get_num_threads() == before
    # The time of helper threads is counted late: GEMMs of a millisecond seemed twice as fast.
    both, _ = training_rates(2)
    assert both.float32_flops_per_second < 3 * rates.float32_flops_per_second
    assert both.flops_per_second < 3 * rates.flops_per_second


@pytest.mark.parametrize("rate", [4e11, 4e8])
def test_a_rate_is_the_mean_over_all_gemms_of_a_model(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor that is slower in the head, or that emulates the type, which shows at once."""
    counted = []

    def seconds(work: Callable[[], object], device: str = "cpu") -> float:
        if "copy" in work.__qualname__:
            return 1.0
        with FlopCounterMode(display=False) as counter:
            work()
        counted.append(flops := counter.get_total_flops())
        return flops / (rate / 2 if len(counted) % 3 == 0 else rate)

    monkeypatch.setattr(machine_rates, "best_cpu_seconds", seconds)
    rates, _ = training_rates(1)
    if rate < 1e9:
        assert rates.flops_per_second == rates.float32_flops_per_second == rate
        assert len(counted) == 2
        return
    head = 2 * SMOLLM2.vocab_size * SMOLLM2.hidden_size
    layers = 2 * SMOLLM2.active_weights() - head
    assert rates.flops_per_second == pytest.approx((layers + head) / (layers + 2 * head) * rate)
    assert counted[1] % (4 * TOKENS * layers / SMOLLM2.num_layers) == 0


@pytest.mark.parametrize(
    ("seconds", "runs"), [(ENOUGH_SECONDS / 100, 9), (ENOUGH_SECONDS / 4, 4), (9.0, MIN_REPEATS)]
)
def test_slow_operations_are_repeated_less_often(seconds: float, runs: int) -> None:
    now = [0.0]

    def work() -> None:
        now.append(now[-1] + seconds)

    assert best_seconds(work, clock=lambda: now[-1], repeats=9) == pytest.approx(seconds)
    assert len(now) - 2 == runs  # the start, and a run that warms up
