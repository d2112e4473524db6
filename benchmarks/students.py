"""Trains a student with different losses or data, and evaluates all of them on the same text.

    python -m benchmarks.students --steps 40 --seeds 1234 1 2 \
        --way "recipe" \
        --way "forward_kl stages.distill.lm_weight=0" \
        --way "chat data=chat 'data.sources=[teacher://chat#tokens=60000]'"

A way is a name, followed by overrides of the launcher. Each way trains once per seed, in a run of
the launcher in ``OUT/NAME-SEED``. All start from the same student and have the same schedule. An
interrupted benchmark resumes. A way that overrides ``data`` prepares its own text to train on. All
are evaluated on the held-out text of ``--run-dir``.

Choose a way by its validation loss. It is measured on validation text of the way's own data, so
compare only ways with the same data. Held-out text is for reporting.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

from rich.table import Table

from benchmarks.launching import RECIPE, complete_manifest, launch, make_inputs, run_main
from recipes.core.errors import RecipeError
from recipes.core.files import write_json
from recipes.core.screen import plain_table, screen
from recipes.distillation.results import TrainingResult
from recipes.evaluation.results import ROLES, EvaluationResult, TextQuality


@dataclass(frozen=True)
class Way:
    """One way to train: a name and overrides of the launcher."""

    name: str
    overrides: list[str]

    @property
    def has_own_data(self) -> bool:
        """Whether it prepares its own text."""
        return any(o.startswith(("data=", "data.")) for o in self.overrides)


@dataclass(frozen=True)
class StudentResult:
    """A trained student and its evaluation."""

    way: str
    seed: int
    tokens: int
    seconds: float
    """Time of the training steps."""
    validation_loss: float | None
    evaluation: EvaluationResult


def parse_way(text: str) -> Way:
    """Parses ``NAME OVERRIDE ...``.

    Raises:
        RecipeError: The name is missing or invalid for a folder, or an override sets the teacher.
    """
    name, *overrides = shlex.split(text) or [""]
    if not name or "=" in name or "/" in name:
        fix = "write NAME OVERRIDE ..."
        raise RecipeError(f"invalid --way '{text}': must start with a name", fix)
    if any(o.startswith("teacher=") for o in overrides):
        raise RecipeError(
            f"invalid --way '{text}': all ways use the live teacher", "remove teacher="
        )
    return Way(name, overrides)


def train(way: Way, seed: int, steps: int, base: Path, student: Path, out: Path) -> StudentResult:
    """Trains and evaluates a student, unless both are complete.

    Args:
        way: Losses or data to train with.
        seed: Seed of the training.
        steps: Optimizer steps.
        base: Run with the teacher and the text.
        student: Directory of the stage that made the student.
        out: Run directory to write.
    """
    teacher, data = base / "import_hf", base / "prepare_data"
    settings: dict[str, object] = {
        "distill.inputs.teacher": teacher,
        "distill.inputs.student": student,
        "distill.max_steps": steps,
        "distill.warmup_steps": steps // 10,
        "distill.checkpoint_interval": steps,
        "distill.val_check_interval": steps,
        "distill.seed": seed,
        "evaluate.inputs.teacher": teacher,
        "evaluate.inputs.pruned": base / "prune",
        "evaluate.inputs.data": data,
    }
    stages = ["distill", "evaluate"]
    if way.has_own_data:
        stages.insert(0, "prepare_data")
        settings["prepare_data.inputs.tokenizer"] = teacher
    else:
        settings["distill.inputs.data"] = data
    length = f"data.seq_length={complete_manifest(data).config['seq_length']}"
    launch(base, out, stages, settings, length, *way.overrides)
    trained = complete_manifest(out / "distill").result(TrainingResult)
    return StudentResult(
        way.name,
        seed,
        trained.tokens,
        trained.tokens / trained.tokens_per_second,
        trained.val_loss,
        complete_manifest(out / "evaluate").result(EvaluationResult),
    )


def by_source(result: EvaluationResult, role: str) -> dict[str, TextQuality]:
    """Returns a model's quality by source of the text."""
    sources = result.sources.items()
    qualities: dict[str, TextQuality] = {name: getattr(source, role) for name, source in sources}
    return qualities or {"text": result.models()[role]}


def cells(results: Sequence[EvaluationResult], role: str) -> list[str]:
    """Returns a table's cells about a model: mean perplexity, that of each source, and KL.

    The mean over sources is geometric. Each cell has mean and spread over the seeds.
    """
    models = [by_source(result, role) for result in results]
    losses = [fmean([q.loss for q in model.values()]) for model in models]
    kls = [fmean([q.kl_to_teacher for q in model.values()]) for model in models]
    return [
        with_spread([math.exp(loss) for loss in losses]),
        *(with_spread([model[name].perplexity for model in models]) for name in models[0]),
        with_spread(kls, ".3f"),
    ]


def with_spread(values: Sequence[float], style: str = ".1f") -> str:
    """Formats a mean and the standard deviation over seeds."""
    text = format(fmean(values), style)
    return f"{text} ± {format(stdev(values), style)}" if len(values) > 1 else text


def draw(outcomes: Sequence[StudentResult]) -> Table:
    """Makes a table with rows for the teacher, the pruned model and each way."""
    first = outcomes[0].evaluation
    table = plain_table(
        "held-out text", "way", "tokens", "s", "validation loss", "perplexity",
        *by_source(first, "teacher"), "KL", "recovered",
    )  # fmt: skip
    for role in ROLES[:2]:
        table.add_row(role, "", "", "", *cells([first], role), "")
    for name in dict.fromkeys(outcome.way for outcome in outcomes):
        seeds = [outcome for outcome in outcomes if outcome.way == name]
        losses = [s.validation_loss for s in seeds if s.validation_loss is not None]
        recovered = [r for s in seeds if (r := s.evaluation.recovered) is not None]
        table.add_row(
            name,
            f"{seeds[0].tokens:,}",
            with_spread([s.seconds for s in seeds], ".0f"),
            with_spread(losses, ".3f") if losses else "",
            *cells([s.evaluation for s in seeds], "distilled"),
            with_spread(recovered, ".1%") if recovered else "",
        )
    return table


def main() -> None:
    """Trains all ways, prints the table, and writes ``students.json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.students")
    parser.add_argument("--way", action="append", required=True, help="NAME OVERRIDE ...")
    parser.add_argument("--run-dir", type=Path, help=f"run of {RECIPE}, complete up to prune")
    parser.add_argument(
        "--student", default="prune", help="stage of that run with the student's checkpoint"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234])
    parser.add_argument("--out", type=Path, default=Path("runs/students"))
    args = parser.parse_args()
    ways = [parse_way(text) for text in args.way]
    base, out = (args.run_dir or make_inputs()).resolve(), args.out.resolve()
    outcomes = [
        train(way, seed, args.steps, base, base / args.student, out / f"{way.name}-{seed}")
        for seed in args.seeds
        for way in ways
    ]
    write_json(out / "students.json", [asdict(outcome) for outcome in outcomes])
    screen().print(draw(outcomes))


if __name__ == "__main__":
    run_main("benchmarks.students")
