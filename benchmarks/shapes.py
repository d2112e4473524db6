"""Whether a searched shape beats pruning depth alone and width alone, at equal size and training.

``python -m benchmarks.shapes`` runs ``recipe=llama_search``, takes the shape that it found and the
best-ranked ones of its list that change only depth and only width, distils each with every
learning rate of ``--lr`` for ``--steps``, and evaluates all on the same held-out text. Each is a
run of the launcher, so a killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.contenders import LAUNCHER, execute, manifest_of
from benchmarks.students import Student, collect, figures, make_student
from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.screen import screen
from recipes.search.results import Candidate, SearchResult
from recipes.search.space import AXES, axes_of, prune_settings

SEARCH = "llama_search"
DEPTH = "num_layers"


@dataclass(frozen=True, kw_only=True)
class Outcome(Student):
    """What a shape came to with a learning rate."""

    way: str
    shape: str
    parameters: int
    lr: float


def ways(search: SearchResult, teacher: Architecture) -> dict[str, Candidate]:
    """The shape that was found, and the best-ranked of those that change one kind of axis.

    Args:
        search: As ``successive_halving`` left it.
        teacher: What they were cut from.

    Raises:
        RecipeError: The budget cannot be met in depth alone, or in width alone.
    """
    found = {"found": next(c for c in search.candidates if c.chosen)}
    widths = [axis for axis in AXES if axis != DEPTH]
    kinds = {"depth alone": widths, "width alone": [DEPTH]}
    for way, kept in kinds.items():
        same = [
            c
            for c in search.candidates
            if all(getattr(c.shape, axis) == getattr(teacher, axis) for axis in kept)
        ]
        if not same:
            raise RecipeError(
                f"No shape within the budget changes {way}.",
                "raise the budget, or stages.enumerate_shapes.space's largest shares",
            )
        found[way] = same[0]
    return found


def run_shape(shape: Architecture, lr: float, search: Path, out: Path, steps: int) -> None:
    """Prunes, distils and evaluates a student."""
    method = manifest_of(search / "rank_candidates").config["layer_importance"]
    pruning = prune_settings(axes_of(shape), method)
    settings = {
        **{f"prune.{name}": value for name, value in pruning.items()},
        "distill.lr": lr,
        "distill.min_lr": lr / 10,
    }
    make_student(search, search / "score", out, steps, settings)


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


def compare(search: Path, args: argparse.Namespace, out: Path) -> Iterator[Outcome]:
    """Makes every student: each shape with each learning rate."""
    found = manifest_of(search / "successive_halving").result(SearchResult)
    teacher = Architecture(**(manifest_of(search / "import_hf").architecture or {}))
    for way, candidate in ways(found, teacher).items():
        for lr in args.lr:
            run = out / f"{candidate.name}-lr{lr:g}"
            run_shape(candidate.shape, lr, search, run, args.steps)
            yield Outcome(
                way=way,
                shape=candidate.name,
                parameters=candidate.parameters,
                lr=lr,
                **figures(run),
            )


def main() -> None:
    """Searches, trains and writes ``shapes.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of 4 windows of 256 tokens")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    parser.add_argument("overrides", nargs="*", help="of the search")
    args = parser.parse_args()
    out, console = args.out.resolve(), screen()
    search = out / "search"
    execute([*LAUNCHER, f"recipe={SEARCH}", f"run_dir={search}", *args.overrides])
    outcomes = collect(compare(search, args, out), out / "shapes.json", console)
    console.print(draw(outcomes))


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error
