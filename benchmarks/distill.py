"""Speed of distillation: our path beside plain PyTorch loops and ModelOpt's Hugging Face trainer.

``python -m benchmarks.distill`` gives every contender the same teacher, student, batch and window
length, on the CPU. Each runs in a process of its own, all with the variables of
``conf/cluster/local.yaml`` (its malloc settings help all of them) and as many threads, in rounds
A B C A B C, so that a change of the machine's speed hits all alike. A step's time is that between
the ends of two steps; the first steps do not count.

The machine's rates are measured in the same rounds, the best counts. FLOPs are those of matrix
products: three forward passes of the student and one of the teacher, if it is there. Utilisation
is FLOP/s over the best rate in the contender's type; that rate over the FLOPs of a token is the
most tokens/s there could be. Beside our path's speed is what its plan says, from the rates that a
plan measures, the median of the rounds.

The loops train on the same windows as each other, and so do the NeMo paths, which draw their own:
first losses are compared within each group.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.contenders import (
    CONTENDERS,
    INPUTS,
    Contender,
    Record,
    Shape,
    execute,
    make_inputs,
    manifest_of,
    run_contender,
)
from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError, did_you_mean
from recipes.core.files import write_text_atomically
from recipes.core.screen import screen
from recipes.core.versions import installed_versions
from recipes.planning.estimate import estimate
from recipes.planning.hardware import Hardware
from recipes.planning.workload import Layout, Workload

WARM_UP_STEPS = 2
BASELINES = ("loop-fp32", "loop-bf16")
LOSS_TOLERANCE = 0.02
"""Largest relative difference of the first step's loss from the reference's on the same batch: the
rounding of bfloat16. Later losses are shown only, since weights that are themselves bfloat16 learn
little at first from updates smaller than their spacing."""
console = screen()


@dataclass(frozen=True)
class Flops:
    """FLOPs of matrix products for one token of a training step."""

    weights: int
    attention: int
    """Causal scores and values: on average half a window of keys to a query."""


@dataclass(frozen=True)
class Result:
    """A contender's figures. Speeds are in tokens/s, over the steps after warm-up of all rounds."""

    tokens_per_second: float
    slowest: float
    fastest: float
    peak_rss_bytes: int
    flops: Flops
    utilisation: float
    most_tokens_per_second: float
    planned_tokens_per_second: float | None
    """Of a path of ours."""
    ratios: dict[str, float]
    """Speed over that of each baseline that was run."""
    first_loss: float
    last_loss: float


def step_flops(student: Architecture, teacher: Architecture | None, seq_length: int) -> Flops:
    """FLOPs of a step: a backward pass is twice a forward pass, and a teacher has none."""

    def attention(arch: Architecture) -> int:
        return 2 * seq_length * arch.num_attention_heads * arch.kv_channels * arch.num_layers

    weights, scores = 3 * student.forward_flops_per_token(), 3 * attention(student)
    if teacher is None:
        return Flops(weights, scores)
    return Flops(weights + teacher.forward_flops_per_token(), scores + attention(teacher))


def speeds(record: Record, shape: Shape) -> list[float]:
    """Tokens/s of the steps after warm-up; the first has no beginning, so it never counts."""
    tokens = shape.micro_batch * shape.seq_length
    ends = record.ends[min(WARM_UP_STEPS, shape.steps - 1) - 1 :]
    return [tokens / (end - begin) for begin, end in pairwise(ends)]


def planned(
    contender: Contender, shape: Shape, models: Mapping[str, Architecture], hardware: Hardware
) -> float | None:
    """Tokens/s as a plan has them; of a loop there is none."""
    if not contender.stages:
        return None
    job = Workload(
        name="distill",
        trained=models["student"],
        teacher=models["teacher"] if contender.teacher_in_loop() else None,
        layout=Layout(micro_batch_size=shape.micro_batch),
        seq_length=shape.seq_length,
        global_batch_size=shape.micro_batch,
        steps=shape.steps,
        bf16=contender.dtype == "bfloat16",
    )
    return estimate(job, hardware).tokens_per_second


def summarise(
    records: Mapping[str, Sequence[Record]],
    shape: Shape,
    models: Mapping[str, Architecture],
    rates: Mapping[str, float],
    hardware: Hardware,
) -> dict[str, Result]:
    """Figures of every contender that ran.

    Args:
        records: By contender, one for each round.
        shape: What each of them trained on.
        models: ``teacher`` and ``student``.
        rates: FLOP/s of matrix products by type, at best.
        hardware: What a plan is made for.
    """
    rounds = {name: [speeds(r, shape) for r in runs] for name, runs in records.items()}
    typical = {name: median(median(steps) for steps in runs) for name, runs in rounds.items()}
    results = {}
    for name, runs in records.items():
        contender = CONTENDERS[name]
        teacher = models["teacher"] if contender.teacher_in_loop() else None
        flops = step_flops(models["student"], teacher, shape.seq_length)
        most = rates[contender.dtype] / (flops.weights + flops.attention)
        results[name] = Result(
            tokens_per_second=typical[name],
            slowest=min(min(steps) for steps in rounds[name]),
            fastest=max(max(steps) for steps in rounds[name]),
            peak_rss_bytes=max(run.peak_rss_bytes for run in runs),
            flops=flops,
            utilisation=typical[name] / most,
            most_tokens_per_second=most,
            planned_tokens_per_second=planned(contender, shape, models, hardware),
            ratios={b: typical[name] / typical[b] for b in BASELINES if b in typical},
            first_loss=runs[-1].losses[0],
            last_loss=runs[-1].losses[-1],
        )
    return results


