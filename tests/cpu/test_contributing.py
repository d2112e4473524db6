"""CONTRIBUTING.md: the loss and the family that it adds compute what they should."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.contributing import copy_with, run
from tests.support.models import EVEN, FAMILIES, write_tiny_model

LOSS = """
import torch
from recipes.distillation.losses import LogitsLoss, distillation_loss

student, teacher = torch.randn(2, 64, 50, dtype=torch.float64, generator=torch.manual_seed(0))
ours, exact = student.float().requires_grad_(), student.clone().requires_grad_()
losses = distillation_loss(ours, teacher.float(), LogitsLoss("total_variation", temperature=2.0))
expected = 4 * ((teacher / 2).softmax(-1) - (exact / 2).softmax(-1)).abs().sum(-1) / 2
torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
losses.sum().backward()
expected.sum().backward()
torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
"""
FAMILY = """
import sys
from pathlib import Path
from nemo_convert import convert, parity

source, checkpoint = Path(sys.argv[1]), Path(sys.argv[2])
convert.to_nemo(source, checkpoint)
parity.compare(source, checkpoint).require(checkpoint.name)
convert.to_hf(checkpoint, checkpoint.with_name("back"))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with(tmp_path_factory.mktemp("copy"), "A loss", "A family")


def test_a_loss_is_chosen_and_equals_its_definition(copy: Path, tmp_path: Path) -> None:
    chosen = "stages.distill.logits_loss=total_variation"
    recipe = ("recipe=llama_depth_prune", "skip_rules=[disk]", f"run_dir={tmp_path}")
    done = run(copy, "launch/run.py", "dry_run=true", *recipe, chosen)
    assert done.returncode == 0, done.stderr
    done = run(copy, "-c", LOSS)
    assert done.returncode == 0, done.stderr


def test_a_family_is_converted_there_and_back(
    copy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gated as every conversion is: the same logits, and the same weights bit for bit."""
    monkeypatch.setitem(FAMILIES, "phi3", {"pad_token_id": 0})
    write_tiny_model(tmp_path / "hf", text_file, "phi3", train=False, **EVEN)
    done = run(copy, "-c", FAMILY, str(tmp_path / "hf"), str(tmp_path / "m.nemo"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back" / "model.safetensors").exists()
