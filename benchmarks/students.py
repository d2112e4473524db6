"""Trains students with different losses or data, and evaluates them on the same text.

    python -m benchmarks.students --steps 40 --seeds 1234 1 2 \
        --variant "recipe data=eight_kinds" \
        --variant "forward_kl data=eight_kinds stages.distill.lm_weight=0" \
        --variant "chat data=chat 'data.sources=[teacher://chat#tokens=60000]'"

A variant is a name, followed by overrides of the launcher. Each variant trains once per seed, in
the run directory ``OUT/NAME-SEED``. All variants start from the same student and have the same
schedule. The same command resumes an interrupted benchmark.

A variant that overrides ``data`` prepares its own training text. Other variants train on the text
of ``--run-dir``. They must set ``stages.distill.weights`` if this text has several sources.

All variants are evaluated on the held-out text of ``--run-dir``. A variant's own training text does
not contain these held-out documents, except if it comes prepared in ``data.prefix``.

Choose a variant by its validation loss. This loss is measured on the validation text of the
variant's data, so compare only variants with the same data. Do not choose by held-out text.
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
from recipes.data.results import DatasetResult
from recipes.distillation.results import TrainingResult
from recipes.evaluation.results import EvaluationResult, TextQuality


@dataclass(frozen=True)
class Variant:
    """A variant of training."""

    name: str
    overrides: list[str]

    @property
    def has_own_data(self) -> bool:
        """Whether the variant prepares its own training text."""
        return any(o.startswith(("data=", "data.")) for o in self.overrides)


@dataclass(frozen=True)
class StudentResult:
    """A trained student and its evaluation."""

    variant: str
    seed: int
    tokens: int
    """Number of training tokens."""
    seconds: float
    """Time of the training steps."""
    validation_loss: float | None
    evaluation: EvaluationResult


def parse_variant(text: str) -> Variant:
    """Parses ``NAME OVERRIDE ...``.

    Raises ``RecipeError`` if NAME is missing or no folder name, or an OVERRIDE sets ``teacher``.
    """
    name, *overrides = shlex.split(text) or [""]
    if not name or "=" in name or "/" in name:
        fix = "write NAME OVERRIDE ..."
        raise RecipeError(f"invalid --variant '{text}': must start with a name", fix)
    if any(o.startswith("teacher=") for o in overrides):
        raise RecipeError(
            f"invalid --variant '{text}': all variants use the live teacher", "remove teacher="
        )
    return Variant(name, overrides)


def train(
    variant: Variant, seed: int, steps: int, base: Path, student: Path, out: Path
) -> StudentResult:
    """Trains and evaluates a student in the run directory ``out``. Skips complete stages.

    ``base`` is the run directory with the teacher, the pruned model and the text. ``student`` is
    the directory of the stage that made the student to start from.
    """
    teacher, data = base / "import_hf", base / "prepare_data"
    settings: dict[str, object] = {
        "distill.inputs.teacher": teacher,
        "distill.inputs.student": student,
        "distill.max_steps": steps,
        "distill.warmup_steps": steps // 10,
        "distill.val_check_interval": steps,
        "distill.seed": seed,
        "evaluate.inputs.teacher": teacher,
        "evaluate.inputs.pruned": base / "prune",
        "evaluate.inputs.data": data,
    }
    stages, overrides = ["distill", "evaluate"], list(variant.overrides)
    if variant.has_own_data:
        stages.insert(0, "prepare_data")
        settings["prepare_data.inputs.tokenizer"] = teacher
        # A student must not be trained on documents on which it is evaluated.
        overrides.append(f"+stages.prepare_data.inputs.held_out={data}")
    else:
        require_weights(variant, data)
        settings["distill.inputs.data"] = data
    length_override = f"data.seq_length={complete_manifest(data).config['seq_length']}"
    launch(base, out, stages, settings, length_override, *overrides)
    training = complete_manifest(out / "distill").result(TrainingResult)
    return StudentResult(
        variant=variant.name,
        seed=seed,
        tokens=training.tokens,
        seconds=training.tokens / training.tokens_per_second,
        validation_loss=training.val_loss,
        evaluation=complete_manifest(out / "evaluate").result(EvaluationResult),
    )


def require_weights(variant: Variant, data: Path) -> None:
    """Checks that a variant without its own text sets weights if the text has several sources.

    Weights in ``data.sources`` of the run that prepared the text do not apply to other runs.
    Without weights, longer sources would count more, and no message would say so. Therefore this
    function raises ``RecipeError`` if weights are missing.
    """
    sources = complete_manifest(data).result(DatasetResult).source_tokens["train"]
    if len(sources) > 1 and not any("stages.distill.weights=" in o for o in variant.overrides):
        example = ", ".join(f"{entry.source}: 1" for entry in sources)
        raise RecipeError(
            f"the text of {data} has several sources, and variant '{variant.name}' does not say "
            "how much each counts",
            "add data=NAME to the variant, which then prepares this text, or "
            f"'+stages.distill.weights={{{example}}}' (or ={{}}: longer sources count more)",
        )


def by_source(result: EvaluationResult, role: str) -> dict[str, TextQuality]:
    """Returns a model's quality by source of the text; a single source is named "text".

    ``role`` is the model: ``teacher``, ``pruned`` or ``distilled``.
    """
    qualities = {name: getattr(source, role) for name, source in result.sources.items()}
    return qualities or {"text": result.models()[role]}


def cells(results: Sequence[EvaluationResult], role: str) -> list[str]:
    """Returns a model's cells in the table: perplexity overall and by source, and KL.

    The overall perplexity is the geometric mean over sources. The KL is the mean over sources.
    ``results`` has one result per seed.
    """
    qualities = [by_source(result, role) for result in results]  # one dict per seed
    losses = [fmean([q.loss for q in by_name.values()]) for by_name in qualities]
    kls = [fmean([q.kl_to_teacher for q in by_name.values()]) for by_name in qualities]
    return [
        with_spread([math.exp(loss) for loss in losses]),
        *(with_spread([q[source].perplexity for q in qualities]) for source in qualities[0]),
        with_spread(kls, ".3f"),
    ]


def with_spread(values: Sequence[float], style: str = ".1f") -> str:
    """Formats the mean of values, one per seed, and the standard deviation of several values."""
    text = format(fmean(values), style)
    return f"{text} ± {format(stdev(values), style)}" if len(values) > 1 else text


def draw(results: Sequence[StudentResult]) -> Table:
    """Makes a table with rows for the teacher, the pruned model and each variant."""
    first = results[0].evaluation
    table = plain_table(
        "held-out text", "variant", "tokens", "s", "validation loss", "perplexity",
        *by_source(first, "teacher"), "KL", "recovered",
    )  # fmt: skip
    for role in ("teacher", "pruned"):  # the same models in all results
        table.add_row(role, "", "", "", *cells([first], role), "")
    for name in dict.fromkeys(result.variant for result in results):
        runs = [result for result in results if result.variant == name]  # one per seed
        losses = [run.validation_loss for run in runs if run.validation_loss is not None]
        evaluations = [run.evaluation for run in runs]
        recovered = [e.recovered for e in evaluations if e.recovered is not None]
        table.add_row(
            name,
            f"{runs[0].tokens:,}",
            with_spread([run.seconds for run in runs], ".0f"),
            with_spread(losses, ".3f") if losses else "",
            *cells(evaluations, "distilled"),
            with_spread(recovered, ".1%") if recovered else "",
        )
    return table


def main() -> None:
    """Reads the command line, trains all variants, prints the table, writes ``students.json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.students")
    parser.add_argument("--variant", action="append", required=True, help="NAME OVERRIDE ...")
    parser.add_argument("--run-dir", type=Path, help=f"run of {RECIPE}, complete up to prune")
    parser.add_argument(
        "--student", default="prune", help="stage of --run-dir with the student's checkpoint"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234])
    parser.add_argument("--out", type=Path, default=Path("runs/students"))
    args = parser.parse_args()
    variants = [parse_variant(text) for text in args.variant]
    base, out = (args.run_dir or make_inputs()).resolve(), args.out.resolve()
    results = [
        train(variant, seed, args.steps, base, base / args.student, out / f"{variant.name}-{seed}")
        for seed in args.seeds
        for variant in variants
    ]
    write_json(out / "students.json", [asdict(result) for result in results])
    screen().print(draw(results))


if __name__ == "__main__":
    run_main("benchmarks.students")
