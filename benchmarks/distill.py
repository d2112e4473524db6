"""Compares the speed of distillation by NeMo, PyTorch loops, and ModelOpt's Hugging Face trainer.

``python -m benchmarks.distill`` runs all methods with the same teacher, student, batch and sequence
length, on the CPU. Each method runs in its own process, with the environment variables of
``conf/cluster/local.yaml``. Methods take turns, A B C A B C, so that a change of the machine's
speed affects all equally. A step's time is measured from the end of the previous step to its own
end. ``planned`` is the speed that the stage ``plan`` estimates for NeMo.

The baselines (the loops and ModelOpt) train on one set of sequences, NeMo's methods on another set.
So losses of the first step are compared only between baselines, and between NeMo's methods.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

from rich.table import Table

from benchmarks.launching import (
    INPUT_STAGES,
    call_in_process,
    complete_manifest,
    launch,
    make_inputs,
    run_main,
)
from recipes.backend import SPEED_PATCH_NAMES
from recipes.core.errors import RecipeError, did_you_mean
from recipes.core.files import write_text_atomically
from recipes.core.metrics import METRICS, steps_of
from recipes.core.screen import screen
from recipes.core.versions import installed_versions
from recipes.planning.results import PlanResult

WARM_UP_STEPS = 2
"""Number of steps at the start of a run whose speed does not count."""
BASELINES = ("loop-fp32", "loop-bf16", "modelopt-bf16")
LOSS_TOLERANCE = 0.02
"""Largest relative difference of first losses that rounding to bfloat16 may cause."""
console = screen()


@dataclass
class TrainingRun:
    """Measurements of a training run."""

    ends: list[float] = field(default_factory=list)
    """Time when each step ended, in seconds since the epoch."""
    losses: list[float] = field(default_factory=list)
    """Training loss of each step."""
    peak_rss_bytes: int = 0
    planned_tokens_per_second: float | None = None


@dataclass(frozen=True)
class Shape:
    """Size of a training run: steps, sequences per step, and tokens per sequence."""

    steps: int
    micro_batch: int
    seq_length: int


@dataclass(frozen=True)
class DistillMethod:
    """A method to distil.

    Attributes:
        reference: Method on the same batches whose first loss this method must reproduce, if any.
            Methods with a cached teacher have no reference, because the cache has only the largest
            probabilities.
        stages: Stages of the launcher; empty for a baseline.
        overrides: Further overrides of the launcher.
    """

    reference: str | None = None
    stages: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


CACHED_STAGES = ("plan", "cache_logits", "distill")
COMPILED = "stages.distill.compile=true"
METHODS = {
    "nemo": DistillMethod("nemo-fp32", ("plan", "distill")),
    "nemo-cached": DistillMethod(None, CACHED_STAGES, ("teacher=cached",)),
    "nemo-compiled": DistillMethod("nemo-fp32", ("plan", "distill"), (COMPILED,)),
    "nemo-cached-compiled": DistillMethod(None, CACHED_STAGES, ("teacher=cached", COMPILED)),
    "nemo-fp32": DistillMethod(None, ("plan", "distill"), ("stages.distill.precision='32'",)),
    "megatron-cached-compiled": DistillMethod(
        None, CACHED_STAGES, ("teacher=cached", COMPILED, "stages.distill.cpu_speed_patches=[]")
    ),
    "loop-fp32": DistillMethod(),
    "loop-bf16": DistillMethod("loop-fp32"),
    "modelopt-bf16": DistillMethod("loop-fp32"),
}
"""Methods by name. ``nemo`` and ``megatron`` run the stage ``distill``; ``megatron`` does so
without the patches of ``cpu_speed_patches``. ``cached``: with a cached teacher. ``compiled``: with
``stages.distill.compile``. ``loop`` and ``modelopt`` are ``BASELINES``."""
for patch in SPEED_PATCH_NAMES:  # adds nemo-cached-compiled with all patches but this one
    other_patches = ",".join(name for name in SPEED_PATCH_NAMES if name != patch)
    overrides = ("teacher=cached", COMPILED, f"stages.distill.cpu_speed_patches=[{other_patches}]")
    METHODS[f"without-{patch}"] = DistillMethod(None, CACHED_STAGES, overrides)
# Methods that run without --only.
DEFAULTS = [name for name in METHODS if not name.startswith(("without-", "megatron-"))]


@dataclass(frozen=True)
class Result:
    """A method's results over all rounds. Speeds are those of steps after warm-up, in tokens/s."""

    tokens_per_second: float
    """Median over rounds of the median speed of a round's steps."""
    slowest: float
    """Speed of the slowest step."""
    fastest: float
    peak_rss_bytes: int
    planned_tokens_per_second: float | None
    ratios: dict[str, float]
    """``tokens_per_second`` divided by the baseline's, by name of each baseline that ran."""
    first_loss: float
    """Loss of the first step in the last round."""
    last_loss: float


