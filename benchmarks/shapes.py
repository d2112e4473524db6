"""Whether a searched shape beats pruning depth alone and width alone, at equal size and training.

``python -m benchmarks.shapes`` runs ``recipe=llama_search``, takes the shape that it found and the
best-ranked ones of its list that change only depth and only width, distils each with every
learning rate of ``--lr`` for ``--steps``, and evaluates all on the same held-out text. Each is a
run of the launcher, so a killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import LAUNCHER, execute, launch, manifest_of
from recipes.architecture import Architecture
from recipes.errors import RecipeError
from recipes.manifest import write_text_atomically

SEARCH = "llama_search"
WIDTHS = ("hidden_size", "ffn_hidden_size", "num_attention_heads")


@dataclass(frozen=True)
class Outcome:
    """What a shape came to with a learning rate; on held-out text."""

    way: str
    shape: str
    parameters: int
    lr: float
    pruned: float
    distilled: float
    kl_to_teacher: float
    top1_agreement: float
    tokens: int


def ways(candidates: Sequence[dict[str, Any]], teacher: Architecture) -> dict[str, dict[str, Any]]:
    """The shape that was found, and the best-ranked of those that change one kind of axis.

    Args:
        candidates: As ``tournament`` wrote them, the best-ranked first.
        teacher: What they were cut from.

    Raises:
        RecipeError: The budget cannot be met in depth alone, or in width alone.
    """
    found = {"found": next(c for c in candidates if c.get("chosen"))}
    kinds: dict[str, tuple[str, ...]] = {"depth alone": WIDTHS, "width alone": ("num_layers",)}
    for way, kept in kinds.items():
        same = [
            c
            for c in candidates
            if all(c["shape"][axis] == getattr(teacher, axis) for axis in kept)
        ]
        if not same:
            raise RecipeError(
                f"No shape within the budget changes {way}.",
                "raise the budget, or stages.enumerate_shapes.space's largest shares",
            )
        found[way] = same[0]
    return found


def run_shape(shape: dict[str, Any], lr: float, search: Path, out: Path, steps: int) -> None:
    """Prunes, distils and evaluates a student."""
    scores, data, teacher = search / "score", search / "prepare_data", search / "import_hf"
    ranking = manifest_of(search / "rank_candidates").config
    settings: dict[str, object] = {
        "prune.inputs.checkpoint": teacher,
        "prune.inputs.importance": scores,
        "prune.layer_importance": ranking["layer_importance"],
        "prune.target_num_layers": shape["num_layers"],
        **{f"prune.target_{axis}": shape[axis] for axis in WIDTHS},
        **{f"prune.{axis}_divisor": math.gcd(shape[axis], 64) for axis in WIDTHS[:2]},
        "distill.inputs.teacher": teacher,
        "distill.inputs.data": data,
        "distill.max_steps": steps,
        "distill.warmup_steps": steps // 10,
        "distill.lr": lr,
        "distill.min_lr": lr / 10,
        "distill.checkpoint_interval": steps,
        "distill.val_check_interval": steps,
        "evaluate.inputs.teacher": teacher,
        "evaluate.inputs.data": data,
        "evaluate.num_generations": 1,
        "evaluate.new_tokens": 1,
    }
    launch(search, out, ("prune", "distill", "evaluate"), settings)


def read_outcome(way: str, candidate: dict[str, Any], lr: float, out: Path) -> Outcome:
    """Reads a run's manifests."""
    evaluation = manifest_of(out / "evaluate").metrics
    return Outcome(
        way=way,
        shape=candidate["name"],
        parameters=candidate["parameters"],
        lr=lr,
        pruned=evaluation["pruned"]["perplexity"],
        distilled=evaluation["distilled"]["perplexity"],
        kl_to_teacher=evaluation["distilled"]["kl_to_teacher"],
        top1_agreement=evaluation["distilled"]["top1_agreement"],
        tokens=manifest_of(out / "distill").metrics["tokens"],
    )


def draw(outcomes: Sequence[Outcome]) -> Table:
    """A table, the best first."""
    heads = ("way", "shape", "parameters", "lr", "pruned", "distilled", "KL", "top 1", "tokens")
    table = Table(*heads)
    for o in sorted(outcomes, key=lambda o: o.kl_to_teacher):
        table.add_row(
            o.way,
            o.shape,
            f"{o.parameters / 1e6:.1f} M",
            f"{o.lr:g}",
            f"{o.pruned:.2f}",
            f"{o.distilled:.2f}",
            f"{o.kl_to_teacher:.4f}",
            f"{o.top1_agreement:.1%}",
            f"{o.tokens:,}",
        )
    return table


def main() -> None:
    """Searches, trains and writes ``shapes.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of 4 windows of 256 tokens")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    parser.add_argument("overrides", nargs="*", help="of the search")
    args = parser.parse_args()
    out, console = args.out.resolve(), Console(highlight=False, width=140)
    search = out / "search"
    execute([*LAUNCHER, f"recipe={SEARCH}", f"run_dir={search}", *args.overrides])
    tournament = manifest_of(search / "tournament")
    teacher = Architecture(**(manifest_of(search / "import_hf").architecture or {}))
    outcomes = []
    for way, candidate in ways(tournament.metrics["candidates"], teacher).items():
        for lr in args.lr:
            run = out / f"{candidate['name']}-lr{lr:g}"
            run_shape(candidate["shape"], lr, search, run, args.steps)
            outcomes.append(read_outcome(way, candidate, lr, run))
            console.print(outcomes[-1])
            plain = [asdict(outcome) for outcome in outcomes]
            write_text_atomically(out / "shapes.json", json.dumps(plain, indent=1) + "\n")
    console.print(draw(outcomes))


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error
