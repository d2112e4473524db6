"""Which layers to drop: ways to choose them, right after pruning and after the same distillation.

``python -m benchmarks.layers`` scores the model once, prunes it to each of ``--layers`` by each
method, distils every student on the same windows for ``--steps``, and evaluates all on the same
held-out text. Each is a run of the launcher, so a killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import launch, make_inputs, manifest_of
from recipes.errors import RecipeError
from recipes.manifest import write_text_atomically
from recipes.prune import METHODS


@dataclass(frozen=True)
class Outcome:
    """What a method came to; perplexities on held-out text."""

    method: str
    layers: int
    dropped: list[int]
    pruned: float
    distilled: float
    kl_to_teacher: float
    tokens: int


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
    base = args.base
    settings = {
        "prune.inputs.checkpoint": base / "import_hf",
        "prune.inputs.importance": scores,
        "prune.layer_importance": method,
        "prune.target_num_layers": layers,
        "distill.inputs.teacher": base / "import_hf",
        "distill.inputs.data": base / "prepare_data",
        "distill.max_steps": args.steps,
        "distill.warmup_steps": args.steps // 10,
        "distill.checkpoint_interval": args.steps,
        "distill.val_check_interval": args.steps,
        "evaluate.inputs.teacher": base / "import_hf",
        "evaluate.inputs.data": base / "prepare_data",
        "evaluate.num_windows": args.windows,
        "evaluate.num_generations": 1,
        "evaluate.new_tokens": 1,
    }
    launch(base, out, ("prune", "distill", "evaluate"), settings)


def read_outcome(method: str, out: Path) -> Outcome:
    """Reads a run's manifests."""
    pruned, evaluation = manifest_of(out / "prune"), manifest_of(out / "evaluate").metrics
    kept = pruned.metrics["kept_layers"]
    every = {int(layer) for layer in pruned.metrics["layer_importance"]}
    return Outcome(
        method=method,
        layers=len(kept),
        dropped=sorted(every - set(kept)),
        pruned=evaluation["pruned"]["perplexity"],
        distilled=evaluation["distilled"]["perplexity"],
        kl_to_teacher=evaluation["distilled"]["kl_to_teacher"],
        tokens=manifest_of(out / "distill").metrics["tokens"],
    )


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


def main() -> None:
    """Runs the methods and writes ``layers.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run-dir", type=Path, help="with import_hf and prepare_data")
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 20])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=40, help="of 4 windows of 256 tokens")
    parser.add_argument("--loss-windows", type=int, default=8, help="for the change of the loss")
    parser.add_argument("--greedy-layers", type=int, default=6, help="that greedy can drop")
    parser.add_argument("--windows", type=int, default=40, help="of held-out text")
    parser.add_argument("--out", type=Path, default=Path("runs/layers"))
    args = parser.parse_args()
    args.base = (args.run_dir or make_inputs()).resolve()
    out, console = args.out.resolve(), Console(highlight=False, width=120)
    architecture = manifest_of(args.base / "import_hf").architecture or {}
    drops = [architecture["num_layers"] - layers for layers in args.layers]
    scores = score(args.base, out, drops, args.loss_windows, args.greedy_layers)
    outcomes = []
    for layers in args.layers:
        for method in args.methods:
            if method == "greedy" and drops[args.layers.index(layers)] > args.greedy_layers:
                continue
            run = out / f"{layers}-{method}"
            run_method(method, layers, scores, run, args)
            outcomes.append(read_outcome(method, run))
            console.print(outcomes[-1])
            plain = [asdict(outcome) for outcome in outcomes]
            write_text_atomically(out / "layers.json", json.dumps(plain, indent=1) + "\n")
    console.print(draw(outcomes))


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error