def run_method(name: str, shape: Shape, run_dir: Path) -> TrainingRun:
    """Distils the student of ``run_dir`` once.

    Raises ``RecipeError`` if the method failed, or if a library that the method needs is missing.
    """
    method = METHODS[name]
    if method.stages:
        with tempfile.TemporaryDirectory(dir=run_dir.parent) as scratch:
            return _run_stages(method, shape, run_dir, Path(scratch))
    run: TrainingRun = call_in_process("benchmarks.loops:run_baseline", name, shape, run_dir)
    return run


def _run_stages(method: DistillMethod, shape: Shape, run_dir: Path, scratch: Path) -> TrainingRun:
    """Runs the launcher in ``scratch``, on the models and the text of ``run_dir``."""
    teacher_stage = method.stages[1]  # the stage after plan reads the teacher
    settings = {
        "distill.inputs.student": run_dir / "prune",
        "distill.inputs.data": run_dir / "prepare_data",
        f"{teacher_stage}.inputs.data": run_dir / "prepare_data",
        f"{teacher_stage}.inputs.teacher": run_dir / "import_hf",
        # As in the baselines: no next-token loss, and a constant learning rate.
        "distill.lm_weight": 0,
        "distill.max_steps": shape.steps,
        "distill.micro_batch_size": shape.micro_batch,
        "distill.global_batch_size": shape.micro_batch,
        "distill.lr": 1e-4,
        "distill.min_lr": 1e-4,
        "distill.warmup_steps": 0,
        "distill.checkpoint_interval": shape.steps,
        "distill.val_check_interval": shape.steps,
        "distill.limit_val_batches": 1,
    }
    if teacher_stage == "cache_logits":
        settings["cache_logits.num_sequences"] = shape.steps * shape.micro_batch
    length_override = f"data.seq_length={shape.seq_length}"
    launch(run_dir, scratch, method.stages, settings, length_override, *method.overrides)
    steps = steps_of(scratch / "distill" / METRICS, "distill")
    plan = complete_manifest(scratch / "plan").result(PlanResult)
    return TrainingRun(
        ends=[step["time"] for step in steps],
        losses=[step["loss"] for step in steps],
        peak_rss_bytes=complete_manifest(scratch / "distill").peak_rss_bytes,
        planned_tokens_per_second=plan.tokens_per_second["distill"],
    )


def speeds(run: TrainingRun, shape: Shape) -> list[float]:
    """Returns the tokens/s of each step after warm-up.

    Step 1 never counts: its start is unknown, because only the ends of steps are recorded.
    """
    tokens = shape.micro_batch * shape.seq_length
    warm_up_steps = min(WARM_UP_STEPS, shape.steps - 1)  # of two steps, the last one counts
    ends = run.ends[warm_up_steps - 1 :]  # the first is when the last warm-up step ended
    return [tokens / (end - start) for start, end in pairwise(ends)]


def summarise(records: Mapping[str, Sequence[TrainingRun]], shape: Shape) -> dict[str, Result]:
    """Summarises the runs of each method, one per round."""
    # The speed of every counted step, by method and round.
    rounds = {name: [speeds(run, shape) for run in runs] for name, runs in records.items()}
    medians = {name: median(median(s) for s in by_round) for name, by_round in rounds.items()}
    return {
        name: Result(
            tokens_per_second=medians[name],
            slowest=min(min(steps) for steps in rounds[name]),
            fastest=max(max(steps) for steps in rounds[name]),
            peak_rss_bytes=max(run.peak_rss_bytes for run in runs),
            planned_tokens_per_second=runs[-1].planned_tokens_per_second,
            ratios={b: medians[name] / medians[b] for b in BASELINES if b in medians},
            first_loss=runs[-1].losses[0],
            last_loss=runs[-1].losses[-1],
        )
        for name, runs in records.items()
    }