def disagreements(results: Mapping[str, Result]) -> Iterable[str]:
    """Contenders whose first loss is not that of their reference."""
    for name, result in results.items():
        reference = CONTENDERS[name].reference
        if reference is not None and reference in results:
            found, expected = result.first_loss, results[reference].first_loss
            if not abs(found - expected) <= LOSS_TOLERANCE * expected:
                yield f"{name}: first loss {found:.4f}, but {reference} {expected:.4f}"


def machine_rates(student: Architecture, shape: Shape, scratch: Path) -> dict[str, Any]:
    """One round of ``benchmarks.machine``."""
    out = scratch / "machine.json"
    sizes = {
        "tokens": shape.micro_batch * shape.seq_length,
        "hidden": student.hidden_size,
        "ffn": student.ffn_hidden_size,
        "vocabulary": student.vocab_size,
    }
    options = [f"--{name}={size}" for name, size in sizes.items()]
    execute([sys.executable, "-m", "benchmarks.machine", *options, f"--out={out}"])
    rates: dict[str, Any] = json.loads(out.read_text())
    return rates


def draw(results: Mapping[str, Result], failed: Mapping[str, str]) -> None:
    """Prints the table, and why a contender is not in it."""
    table = Table("contender", "tokens/s", "slowest–fastest step", "planned", "peak RSS")
    table.add_column("utilisation")
    for baseline in BASELINES:
        table.add_column(f"× {baseline}")
    table.add_column("last loss")
    for name, r in results.items():
        table.add_row(
            name,
            f"{r.tokens_per_second:.0f}",
            f"{r.slowest:.0f}–{r.fastest:.0f}",
            "" if r.planned_tokens_per_second is None else f"{r.planned_tokens_per_second:.0f}",
            f"{r.peak_rss_bytes / 1e9:.1f} GB",
            f"{r.utilisation:.0%} of {r.most_tokens_per_second:.0f}",
            *(f"{r.ratios[b]:.2f}" if b in r.ratios else "" for b in BASELINES),
            f"{r.last_loss:.4f}",
        )
    console.print(table)
    for name, reason in failed.items():
        console.print(f"{name} did not run: {reason}", markup=False)


def measure(names: Sequence[str], shape: Shape, rounds: int, run_dir: Path, out: Path) -> None:
    """Runs all rounds, prints the table, writes the figures.

    Raises:
        RecipeError: The run's stages are not complete, or contenders on the same batches found
            different losses; the figures are written all the same.
    """
    manifests = {stage: manifest_of(run_dir / stage) for stage in INPUTS}
    models = {
        role: Architecture(**(manifests[stage].architecture or {}))
        for role, stage in (("teacher", "import_hf"), ("student", "prune"))
    }
    records: dict[str, list[Record]] = {}
    failed: dict[str, str] = {}
    machine: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        with tempfile.TemporaryDirectory(dir=run_dir.parent) as scratch:
            machine.append(machine_rates(models["student"], shape, Path(scratch)))
        for name in [name for name in names if name not in failed]:
            console.print(f"round {number} of {rounds}: {name}")
            try:
                with tempfile.TemporaryDirectory(dir=run_dir.parent) as scratch:
                    record = run_contender(name, shape, run_dir, Path(scratch))
                records.setdefault(name, []).append(record)
            except RecipeError as error:
                failed[name] = str(error)
    rates = {t: max(max(m[t].values()) for m in machine) for t in ("float32", "bfloat16")}
    training = {
        name: median(m["training"][name] for m in machine) for name in machine[0]["training"]
    }
    results = summarise(
        {name: runs for name, runs in records.items() if name not in failed},
        shape,
        models,
        rates,
        replace(Hardware(), **training),
    )
    draw(results, failed)
    found = {
        "shape": asdict(shape),
        "rounds": rounds,
        "machine": machine,
        "versions": installed_versions(),
        "models": {role: arch.as_dict() for role, arch in models.items()},
        "results": {name: asdict(result) for name, result in results.items()},
        "failed": failed,
        "records": {name: [asdict(r) for r in runs] for name, runs in records.items()},
    }
    write_text_atomically(out, json.dumps(found, indent=1) + "\n")
    if wrong := list(disagreements(results)):
        raise RecipeError(
            "losses differ on the same batches:\n  " + "\n  ".join(wrong),
            "compare no times of these: leave them out with --only",
        )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Compares the speed of ways to distil.")
    parser.add_argument("--run-dir", type=Path, help="a run with its stages before distill")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("distill.json"))
    args = parser.parse_args()
    shape = Shape(args.steps, args.micro_batch, args.seq_length)
    try:
        for name in args.only:
            if name not in CONTENDERS:
                raise RecipeError(
                    f"there is no contender '{name}'.{did_you_mean(name, CONTENDERS)}",
                    f"use some of: {', '.join(CONTENDERS)}",
                )
        if min(args.steps - 1, args.rounds, args.micro_batch, args.seq_length) < 1:
            raise RecipeError(
                "there is nothing to measure.", "at least 2 steps and 1 of the others"
            )
        run_dir = args.run_dir.resolve() if args.run_dir else make_inputs()
        measure(args.only, shape, args.rounds, run_dir, args.out)
    except RecipeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
