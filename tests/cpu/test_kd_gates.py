"""What stops a distillation: a teacher that knows nothing, a loss that is not a number."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemo_convert import nemo
from recipes.distill import Config
from recipes.errors import RecipeError
from recipes.kd_model import KDModel
from recipes.kd_trainer import _Progress
from recipes.metrics import MetricsLog


def test_a_teacher_of_chance_level_is_refused() -> None:
    """Equal logits are a teacher whose weights never arrived."""
    nemo.initialize(nemo.Parallelism())
    logits = torch.zeros(6, 2, 300)
    output = SimpleNamespace(_intermediate_output=(logits, None))
    model = SimpleNamespace(
        core_module=SimpleNamespace(teacher_model=SimpleNamespace(output_layer=output)),
        _teacher_config=SimpleNamespace(vocab_size=300),
    )
    labels = torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(RecipeError, match=r"first batch is 5\.70"):
        KDModel.check_teacher(model, labels)  # type: ignore[arg-type]
    logits[..., 0] = 10.0
    KDModel.check_teacher(model, labels)  # type: ignore[arg-type]
    assert model.teacher_loss < 0.1  # type: ignore[attr-defined]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(bad: float) -> None:
    trainer = SimpleNamespace(
        global_step=7,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 1e-3}])],
        callback_metrics={"grad_norm": 1.0},
    )
    module = SimpleNamespace(
        last_losses={"loss": bad, "kd": 1.0}, teacher_loss=1.0, share_losses=lambda: None
    )
    with pytest.raises(RecipeError, match="step 7: loss is not finite"):
        _Progress(Config(), MetricsLog(None)).on_train_batch_end(trainer, module)
