"""A small model's chain, which runs once on the CPU, and then stage by stage on the GPU."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from recipes.core.metrics import METRICS, Record, steps_of
from tests.gpu.plan import ON_CPU
from tests.support.launcher import run_recipe
from tests.support.models import EVEN, write_tiny_model
from tests.support.runs import copy_without, settings, tiny

CHAIN = "llama_depth_prune"
STEPS = 20
SHAPE = EVEN | {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
"""Every attention kernel supports this head size, and FP8 supports these sizes."""
PRECISIONS = ("32", "bf16-mixed")
REFERENCE_STAGES = "only=[import_hf,prepare_data,score,prune,distill]"
DISTILL = {
    "global_batch_size": 8,
    "max_steps": STEPS,
    "warmup_steps": 2,
    "lr": 1e-3,
    "min_lr": 3e-4,
    "val_check_interval": STEPS,
    "checkpoint_interval": STEPS // 2,
}


def on_gpu() -> bool:
    """Whether the tests run on a GPU. On a CPU they check only the tests' own code."""
    return ON_CPU not in os.environ


@contextmanager
def without_gpu() -> Iterator[None]:
    """Hides the GPU from child processes."""
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        yield


def record(results: Path, name: str, **values: object) -> None:
    """Writes results to ``NAME.json``, and prints them."""
    text = json.dumps(values, indent=1)
    (results / f"{name}.json").write_text(text)
    print(text)


@dataclass(frozen=True)
class Small:
    """A small model, its text, and the folder of its runs."""

    folder: Path
    model: Path
    text: Path

    def reference(self, precision: str) -> Path:
        """Returns the directory of the run on the CPU."""
        return self.folder / f"cpu-{precision}"

    def start(self, run_dir: Path, *more: str, **groups: str) -> str:
        """Runs the launcher; returns what it printed.

        Raises:
            AssertionError: It failed.
        """
        done = run_recipe(*self.command(run_dir, *more, **groups), cwd=self.folder)
        assert done.code == 0, done.output
        return done.output

    def command(
        self, run_dir: Path, *more: str, recipe: str = CHAIN, engine: str = "null"
    ) -> list[str]:
        """Overrides of a run of the model."""
        of_chain = [f"engine={engine}", "tasks=null", *settings("prune", **PRUNE)]
        of_chain += settings("distill", **DISTILL)
        return [
            f"recipe={recipe}",
            f"hardware={'h100' if on_gpu() else 'cpu'}",
            "skip_rules=[stack-versions]",  # engines for CPUs may be missing
            *tiny(self.model, self.text, run_dir),
            *(of_chain if recipe == CHAIN else []),
            *more,
        ]

    def copy_of_reference(self, name: str, precision: str, *stages: str) -> Path:
        """Copies the CPU's run without some stages; returns the copy."""
        run_dir = self.folder / name
        shutil.rmtree(run_dir, ignore_errors=True)
        return copy_without(self.reference(precision), run_dir, *stages)


PRUNE = {"target_num_layers": 3, "target_hidden_size": 192}


def reference(results: Path, text_file: Path) -> Small:
    """Returns the small model; makes it and distils it on the CPU if that is not done yet."""
    folder = results / "small"
    small = Small(folder, folder / "model", folder / "text.jsonl")
    if not small.text.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_tiny_model(small.model, text_file, **SHAPE)
        shutil.copy(text_file, small.text)
    with without_gpu():
        for precision in PRECISIONS:
            run_dir = small.reference(precision)
            if precision != PRECISIONS[0] and not run_dir.exists():
                small.copy_of_reference(run_dir.name, PRECISIONS[0], "distill")
            small.start(run_dir, REFERENCE_STAGES, f"stages.distill.precision={precision}")
    return small


def steps(run_dir: Path) -> list[Record]:
    """Returns the records of all steps of a distillation."""
    return steps_of(run_dir / "distill" / METRICS, "distill")


def largest_difference(expected: Path, run_dir: Path, term: str = "loss") -> float:
    """Returns the largest relative difference of a term between two distillations at any step."""
    pairs = list(zip(steps(expected), steps(run_dir), strict=True))
    assert len(pairs) == STEPS
    return max(abs(two[term] / one[term] - 1) for one, two in pairs)
