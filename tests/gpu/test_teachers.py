"""A cached teacher gives a live one's losses; hidden states and their projection the CPU's."""

from __future__ import annotations

from pathlib import Path

from tests.gpu.small import DISTILL, STEPS, Small, farthest, record, without_gpu

ONLY, PRECISION = "only=[distill]", "stages.distill.precision=32"
CACHED = (
    "teacher=cached",
    "only=[cache_logits,distill]",
    "stages.cache_logits.top_k=280",  # nearly all of its tokens
    f"stages.cache_logits.num_sequences={DISTILL['global_batch_size'] * STEPS}",
)
HIDDEN = (ONLY, "stages.distill.hidden_weight=1", "stages.distill.loss_balancer=dynamic")


def test_a_cached_teacher_is_the_live_one(small: Small, results: Path) -> None:
    run_dir = small.again("cached", "32", "distill")
    small.start(run_dir, *CACHED, PRECISION)
    found = farthest(small.reference("32"), run_dir, "kd")
    record(results, "cached", difference=found)
    assert found < 2e-2


def test_hidden_states_are_compared_as_on_a_cpu(small: Small, results: Path) -> None:
    """Widths differ, so a projection is learned."""
    runs = [small.again(name, "32", "distill") for name in ("hidden-cpu", "hidden-gpu")]
    with without_gpu():
        small.start(runs[0], *HIDDEN, PRECISION)
    small.start(runs[1], *HIDDEN, PRECISION)
    found = {term: farthest(*runs, term) for term in ("loss", "kd", "hidden")}
    record(results, "hidden", differences=found)
    assert found["loss"] < 1e-2
    assert found["hidden"] < 2e-2
