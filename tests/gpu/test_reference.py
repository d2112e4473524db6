"""What the GPU is compared with."""

from __future__ import annotations

from tests.gpu.small import PRECISIONS, STEPS, Small, steps


def test_the_cpu_learns(small: Small) -> None:
    for precision in PRECISIONS:
        found = steps(small.reference(precision))
        assert len(found) == STEPS
        assert found[-1]["kd"] < 0.8 * found[0]["kd"]
