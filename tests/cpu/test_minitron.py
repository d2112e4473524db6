"""Pruning itself: the gate on shapes, explicit layers, and what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_convert import convert, nemo, parity
from nemo_convert.hf import load_causal_lm
from recipes.architecture import pruned
from recipes.errors import RecipeError
from recipes.metrics import MetricsLog
from recipes.minitron import check_shapes, prune_checkpoint
from recipes.prune import Config


@pytest.fixture(scope="module")
def teacher(even_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = tmp_path_factory.mktemp("teacher") / "even.nemo"
    convert.to_nemo(even_llama, checkpoint)
    return checkpoint


@pytest.fixture
def calibration() -> torch.Tensor:
    return torch.randint(280, (8, 32), generator=torch.Generator().manual_seed(0))


def prune(teacher: Path, out: Path, calibration: torch.Tensor, **settings: object) -> Path:
    cfg = Config(hidden_size_divisor=8, ffn_hidden_size_divisor=8, **settings)  # type: ignore[arg-type]
    student = pruned(nemo.architecture_of(teacher), cfg.targets())
    prune_checkpoint(cfg, teacher, student, calibration, out / "even.nemo", MetricsLog(None))
    return out / "even.nemo"


def test_explicit_layers_with_width(
    teacher: Path, even_llama: Path, calibration: torch.Tensor, tmp_path: Path
) -> None:
    """Layers 2 and 3 go; what feed-forward rows are left are the parent's, by rank."""
    student = prune(teacher, tmp_path, calibration, drop_layers=[2, 3], target_ffn_hidden_size=64)
    weights = dict(convert.hf_weights(student))
    parent = dict(convert.hf_weights(teacher))
    for ours, theirs in ((0, 0), (1, 3)):
        kept = f"model.layers.{ours}.self_attn.q_proj.weight"
        assert torch.equal(weights[kept], parent[f"model.layers.{theirs}.self_attn.q_proj.weight"])
        down = weights[f"model.layers.{ours}.mlp.down_proj.weight"]
        whole = parent[f"model.layers.{theirs}.mlp.down_proj.weight"]
        columns = [int((whole == down[:, i : i + 1]).all(0).nonzero()) for i in range(64)]
        assert len(set(columns)) == 64
        for part in ("gate_proj", "up_proj"):
            name = f"mlp.{part}.weight"
            assert torch.equal(
                weights[f"model.layers.{ours}.{name}"],
                parent[f"model.layers.{theirs}.{name}"][columns],
            )
    assert "model.layers.2.self_attn.q_proj.weight" not in weights
    assert parity.load_core(student).config.num_layers == 2


def test_depth_pruned_model_is_the_parent_without_those_layers(
    teacher: Path, even_llama: Path, calibration: torch.Tensor, tmp_path: Path
) -> None:
    student = prune(teacher, tmp_path, calibration, drop_layers=[3])
    reference = load_causal_lm(even_llama)
    del reference.model.layers[2]
    for number, layer in enumerate(reference.model.layers):
        layer.self_attn.layer_idx = number
    reference.config.num_hidden_layers = 3
    with torch.no_grad():
        expected = reference(calibration, use_cache=False).logits
    found = parity.core_logits(parity.load_core(student), calibration)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_match_the_config_are_refused(teacher: Path) -> None:
    """ModelOpt skips a target that is not among its choices and still writes it to the config."""
    core = parity.load_core(teacher)
    shape = nemo.architecture_of(teacher)
    check_shapes(core, shape)
    with pytest.raises(RecipeError, match="do not match the config"):
        check_shapes(core, replace(shape, ffn_hidden_size=96))
    with pytest.raises(RecipeError, match="None instead of"):
        check_shapes(core, replace(shape, num_layers=5))
