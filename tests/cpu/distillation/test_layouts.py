"""Tests that a distillation has the same losses in each parallel layout, and resumes in another.

The tested distillation has everything that layouts could get wrong: all terms of the loss; a
student narrower than the teacher, so that a projection is learned; uneven pipeline stages; micro
batches with different numbers of masked tokens.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nemo_convert.convert import hf_weights
from nemo_convert.nemo import find_checkpoint
from recipes.core.manifest import ARTIFACT, WORK
from recipes.core.metrics import METRICS, steps_of
from recipes.core.run_state import REQUEST
from recipes.distillation import model
from recipes.distillation.training import CHECKPOINTS, complete_checkpoints
from tests.support.in_process import run_successfully
from tests.support.launcher import run_and_kill
from tests.support.ranks import run_ranks
from tests.support.rounding import ULP, perturb_by_one_ulp, running_max_difference
from tests.support.runs import copy_without, manifest_of, settings, tiny

MULTIPLE = 100
"""The tolerance is this multiple of the effect of changing the student's logits by one unit in the
last place (ulp). Each operation of another layout may round differently. The largest measured
multiple was 12."""
BFLOAT16_MULTIPLE = 5
"""``MULTIPLE`` in bfloat16 on one rank. The largest measured multiple was 2.3, for a weight."""
STEPS, CHECKPOINT_INTERVAL = 21, 4
"""The only validation follows step ``STEPS - 1``, so that none follows the last step. Data-parallel
ranks update the weights in shards, which a validation gathers. A validation after the last step
would hide it if saving did not gather the weights."""
LAYOUTS = {
    "TP=2": (2, "tensor_model_parallel_size=2"),
    "TP=2, sequence, early stop": (
        2,
        "tensor_model_parallel_size=2 sequence_parallel=true stop_at_recovered=0.9",
    ),
    "PP=2": (
        2,
        "pipeline_model_parallel_size=2 recompute_granularity=selective "
        "recompute_modules=[core_attn,mlp]",
    ),
    "DP=2": (2, ""),
    "DP=2, two optimizers": (2, "num_distributed_optimizer_instances=2 micro_batch_size=1"),
    "DP=2, no speed patches": (2, "cpu_speed_patches=[]"),
    "DP=1, no speed patches": (1, "cpu_speed_patches=[]"),
}
"""Number of ranks, and settings of ``distill``, by name of the layout."""


def overrides(model: Path, text_file: Path, run_dir: Path) -> list[str]:
    """Returns overrides of a run that prunes 4 layers to 3 and the width 64 to 48, and distils."""
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
        *tiny(model, text_file, run_dir),
        "only=[import_hf,prepare_data,score,prune,distill]",
        "stages.prune.target_num_layers=3",
        "stages.prune.target_hidden_size=48",
        "stages.prune.hidden_size_divisor=8",
        *settings("distill", **distill),
    ]


def layout_overrides(name: str) -> list[str]:
    """Returns the overrides for one of ``LAYOUTS``."""
    ranks, fields = LAYOUTS[name]
    return [f"stages.distill.{field}" for field in (f"resources.devices={ranks}", *fields.split())]


@pytest.fixture(scope="module")
def one_rank(even_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: the run on one rank."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    run_successfully(*overrides(even_llama, text_file, run_dir), cwd=run_dir.parent)
    return run_dir


@pytest.fixture(scope="module")
def perturbed(
    one_rank: Path, even_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run of ``one_rank``, but with the student's logits changed by one ulp in each step."""
    run_dir = copy_without(one_rank, tmp_path_factory.mktemp("perturbed") / "run", "distill")
    with perturbed_logits():
        run_successfully(*overrides(even_llama, text_file, run_dir), cwd=run_dir.parent)
    return run_dir


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

    Tolerances are ``multiple`` times the difference between ``perturbed`` and ``expected``.

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
    effects = []  # for each term, the relative effect of ``perturbed_logits`` by step
    for term in terms:
        values, perturbed_values = (
            [step[term] for step in steps[:last]] for steps in (expected_steps, perturbed_steps)
        )
        differences = zip(values, running_max_difference(values, perturbed_values), strict=True)
        effects.append([difference / abs(value) for value, difference in differences])
    # In the first steps, perturbed logits affect only some terms, but the rounding of another
    # layout affects all. So the largest effect in a step determines the tolerance of all its terms.
    # ``expected`` may have more steps than ``actual``, so the lengths are not compared.
    for step, actual_step, *step_effects in zip(
        expected_steps, actual_steps, *effects, strict=False
    ):
        for term in terms:
            tolerance = multiple * max(step_effects)
            assert actual_step[term] == pytest.approx(step[term], rel=tolerance), step["done"]
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


def test_losses_against_the_teacher_fall(one_rank: Path) -> None:
    steps = steps_of(one_rank / "distill" / METRICS, "distill")
    for term in ("kd", "hidden"):
        assert steps[-1][term] < 0.8 * steps[0][term]


