"""Tests that a distillation has the same losses in each parallel layout, and resumes in another."""

from __future__ import annotations

import gzip
import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from recipes.core.metrics import METRICS, read_records, steps_of
from recipes.core.run_state import REQUEST
from tests.support.in_process import run_successfully
from tests.support.layouts import (
    STEPS,
    kill_after_checkpoint,
    layout_overrides,
    overrides,
    perturbed_logits,
    require_same_training,
)
from tests.support.ranks import run_ranks
from tests.support.runs import copy_without, manifest_of

BFLOAT16_MULTIPLE = 5
"""``MULTIPLE`` in bfloat16 on one rank. The largest measured multiple was 2.3, for a weight."""
LAYOUTS = {
    "TP=2": layout_overrides(2, "tensor_model_parallel_size=2"),
    "TP=2, sequence, early stop": layout_overrides(
        2, "tensor_model_parallel_size=2 sequence_parallel=true stop_at_recovered=0.9"
    ),
    "PP=2": layout_overrides(
        2,
        "pipeline_model_parallel_size=2 recompute_granularity=selective "
        "recompute_modules=[core_attn,mlp]",
    ),
    "DP=2": layout_overrides(2, ""),
    "DP=2, two optimizers": layout_overrides(
        2, "num_distributed_optimizer_instances=2 micro_batch_size=1"
    ),
    "DP=2, no speed patches": layout_overrides(2, "cpu_speed_patches=[]"),
}
"""Overrides by name of the layout."""


@pytest.fixture(scope="module")
def command(even_llama: Path, text_file: Path) -> list[str]:
    """The overrides of a run on one rank."""
    return overrides(even_llama, text_file)


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


@pytest.mark.parametrize("name", ["TP=2, sequence, early stop", "PP=2", "DP=2, no speed patches"])
def test_every_layout_has_the_losses_of_one_rank(
    one_rank: Path, perturbed: Path, command: list[str], tmp_path: Path, name: str
) -> None:
    """Other tests have the remaining layouts."""
    run_dir = copy_without(one_rank, tmp_path / "run", "distill")
    run_successfully(*command, *LAYOUTS[name], cwd=tmp_path)
    # Early stopping ends the run at the validation after step STEPS - 1.
    stops = "early stop" in name
    require_same_training(one_rank, perturbed, run_dir, STEPS - 1 if stops else STEPS)
    assert bool(manifest_of(run_dir, "distill").metrics["stopped"]) == stops
    # Early stopping also validates before the first step.
    validations = steps_of(run_dir / "distill" / METRICS, "validate")
    assert [record["done"] for record in validations] == ([0, STEPS - 1] if stops else [STEPS - 1])


def test_speed_patches_only_round_differently_in_bfloat16(
    one_rank: Path, command: list[str], tmp_path: Path
) -> None:
    runs = {
        name: copy_without(one_rank, tmp_path / name / "run", "distill")
        for name in ("patched", "perturbed", "unpatched")
    }
    for name, run_dir in runs.items():
        patches = ["stages.distill.cpu_speed_patches=[]"] if name == "unpatched" else []
        with perturbed_logits() if name == "perturbed" else nullcontext():
            run_successfully(
                *command, "stages.distill.precision=bf16-mixed", *patches, cwd=run_dir.parent
            )
    require_same_training(
        runs["patched"], runs["perturbed"], runs["unpatched"], multiple=BFLOAT16_MULTIPLE
    )


@pytest.mark.parametrize(("first", "second"), [("PP=2", "TP=2"), ("DP=2", "DP=2, two optimizers")])
def test_a_killed_run_resumes_in_another_layout(
    one_rank: Path, perturbed: Path, command: list[str], tmp_path: Path, first: str, second: str
) -> None:
    """Resuming reshards the optimizer's state. At DP=2, each rank has half of the state."""
    run_dir = copy_without(one_rank, tmp_path / "run", "distill")
    kill_after_checkpoint(*command, *LAYOUTS[first], cwd=tmp_path)
    result = run_successfully(*command, *LAYOUTS[second], cwd=tmp_path)
    assert "resume" in result.output
    # Step 1 is recorded once, so the second command did not start again.
    records = read_records(run_dir / "distill" / METRICS)
    assert sum(r["task"] == "distill" and r["done"] == 1 for r in records) == 1
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
    one_rank: Path, perturbed: Path, command: list[str], tmp_path: Path
) -> None:
    """After training on CUDA, Lightning calls ``cpu``, which gives the weights new storage.

    The weights then no longer share Megatron's buffers, so a later gather does not change them. At
    DP=2, half of the weights would stay as they were before the last step.
    """
    run_dir = copy_without(one_rank, tmp_path / "run", "distill")
    run_successfully(*command, *LAYOUTS["DP=2"], "dry_run=true", cwd=tmp_path)
    script = tmp_path / "ranks.py"
    script.write_text(MOVED_WEIGHTS)
    run_ranks(str(script), str(run_dir / "distill" / REQUEST))
    require_same_training(one_rank, perturbed, run_dir)
