"""Distillation on two gloo ranks gives what one rank gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nemo_convert.convert import hf_weights
from nemo_convert.nemo import find_checkpoint
from recipes.manifest import ARTIFACT
from recipes.metrics import METRICS, steps_of
from tests.conftest import run_recipe

STEPS = 8


def overrides(model: Path, text_file: Path, run_dir: Path) -> list[str]:
    return [
        "recipe=llama_depth_prune",
        f"model.hf_path={model}",
        f"data.sources=[{text_file}]",
        "data.text_field=text",
        "data.seq_length=64",
        f"run_dir={run_dir}",
        "stages.only=[import_hf,prepare_data,prune,distill]",
        "stages.prune.target_num_layers=2",
        "stages.distill.precision=32",
        "stages.distill.global_batch_size=8",
        "stages.distill.micro_batch_size=2",
        "stages.distill.lm_weight=0.5",
        f"stages.distill.max_steps={STEPS}",
        "stages.distill.warmup_steps=2",
        f"stages.distill.val_check_interval={STEPS}",
    ]


@pytest.fixture(scope="module")
def one_rank(even_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    result = run_recipe(*overrides(even_llama, text_file, run_dir), cwd=run_dir.parent)
    assert result.code == 0, result.output
    return run_dir


@pytest.mark.parametrize(
    "layout",
    ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "micro_batch_size=2"],
    ids=["TP=2", "PP=2", "DP=2"],
)
def test_two_ranks_give_the_losses_of_one(
    one_rank: Path, even_llama: Path, text_file: Path, tmp_path: Path, layout: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(one_rank, run_dir)
    shutil.rmtree(run_dir / "distill")
    result = run_recipe(
        *overrides(even_llama, text_file, run_dir),
        "stages.distill.resources.devices=2",
        f"stages.distill.{layout}",
        cwd=tmp_path,
    )
    assert result.code == 0, result.output
    expected = steps_of(one_rank / "distill" / METRICS, "distill")
    found = steps_of(run_dir / "distill" / METRICS, "distill")
    assert len(found) == len(expected) == STEPS
    for one, two in zip(expected, found, strict=True):
        for term in ("loss", "kd", "lm", "grad_norm"):
            assert two[term] == pytest.approx(one[term], rel=1e-3), (one["done"], term)
    validated = [steps_of(d / "distill" / METRICS, "validate")[-1] for d in (one_rank, run_dir)]
    assert validated[1]["val_loss"] == pytest.approx(validated[0]["val_loss"], rel=1e-4)
    first, second = (
        dict(hf_weights(find_checkpoint(d / "distill" / ARTIFACT))) for d in (one_rank, run_dir)
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