def disagreements(results: Mapping[str, Result]) -> Iterable[str]:
    """Yields a message for each method whose first loss differs from its reference's."""
    for name, result in results.items():
        reference = METHODS[name].reference
        if reference is not None and reference in results:
            loss, expected = result.first_loss, results[reference].first_loss
            # "not <=" also catches NaN.
            if not abs(loss - expected) <= LOSS_TOLERANCE * expected:
                yield f"{name}: first loss {loss:.4f}, but {reference} {expected:.4f}"


def draw(results: Mapping[str, Result], failed: Mapping[str, str]) -> None:
    """Prints the table of results; ``failed`` has the error of each method that failed."""
    columns = "method", "tokens/s", "slowest to fastest step", "planned", "peak RSS"
    table = Table(*columns, *(f"× {baseline}" for baseline in BASELINES), "last loss")
    for name, result in results.items():
        planned, ratios = result.planned_tokens_per_second, result.ratios
        table.add_row(
            name,
            f"{result.tokens_per_second:.0f}",
            f"{result.slowest:.0f} to {result.fastest:.0f}",
            "" if planned is None else f"{planned:.0f}",
            f"{result.peak_rss_bytes / 1e9:.1f} GB",
            *(f"{ratios[name]:.2f}" if name in ratios else "" for name in BASELINES),
            f"{result.last_loss:.4f}",
        )
    console.print(table)
    for name, reason in failed.items():
        console.print(f"{name} did not run: {reason}", markup=False)


def measure(names: Sequence[str], shape: Shape, rounds: int, run_dir: Path, out: Path) -> None:
    """Runs the methods ``names`` in all rounds, prints a table, and writes the results as JSON.

    A method that fails does not run in later rounds, and has no results. ``run_dir`` is the run of
    the launcher with the teacher, the student and the text.

    Raises:
        RecipeError: A stage of ``run_dir`` is not complete, or methods have different losses on the
            same batches. If losses differ, the results are still written.
    """
    for stage in INPUT_STAGES:
        complete_manifest(run_dir / stage)
    records: dict[str, list[TrainingRun]] = {}
    failed: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for name in names:
            if name in failed:
                continue
            console.print(f"round {number} of {rounds}: {name}")
            try:
                records.setdefault(name, []).append(run_method(name, shape, run_dir))
            except RecipeError as error:
                failed[name] = str(error)
    results = summarise({name: r for name, r in records.items() if name not in failed}, shape)
    draw(results, failed)
    content = {
        "shape": asdict(shape),
        "rounds": rounds,
        "versions": installed_versions(),
        "results": {name: asdict(result) for name, result in results.items()},
        "failed": failed,
        "records": {name: [asdict(r) for r in runs] for name, runs in records.items()},
    }
    write_text_atomically(out, json.dumps(content, indent=1) + "\n")
    if different := list(disagreements(results)):
        raise RecipeError(
            "losses differ on the same batches:\n  " + "\n  ".join(different),
            "do not compare their times: leave them out with --only",
        )


def main() -> None:
    """Reads the command line, and measures the methods."""
    parser = argparse.ArgumentParser(description="Compares the speed of methods to distil.")
    parser.add_argument(
        "--run-dir",
        type=Path,
        help="a run whose stages before distill are complete; default: runs/llama_depth_prune",
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens")
    parser.add_argument(
        "--only", nargs="+", default=DEFAULTS, metavar="NAME", help="methods to measure"
    )
    parser.add_argument("--out", type=Path, default=Path("distill.json"))
    args = parser.parse_args()
    for name in args.only:
        if name not in METHODS:
            raise RecipeError(
                f"invalid --only {name}: there is no such method.{did_you_mean(name, METHODS)}",
                f"use some of: {', '.join(METHODS)}",
            )
    if args.steps < 2 or min(args.rounds, args.micro_batch, args.seq_length) < 1:
        raise RecipeError(
            "there is nothing to measure: --steps, --rounds, --micro-batch or --seq-length is too "
            "small",
            "set --steps to at least 2, and --rounds, --micro-batch and --seq-length to at least 1",
        )
    run_dir = args.run_dir.resolve() if args.run_dir else make_inputs()
    shape = Shape(args.steps, args.micro_batch, args.seq_length)
    measure(args.only, shape, args.rounds, run_dir, args.out)


if __name__ == "__main__":
    run_main("benchmarks.distill")
