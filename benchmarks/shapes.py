"""Whether a searched shape beats pruning depth alone and width alone, at equal size and training.

``python -m benchmarks.shapes`` runs ``recipe=llama_search``, takes the shape that it found, as many
layers alone as are no larger than its largest, and the best-ranked that changes only width, distils
each for ``--steps`` with every learning rate of ``--lr`` and every seed, and judges all on the same
text. With ``--ranked`` as many of the best-ranked shapes are trained, too, and healed without
training, to see which foretells the order that training leaves them in: what a shape is as cut, or
healed, by which a search ranks. Each is a run of the launcher, so a killed benchmark goes on where
it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table
from scipy.stats import spearmanr

from benchmarks.contenders import LAUNCHER, execute, manifest_of, shape_of
from benchmarks.students import (
    SUMMARY,
    Judgement,
    Student,
    collect,
    distill,
    grouped,
    heal,
    judge,
    prune,
    schedule,
    students_of,
    summary,
)
from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.screen import screen
from recipes.search.results import SearchResult
from recipes.search.space import axes_of, name_of, prune_settings

SEARCH = "llama_search"


@dataclass(frozen=True, kw_only=True)
class Outcome(Student):
    """What a shape came to with a learning rate."""

    way: str
    shape: str
    parameters: int
    lr: float
    healed: Judgement | None = None


def ways(search: SearchResult, teacher: Architecture) -> dict[str, Architecture]:
    """The shape that was found, and the best that change one kind of axis alone.

    Args:
        search: As ``successive_halving`` left it.
        teacher: What they were cut from.

    Raises:
        RecipeError: The budget cannot be met in depth alone, or in width alone.
    """
    largest = max(c.parameters for c in search.candidates)
    depths = (replace(teacher, num_layers=n) for n in range(teacher.num_layers - 1, 0, -1))
    shapes = [c.shape for c in search.candidates]
    alone = {
        # Also where it is deeper than the search cuts.
        "depth alone": (one for one in depths if one.parameters() <= largest),
        "width alone": (one for one in shapes if one.num_layers == teacher.num_layers),
    }
    found = {"found": next(c.shape for c in search.candidates if c.chosen)}
    for way, fitting in alone.items():
        if (best := next(fitting, None)) is None:
            raise RecipeError(
                f"No shape within the budget is {way}.",
                "raise the budget, or stages.enumerate_shapes.space.max_width_pruning",
            )
        found[way] = best
    return found


def ranked(search: SearchResult, count: int, known: Container[Architecture]) -> list[Architecture]:
    """Those of the best-ranked shapes that are not known yet."""
    return [one.shape for one in search.candidates[:count] if one.shape not in known]


@dataclass(frozen=True)
class Run:
    """A training of one shape."""

    way: str
    shape: Architecture
    lr: float
    seed: int
    pruned: Path
    out: Path
    healed: Path | None
    """The same shape, healed and not trained."""


def make(args: argparse.Namespace, search: Path, out: Path) -> Iterator[Run]:
    """Makes every student: each shape with each learning rate and seed."""
    found = manifest_of(search / "successive_halving").result(SearchResult)
    teacher = shape_of(search / "import_hf")
    method = manifest_of(search / "rank_candidates").config["layer_importance"]
    shapes = list(ways(found, teacher).items())
    others = ranked(found, args.ranked, [shape for _, shape in shapes])
    for way, shape in [*shapes, *(("ranked", other) for other in others)]:
        name = name_of(shape)
        settings = prune_settings(axes_of(shape), method)
        pruned = prune(search, search / "score", out / name, settings)
        healed = None
        if args.ranked:
            healed = heal(search, pruned, out / name)
        for lr in args.lr:
            for seed in args.seeds:
                run = out / f"{name}-lr{lr:g}-{seed}"
                rates = {"distill.lr": lr, "distill.min_lr": lr / 10}
                distill(search, pruned, run, schedule(args.steps, seed) | rates)
                yield Run(way, shape, lr, seed, pruned, run, healed)


def outcomes(runs: Sequence[Run], search: Path, windows: int) -> Iterator[Outcome]:
    """What every student came to."""
    healed = judge(search, dict.fromkeys(run.healed for run in runs if run.healed), windows)
    for run, student in zip(runs, students_of(search, runs, windows), strict=True):
        yield Outcome(
            way=run.way,
            shape=name_of(run.shape),
            parameters=run.shape.parameters(),
            lr=run.lr,
            healed=healed[run.healed] if run.healed else None,
            **student,
        )


def foretold(found: Sequence[Outcome]) -> Table:
    """How well the order of the trained is known before, by KL on validation text.

    Of shapes that were trained alike; a correlation of ranks (Spearman), 1 where it is the same.
    """
    table = Table("lr", "seed", "shapes", "foretold as cut", "healed")
    for shapes in grouped(found, lambda one: (one.lr, one.seed)):
        trained = [one.distilled.validation.kl for one in shapes]
        healed = [one.healed.validation.kl for one in shapes if one.healed]
        before = ([one.pruned.validation.kl for one in shapes], healed)
        orders = (f"{spearmanr(each, trained).statistic:.2f}" for each in before)
        table.add_row(f"{shapes[0].lr:g}", f"{shapes[0].seed}", f"{len(shapes)}", *orders)
    return table


def draw(found: Sequence[Outcome]) -> Table:
    """A table, the best on validation text first."""
    table = Table("way", "shape", "parameters", "lr", *SUMMARY)
    for seeds in grouped(found, lambda one: (one.way, one.shape, one.lr)):
        table.add_row(
            seeds[0].way,
            seeds[0].shape,
            f"{seeds[0].parameters / 1e6:.1f} M",
            f"{seeds[0].lr:g}",
            *summary(seeds),
        )
    return table


def main() -> None:
    """Searches, trains and writes ``shapes.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of 4 windows of 256 tokens")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234])
    parser.add_argument("--windows", type=int, default=64, help="of held-out text")
    parser.add_argument("--ranked", type=int, default=0, help="of the best-ranked, to foretell")
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    parser.add_argument("overrides", nargs="*", help="of the search")
    args = parser.parse_args()
    out, console = args.out.resolve(), screen()
    search = out / "search"
    execute([*LAUNCHER, f"recipe={SEARCH}", f"run_dir={search}", *args.overrides])
    runs = list(make(args, search, out))
    found = collect(outcomes(runs, search, args.windows), out / "shapes.json", console)
    console.print(draw(found))
    if args.ranked:
        console.print(foretold(found))


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error
