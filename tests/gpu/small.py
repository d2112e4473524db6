"""Creates a small model, distils it on the CPU as reference, and runs single stages on the GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from recipes.core.files import REPO_ROOT
from recipes.core.metrics import METRICS, Record, steps_of
from tests.gpu.plan import ON_CPU
from tests.support.launcher import run_recipe
from tests.support.models import EVEN, write_tiny_model
from tests.support.runs import copy_without, settings, tiny

RECIPE = "llama_depth_prune"
STEPS = 20
SHAPE = EVEN | {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
"""Every attention kernel supports head size 64. All sizes are multiples of 16, as FP8 requires."""
PRECISIONS = ("32", "bf16-mixed")
"""Precisions of ``distill``; the CPU distils once with each."""
PRUNE = {"target_num_layers": 3, "target_hidden_size": 192}
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
    """Whether the tests run on a GPU.

    With ``--on-cpu`` they run on the CPU, which only shows that the code of the tests works.
    """
    return ON_CPU not in os.environ


def output_of(code: str, *arguments: str) -> str:
    """Runs Python code in a process, which must succeed; returns the last line of its output."""
    command = [sys.executable, "-c", code, *arguments]
    env = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout.splitlines()[-1]


@contextmanager
def without_gpu() -> Iterator[None]:
    """Hides the GPU from child processes."""
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        yield


def record(results: Path, name: str, **values: object) -> None:
    """Writes ``values`` to ``NAME.json`` in the folder of results, and prints them."""
    text = json.dumps(values, indent=1)
    (results / f"{name}.json").write_text(text)
    print(text)


@dataclass(frozen=True)
class Small:
    """A small model, its text, and the folder of its runs."""

    folder: Path
    """Folder of the runs."""
    model: Path
    """Folder of the model in Hugging Face format."""
    text: Path
    """JSON lines file with the documents for training."""

    def reference_dir(self, precision: str) -> Path:
        """Returns the directory of the CPU run that distils with this precision."""
        return self.folder / f"cpu-{precision}"

    def run(self, run_dir: Path, *extra: str, **groups: str) -> str:
        """Runs the launcher with ``overrides``; it must succeed. Returns its output."""
        result = run_recipe(*self.overrides(run_dir, *extra, **groups), cwd=self.folder)
        assert result.code == 0, result.output
        return result.output

    def overrides(
        self, run_dir: Path, *extra: str, recipe: str = RECIPE, engine: str = "null"
    ) -> list[str]:
        """Returns the launcher's overrides for a run of the model.

        Args:
            run_dir: Directory of the run.
            extra: Overrides that are added at the end.
            recipe: Name of the recipe. Only ``RECIPE`` gets ``PRUNE``, ``DISTILL`` and ``engine``.
            engine: Name of a config in ``conf/engine``; "null" for no engine.
        """
        recipe_settings = [f"engine={engine}", "tasks=null", *settings("prune", **PRUNE)]
        recipe_settings += settings("distill", **DISTILL)
        return [
            f"recipe={recipe}",
            f"hardware={'h100' if on_gpu() else 'cpu'}",
            "skip_rules=[stack-versions]",  # OpenVINO and llama.cpp may be missing
            *tiny(self.model, self.text, run_dir),
            *(recipe_settings if recipe == RECIPE else []),
            *extra,
        ]

    def copy_reference(self, name: str, precision: str, *omitted: str) -> Path:
        """Copies the CPU run, without the stages ``omitted``, to ``folder/name``; returns it."""
        run_dir = self.folder / name
        shutil.rmtree(run_dir, ignore_errors=True)
        return copy_without(self.reference_dir(precision), run_dir, *omitted)


def make_reference(results: Path, text_file: Path) -> Small:
    """Returns the small model. Creates it, and distils it on the CPU, if no earlier test did so."""
    folder = results / "small"
    small = Small(folder, folder / "model", folder / "text.jsonl")
    if not small.text.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_tiny_model(small.model, text_file, **SHAPE)
        shutil.copy(text_file, small.text)
    with without_gpu():
        for precision in PRECISIONS:
            run_dir = small.reference_dir(precision)
            # Only ``distill`` depends on the precision, so the second run copies the other stages.
            if precision != PRECISIONS[0] and not run_dir.exists():
                small.copy_reference(run_dir.name, PRECISIONS[0], "distill")
            small.run(run_dir, REFERENCE_STAGES, f"stages.distill.precision={precision}")
    return small


def step_records(run_dir: Path) -> list[Record]:
    """Returns the metrics of each step of a run's distillation."""
    return steps_of(run_dir / "distill" / METRICS, "distill")


def largest_difference(expected_dir: Path, run_dir: Path, metric: str = "loss") -> float:
    """Returns the largest relative difference of a metric, over all steps of two distillations."""
    pairs = list(zip(step_records(expected_dir), step_records(run_dir), strict=True))
    assert len(pairs) == STEPS
    return max(abs(step[metric] / expected[metric] - 1) for expected, step in pairs)
