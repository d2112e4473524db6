"""Runs a small distillation, and compares its losses and weights in different parallel layouts.

The distillation has everything that layouts could get wrong: all terms of the loss; a student
narrower than the teacher, so that a projection is learned; uneven pipeline stages; micro batches
with different numbers of masked tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nemo_convert.convert import hf_weights
from nemo_convert.nemo import find_checkpoint
from recipes.core.manifest import ARTIFACT, WORK
from recipes.core.metrics import METRICS, steps_of
from recipes.distillation import model
from recipes.distillation.training import CHECKPOINTS, complete_checkpoints
from tests.support.launcher import run_and_kill
from tests.support.rounding import ULP, perturb_by_one_ulp
from tests.support.runs import settings, tiny

MULTIPLE = 100
"""The tolerance is this multiple of the effect of changing the student's logits by one unit in the
last place (ulp). Each operation of another layout may round differently. The largest measured
multiple was 12."""
STEPS, CHECKPOINT_INTERVAL = 21, 4
"""The only validation follows step ``STEPS - 1``, so that none follows the last step. Data-parallel
ranks update the weights in shards, which a validation gathers. A validation after the last step
would hide it if saving did not gather the weights."""


def overrides(model: Path, text_file: Path) -> list[str]:
    """Returns overrides of a run that prunes 4 layers to 3 and the width 64 to 48, and distils.

    The run's directory is ``run`` in the working directory.
    """
    distill = {
        "precision": 32,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "hidden_weight": 0.5,
        "intermediate_layer_pairs": "[[3,4]]",
        "lm_weight": 0.5,
        "loss_balancer": "dynamic",
        "lr": 1e-3,
        "min_lr": 3e-4,
        "max_steps": STEPS,
        "warmup_steps": 2,
        "val_check_interval": STEPS - 1,
        "checkpoint_interval": CHECKPOINT_INTERVAL,
        "profile_steps": "[2,3]",
    }
    return [
        "recipe=llama_depth_prune",
        *tiny(model, text_file, Path("run")),
        "only=[import_hf,prepare_data,score,prune,distill]",
        "stages.prune.target_num_layers=3",
        "stages.prune.target_hidden_size=48",
        "stages.prune.hidden_size_divisor=8",
        *settings("distill", **distill),
    ]


def layout_overrides(ranks: int, fields: str) -> list[str]:
    """Returns the overrides of a layout. ``fields`` are settings of ``distill``."""
    return [f"stages.distill.{field}" for field in (f"resources.devices={ranks}", *fields.split())]


def kill_after_checkpoint(*command: str, cwd: Path) -> None:
    """Runs a command in the folder ``cwd``, and kills it between two checkpoints."""
    stage = cwd / "run" / "distill"
    run_and_kill(
        *command,
        cwd=cwd,
        metrics=stage / METRICS,
        records=CHECKPOINT_INTERVAL + 2,
        ready=lambda: complete_checkpoints(stage / WORK / CHECKPOINTS),
    )


@contextmanager
def perturbed_logits() -> Iterator[None]:
    """Changes the student's logits by one ulp of their type in each step."""
    loss = model.combined_loss

    def perturbed_loss(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return loss(perturb_by_one_ulp(logits), *args, **kwargs)

    with mock.patch.object(model, "combined_loss", perturbed_loss):
        yield


def require_same_training(
    expected: Path, perturbed: Path, actual: Path, last: int = STEPS, multiple: int = MULTIPLE
) -> None:
    """Asserts that the run ``actual`` has the losses and the final weights of ``expected``.

    Validation losses may differ by 0.1%. Other tolerances are ``multiple`` times the difference
    between ``perturbed`` and ``expected``.

    Args:
        expected: Directory of the reference run.
        perturbed: Directory of a run like ``expected``, but with ``perturbed_logits``.
        actual: Directory of the tested run.
        last: Last step of ``actual``. Before ``STEPS``, final weights are not compared.
        multiple: Factor of the tolerances.
    """
    expected_steps, perturbed_steps, actual_steps = (
        steps_of(run / "distill" / METRICS, "distill") for run in (expected, perturbed, actual)
    )
    assert [step["done"] for step in actual_steps] == [*range(1, last + 1)]
    terms = ("loss", "kd", "hidden", "lm", "grad_norm")
    effects = dict.fromkeys(terms, 0.0)  # largest effect of ``perturbed_logits`` so far, by term
    for step, perturbed_step, actual_step in zip(
        expected_steps[:last], perturbed_steps[:last], actual_steps, strict=True
    ):
        for term in terms:
            effect = abs(perturbed_step[term] - step[term])
            effects[term] = max(effects[term], effect, ULP * abs(step[term]))
        # In the first steps, perturbed logits affect only some terms, but the rounding of another
        # layout affects all. So the largest relative effect is the tolerance of all terms.
        tolerance = multiple * max(effects[term] / abs(step[term]) for term in terms)
        for term in terms:
            assert actual_step[term] == pytest.approx(step[term], rel=tolerance), step["done"]
    validation, actual_validation = (
        steps_of(run / "distill" / METRICS, "validate")[-1] for run in (expected, actual)
    )
    assert actual_validation["val_loss"] == pytest.approx(validation["val_loss"], rel=1e-3)
    if last < STEPS:
        return  # the weights of ``expected`` are of a later step
    weights, perturbed_weights, actual_weights = (
        dict(hf_weights(find_checkpoint(run / "distill" / ARTIFACT)))
        for run in (expected, perturbed, actual)
    )
    assert weights.keys() == actual_weights.keys()
    for name, tensor in weights.items():
        effect = max((perturbed_weights[name] - tensor).abs().max().item(), ULP)
        assert (actual_weights[name] - tensor).abs().max() <= multiple * effect, name