def test_steps_are_traced(one_rank: Path) -> None:
    trace = one_rank / "distill" / "profile" / "steps-2-3-rank-0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    # Teacher and student each look up embeddings once per micro batch. A step has 8 sequences in
    # micro batches of 2.
    models, steps, micro_batches = 2, 2, 4
    assert names.count("aten::embedding") == models * steps * micro_batches


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_losses_of_one_rank(
    one_rank: Path, perturbed: Path, even_llama: Path, text_file: Path, tmp_path: Path, name: str
) -> None:
    run_dir = copy_without(one_rank, tmp_path / "run", "distill")
    command = [*overrides(even_llama, text_file, run_dir), *layout_overrides(name)]
    run_successfully(*command, cwd=tmp_path)
    # Early stopping ends the run at the validation after step STEPS - 1.
    stops = "stop_at_recovered=0.9" in LAYOUTS[name][1]
    require_same_training(one_rank, perturbed, run_dir, STEPS - 1 if stops else STEPS)
    assert bool(manifest_of(run_dir, "distill").metrics["stopped"]) == stops
    # Early stopping also validates before the first step.
    validations = steps_of(run_dir / "distill" / METRICS, "validate")
    assert [record["done"] for record in validations] == ([0, STEPS - 1] if stops else [STEPS - 1])
    [expected] = steps_of(one_rank / "distill" / METRICS, "validate")
    assert validations[-1]["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)


def test_speed_patches_only_round_differently_in_bfloat16(
    one_rank: Path, even_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    runs = {
        name: copy_without(one_rank, tmp_path / name, "distill")
        for name in ("patched", "perturbed", "unpatched")
    }
    for name, run_dir in runs.items():
        patches = ["stages.distill.cpu_speed_patches=[]"] if name == "unpatched" else []
        command = [
            *overrides(even_llama, text_file, run_dir),
            "stages.distill.precision=bf16-mixed",
        ]
        with perturbed_logits() if name == "perturbed" else nullcontext():
            run_successfully(*command, *patches, cwd=tmp_path)
    require_same_training(
        runs["patched"], runs["perturbed"], runs["unpatched"], multiple=BFLOAT16_MULTIPLE
    )


@pytest.mark.parametrize(("first", "second"), [("PP=2", "TP=2"), ("DP=2", "DP=2, two optimizers")])
def test_a_killed_run_resumes_in_another_layout(
    one_rank: Path,
    perturbed: Path,
    even_llama: Path,
    text_file: Path,
    tmp_path: Path,
    first: str,
    second: str,
) -> None:
    """Resuming reshards the optimizer's state. At DP=2, each rank has half of the state."""
    run_dir = copy_without(one_rank, tmp_path / "run", "distill")
    command = overrides(even_llama, text_file, run_dir)
    metrics = run_dir / "distill" / METRICS
    run_and_kill(
        *command,
        *layout_overrides(first),
        cwd=tmp_path,
        metrics=metrics,
        records=CHECKPOINT_INTERVAL + 2,
        ready=lambda: complete_checkpoints(metrics.parent / WORK / CHECKPOINTS),
    )
    result = run_successfully(*command, *layout_overrides(second), cwd=tmp_path)
    assert "resume" in result.output
    # Step 1 is recorded once, so the second command did not start again.
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    first_steps = [r for r in records if r["task"] == "distill" and r["done"] == 1]
    assert len(first_steps) == 1
    require_same_training(one_rank, perturbed, run_dir)


STALE_LISTING = """
import sys
from pathlib import Path

from recipes.core.stage import rank
from recipes.distillation import trainer

checkpoints = Path(sys.argv[1])
if rank() == 1:  # does not list step=99-last yet
    trainer.complete_checkpoints = lambda folder: [folder / "step=49-last"]
settings = trainer._resume(checkpoints, checkpoints, 1)
assert settings.resume_from_path == str(checkpoints / "step=99-last"), settings.resume_from_path
"""


def test_all_ranks_resume_from_the_checkpoint_that_rank_0_chooses(tmp_path: Path) -> None:
    """For some seconds, nodes may list different files in a folder of a network file system.

    The ranks keep only one checkpoint, so rank 0 deletes the older one.
    """
    for name in ("step=49-last", "step=99-last"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    script = tmp_path / "ranks.py"
    script.write_text(STALE_LISTING)
    run_ranks(str(script), str(tmp_path / "checkpoints"))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=99-last"]


MOVED_WEIGHTS = """
import runpy
import sys

import torch
from lightning.pytorch import LightningModule

if __name__ == "__main__":  # processes that save checkpoints import this module again
    LightningModule.cpu = lambda self: self._apply(torch.clone)  # new storage, as on CUDA
    sys.argv = ["worker", "recipes.stages.distill", sys.argv[1]]
    runpy.run_module("recipes.core.worker", run_name="__main__")
"""


def test_shards_of_weights_are_gathered_before_lightning_moves_the_weights(
    one_rank: Path, perturbed: Path, even_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """After training on CUDA, Lightning calls ``cpu``, which gives the weights new storage.

    The weights then no longer share Megatron's buffers, so a later gather does not change them. At
    DP=2, half of the weights would stay as they were before the last step.
    """
    run_dir = copy_without(one_rank, tmp_path / "run", "distill")
    command = [*overrides(even_llama, text_file, run_dir), *layout_overrides("DP=2")]
    run_successfully(*command, "dry_run=true", cwd=tmp_path)
    script = tmp_path / "ranks.py"
    script.write_text(MOVED_WEIGHTS)
    run_ranks(str(script), str(run_dir / "distill" / REQUEST))
    require_same_training(one_rank, perturbed, run_dir)
