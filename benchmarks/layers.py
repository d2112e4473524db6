"""Which layers to drop: ways to choose them, right after pruning and after the same distillation.

``python -m benchmarks.layers`` scores the model once, prunes it to each of ``--layers`` by each
method, distils every student on the same windows for ``--steps`` with every seed, and judges all on
the same text. Each is a run of the launcher, so a killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.contenders import launch, make_inputs, manifest_of, shape_of
from benchmarks.students import (
    SUMMARY,
    Student,
    collect,
    distill,
    grouped,
    prune,
    schedule,
    students_of,
    summary,
)
from recipes.core.errors import RecipeError
from recipes.core.screen import screen
from recipes.pruning.results import PruneResult
from recipes.pruning.settings import LAYER_METHODS


@dataclass(frozen=True, kw_only=True)
class Outcome(Student):
    """What a method came to."""

    method: str
    layers: int
    dropped: list[int]


def score(base: Path, out: Path, drops: list[int], windows: int, greedy: int) -> Path:
    """Measures everything that the methods need."""
    settings = {
        "score.inputs.checkpoint": base / "import_hf",
        "score.inputs.calibration": base / "prepare_data",
        "score.num_loss_samples": windows,
        "score.block_sizes": drops,
        "score.num_greedy_layers": greedy,
    }
    launch(base, out, ("score",), settings)
    return out / "score"


@dataclass(frozen=True)
class Run:
    """A training of one method's student."""

    method: str
    layers: int
    seed: int
    out: Path

    @property
    def pruned(self) -> Path:
        """Where the student was cut, the same for every seed."""
        return self.out.with_name(f"{self.layers}-{self.method}") / "prune"


def runs_of(args: argparse.Namespace, out: Path, whole: int) -> Iterator[Run]:
    """Every student, at each depth by each method that can drop so many layers."""
    for seed in args.seeds:
        for layers in args.layers:
            for method in args.methods:
                if method == "greedy" and whole - layers > args.greedy_layers:
                    continue
                yield Run(method, layers, seed, out / f"{layers}-{method}-{seed}")


def outcomes(runs: Sequence[Run], base: Path, windows: int) -> Iterator[Outcome]:
    """What every student came to."""
    for run, student in zip(runs, students_of(base, runs, windows), strict=True):
        kept = manifest_of(run.pruned).result(PruneResult)
        layers, dropped = len(kept.kept_layers), kept.dropped_layers()
        yield Outcome(method=run.method, layers=layers, dropped=dropped, **student)


def draw(found: Sequence[Outcome]) -> Table:
    """A table, the best of each depth on validation text first."""
    table = Table("layers", "method", "dropped", *SUMMARY)
    groups = grouped(found, lambda one: (one.layers, one.method))
    for seeds in sorted(groups, key=lambda seeds: -seeds[0].layers):
        table.add_row(
            f"{seeds[0].layers}",
            seeds[0].method,
            " ".join(map(str, seeds[0].dropped)),
            *summary(seeds),
        )
    return table


def main() -> None:
    """Runs the methods and writes ``layers.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run-dir", type=Path, help="with import_hf and prepare_data")
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 20])
    parser.add_argument("--methods", nargs="+", choices=LAYER_METHODS, default=list(LAYER_METHODS))
    parser.add_argument("--steps", type=int, default=40, help="of 4 windows of 256 tokens")
    parser.add_argument("--loss-windows", type=int, default=8, help="for the change of the loss")
    parser.add_argument("--greedy-layers", type=int, default=6, help="that greedy can drop")
    parser.add_argument("--windows", type=int, default=64, help="of held-out text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/layers"))
    args = parser.parse_args()
    base = (args.run_dir or make_inputs()).resolve()
    out, console = args.out.resolve(), screen()
    whole = shape_of(base / "import_hf").num_layers
    drops = [whole - layers for layers in args.layers]
    scores = score(base, out, drops, args.loss_windows, args.greedy_layers)
    runs = list(runs_of(args, out, whole))
    for run in runs:
        kept = {"layer_importance": run.method, "target_num_layers": run.layers}
        prune(base, scores, run.pruned.parent, kept)
        distill(base, run.pruned, run.out, schedule(args.steps, run.seed))
    found = collect(outcomes(runs, base, args.windows), out / "layers.json", console)
    console.print(draw(found))


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error
