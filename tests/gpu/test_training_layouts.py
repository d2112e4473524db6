"""Context parallelism and recomputed activations on GPUs: the losses of one that has neither.

Sequences that are split over ranks need TransformerEngine.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.small import Small, farthest, on_gpu, record

LAYOUTS = {
    "recompute selective": (
        1,
        ["recompute_granularity=selective", "recompute_modules=[core_attn,mlp]"],
    ),
    "recompute full": (1, ["recompute_granularity=full"]),
    "CP=2": (2, ["context_parallel_size=2"]),
    "CP=2, recompute full": (2, ["context_parallel_size=2", "recompute_granularity=full"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_losses_of_one_gpu(layout: str, small: Small, results: Path) -> None:
    """Which are a CPU's within bfloat16's rounding."""
    devices, settings = LAYOUTS[layout]
    if devices > 1:
        pytest.importorskip("transformer_engine")
        if not on_gpu() or torch.cuda.device_count() < devices:
            pytest.skip(f"needs {devices} GPUs")
    name = f"layout-{list(LAYOUTS).index(layout)}"
    run_dir = small.again(name, "bf16-mixed", "distill")
    small.start(
        run_dir,
        "only=[distill]",
        "stages.distill.precision=bf16-mixed",
        f"stages.distill.resources.devices={devices}",
        *(f"stages.distill.{setting}" for setting in settings),
    )
    found = farthest(small.reference("bf16-mixed"), run_dir)
    record(results, name, layout=layout, difference=found)
    assert found < 2e-2
