"""Tests kernels for GPUs: float32 GEMMs, TransformerEngine's layers, fused Adam."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_convert.nemo import find_checkpoint
from nemo_convert.parity import LOGITS_TOLERANCE
from recipes.backend.adamw import FusedAdamW
from recipes.core.manifest import ARTIFACT
from recipes.core.versions import TRANSFORMER_ENGINE, installed_version
from tests.gpu.small import Small, on_gpu, output_of, record

FLOAT32_ERROR = """
import torch
from recipes.core.processes import prepare_imports
prepare_imports()
torch.backends.cuda.matmul.allow_tf32 = True  # as NGC's images and TransformerEngine set it
device = "cuda" if torch.cuda.is_available() else "cpu"
a, b = (torch.randn(1024, 1024, device=device) for _ in "ab")
exact = a.double() @ b.double()
print(((a @ b - exact).abs().max() / exact.std()).item())
"""
"""Code that prints the largest error of a float32 GEMM, divided by the result's standard deviation.
It runs in a separate process, because cuBLAS reads ``NVIDIA_TF32_OVERRIDE`` only once."""
TE_CHECK = """
import json, sys
from pathlib import Path
from recipes.core.processes import prepare_imports
prepare_imports()
layers, folder, checkpoint = sys.argv[1:]
if layers == "local":
    sys.modules["transformer_engine"] = None  # importing it then fails
    from recipes.backend import local_layers
    local_layers.installed_version = lambda name: None
from nemo_convert import parity
core = parity.load_core(Path(checkpoint))
modules = {type(module).__module__ for module in core.modules()}
comparison = parity.compare(Path(folder), Path(checkpoint), core)
has_te_layers = any("transformer_engine" in name for name in modules)
print(json.dumps([has_te_layers, comparison.max_logit_difference / comparison.logits_std]))
"""
"""Code that prints whether a model has TransformerEngine's layers, and its largest logit difference
from the model's plain PyTorch reference, divided by the logits' standard deviation.

The first argument is "local" for Megatron's local layers. With "installed" the model has
TransformerEngine's layers if TransformerEngine is installed.
"""
ADAM_SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_float32_is_not_tensorfloat_32(results: Path) -> None:
    """With TensorFloat-32 the error would be 1e-3."""
    error = float(output_of(FLOAT32_ERROR))
    record(results, "float32", error=error)
    assert error < 1e-5


@pytest.mark.parametrize("source", ["local", "transformer_engine"])
def test_first_optimizer_steps_equal_those_of_adamw(source: str, results: Path) -> None:
    """Takes two steps: the first creates the optimizer's moments, the second reads them."""
    if source == "local":
        optimizer_class: Any = FusedAdamW
    else:
        optimizers = pytest.importorskip("transformer_engine.pytorch.optimizers")
        optimizer_class = optimizers.FusedAdam
    torch.manual_seed(1)
    start = [torch.randn(1000, 33), torch.randn(7)]
    gradients = [[torch.randn_like(weight) for weight in start] for _ in range(2)]
    device = "cuda" if on_gpu() else "cpu"

    def final_weights(make_optimizer: Any, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        weights = [torch.nn.Parameter(weight.to(device, dtype)) for weight in start]
        optimizer = make_optimizer(weights, **ADAM_SETTINGS)
        for step_gradients in gradients:
            for weight, gradient in zip(weights, step_gradients, strict=True):
                weight.grad = gradient.to(device, dtype)
            optimizer.step()
        return [weight.detach().cpu().double() for weight in weights]

    expected = final_weights(torch.optim.AdamW, torch.float64, "cpu")
    actual = final_weights(optimizer_class, torch.float32, device)
    difference = max((a - b).abs().max().item() for a, b in zip(actual, expected, strict=True))
    record(results, f"optimizer-{source}", difference=difference)
    assert difference < 1e-6


def test_transformer_engine_is_used_and_has_the_logits_of_local_layers(
    small: Small, results: Path
) -> None:
    is_installed = on_gpu() and installed_version(TRANSFORMER_ENGINE) is not None
    checkpoint = find_checkpoint(small.reference_dir(precision="32") / "import_hf" / ARTIFACT)
    paths = str(small.model), str(checkpoint)
    # By type of layers: whether they are TransformerEngine's, and the logit difference.
    checks = {
        layers: json.loads(output_of(TE_CHECK, layers, *paths)) for layers in ("installed", "local")
    }
    record(results, "layers", te_is_installed=is_installed, te_is_used_and_difference=checks)
    assert [has_te_layers for has_te_layers, _ in checks.values()] == [is_installed, False]
    assert max(difference for _, difference in checks.values()) < LOGITS_TOLERANCE
    if not is_installed:
        pytest.skip("TransformerEngine is not used here; local layers passed")
