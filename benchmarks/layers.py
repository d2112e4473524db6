"""Which layers to drop: ways to choose them, right after pruning and after the same distillation.

``python -m benchmarks.layers`` scores the model once, prunes it to each of ``--layers`` by each
method, distils every student on the same windows for ``--steps``, and evaluates all on the same
held-out text. Each is a run of the launcher, so a killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.contenders import launch, make_inputs, manifest_of
from benchmarks.students import Student, collect, figures, make_student
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


def run_method(method: str, layers: int, scores: Path, out: Path, args: argparse.Namespace) -> None:
    """Prunes, distils and evaluates one student."""
    settings = {
        "prune.layer_importance": method,
        "prune.target_num_layers": layers,
        "evaluate.num_windows": args.windows,
    }
    make_student(args.base, scores, out, args.steps, settings)


def read_outcome(method: str, out: Path) -> Outcome:
    """Reads a run's manifests."""
    pruned = manifest_of(out / "prune").result(PruneResult)
    layers, dropped = len(pruned.kept_layers), pruned.dropped_layers()
    return Outcome(method=method, layers=layers, dropped=dropped, **figures(out))


def draw(outcomes: list[Outcome]) -> Table:
    """A table, the best of each depth first."""
    table = Table("layers", "method", "dropped", "pruned", "distilled", "KL", "tokens")
    for o in sorted(outcomes, key=lambda o: (-o.layers, o.distilled)):
        table.add_row(
            f"{o.layers}",
            o.method,
            " ".join(map(str, o.dropped)),
            f"{o.pruned:.2f}",
            f"{o.distilled:.2f}",
            f"{o.kl_to_teacher:.4f}",
            f"{o.tokens:,}",
        )
    return table


def compare(args: argparse.Namespace, out: Path) -> Iterator[Outcome]:
    """Makes every student, at each depth by each method that can drop so many layers."""
    architecture = manifest_of(args.base / "import_hf").architecture or {}
    drops = [architecture["num_layers"] - layers for layers in args.layers]
    scores = score(args.base, out, drops, args.loss_windows, args.greedy_layers)
    for layers, drop in zip(args.layers, drops, strict=True):
        for method in args.methods:
            if method == "greedy" and drop > args.greedy_layers:
                continue
            run = out / f"{layers}-{method}"
            run_method(method, layers, scores, run, args)
            yield read_outcome(method, run)


def main() -> None:
    """Runs the methods and writes ``layers.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run-dir", type=Path, help="with import_hf and prepare_data")
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 20])
    parser.add_argument("--methods", nargs="+", choices=LAYER_METHODS, default=list(LAYER_METHODS))
    parser.add_argument("--steps", type=int, default=40, help="of 4 windows of 256 tokens")
    parser.add_argument("--loss-windows", type=int, default=8, help="for the change of the loss")
    parser.add_argument("--greedy-layers", type=int, default=6, help="that greedy can drop")
    parser.add_argument("--windows", type=int, default=40, help="of held-out text")
    parser.add_argument("--out", type=Path, default=Path("runs/layers"))
    args = parser.parse_args()
    args.base = (args.run_dir or make_inputs()).resolve()
    out, console = args.out.resolve(), screen()
    outcomes = collect(compare(args, out), out / "layers.json", console)
    console.print(draw(outcomes))


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error
