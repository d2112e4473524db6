"""Context parallelism and recomputed activations on real GPUs: the losses of one that has neither.

Not run without CUDA devices. Windows split over ranks need TransformerEngine.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.core.metrics import METRICS, steps_of
from tests.support.launcher import run_recipe
from tests.support.models import EVEN, write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 8
LAYOUTS = {
    "recompute selective": (1, ["recompute_granularity=selective"]),
    "recompute full": (1, ["recompute_granularity=full"]),
    "CP=2": (2, ["context_parallel_size=2"]),
    "CP=2, recompute full": (2, ["context_parallel_size=2", "recompute_granularity=full"]),
}


def losses(run_dir: Path) -> list[float]:
    return [step["loss"] for step in steps_of(run_dir / "distill" / METRICS, "distill")]


def distil(model: Path, text_file: Path, run_dir: Path, *settings: str) -> list[float]:
    done = run_recipe(
        "recipe=llama_depth_prune",
        "hardware=h100",
        f"model.hf_path={model}",
        f"data.sources=[{text_file}]",
        "data.heldout_sources=[]",
        "data.text_field=text",
        "data.seq_length=64",
        f"run_dir={run_dir}",
        "stages.only=[import_hf,prepare_data,prune,distill]",
        "stages.prune.target_num_layers=3",
        f"stages.distill.max_steps={STEPS}",
        "stages.distill.warmup_steps=1",
        *(f"stages.distill.{setting}" for setting in settings),
        cwd=run_dir.parent,
    )
    assert done.code == 0, done.output
    return losses(run_dir)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> tuple[Path, list[float]]:
    """A tiny model of heads that TransformerEngine can take, and its losses on one GPU."""
    folder = tmp_path_factory.mktemp("plain")
    shape = EVEN | {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
    model = write_tiny_model(folder / "model", text_file, **shape)
    return model, distil(model, text_file, folder / "run")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_losses_of_one_gpu(
    layout: str, plain: tuple[Path, list[float]], text_file: Path, tmp_path: Path
) -> None:
    devices, settings = LAYOUTS[layout]
    if torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} GPUs")
    model, expected = plain
    found = distil(model, text_file, tmp_path / "run", f"resources.devices={devices}", *settings)
    assert found == pytest.approx(expected, rel=0.02)
