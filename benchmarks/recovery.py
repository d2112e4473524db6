"""What brings quality back: ways to distil pruned students, at equal tokens and equal time.

``python -m benchmarks.recovery`` trains every arm on the same windows from the same student with
the same schedule, once for each seed, which orders the windows. With ``--equal-time`` the arms
whose steps are faster or slower, or whose teacher was prepared at a cost, are then trained again
for as many steps as fit into the time of the reference arm; correcting a teacher counts, storing
what it says does not, since other runs use it again (its time is shown). All are judged on
validation text, which chooses, and on held-out text, which reports. Each arm is a run of the
launcher, so a killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.table import Table

from benchmarks.contenders import RECIPE, launch, make_inputs, manifest_of
from benchmarks.students import (
    Judgement,
    Quality,
    Student,
    collect,
    grouped,
    heal,
    judge,
    prune,
    schedule,
    spread,
    students_of,
    varied,
)
from recipes.core.errors import RecipeError
from recipes.core.files import write_text_atomically
from recipes.core.metrics import METRICS, steps_of
from recipes.core.screen import screen
from recipes.core.statistics import mean
from recipes.distillation.results import TrainingResult
from recipes.evaluation.paired import recovered
from recipes.report.plots import interval_plot

REFERENCE = "forward_kl"
BATCH = 4
"""Windows a step, but for arms that say so."""
WINDOW, ENOUGH = 256, 1.5
"""Tokens a window, and how many times those trained on there are, for all parts."""
SAME_TIME = 0.05
"""An arm whose number of steps would change by less than this share is not trained again."""
STUDENTS: dict[str, dict[str, object]] = {
    "given": {},  # as the run directory has it
    "depth": {"target_num_layers": 24, "layer_importance": "block"},
    "width": {"target_hidden_size": 512, "target_ffn_hidden_size": 1152},
    "searched": {"target_num_layers": 21, "target_ffn_hidden_size": 1472},
}
"""What to prune the embedded teacher to: as the recipes do, and as a search for 75% of the
parameters found."""
HEALED = "_healed"
"""Behind the name of a student: it is healed before it is trained."""


@dataclass(frozen=True)
class Arm:
    """One way to distil.

    Attributes:
        overrides: What the launcher is told, without ``stages.``.
        teacher: Where the teacher's knowledge comes from, a choice of ``conf/teacher``.
        prepare: Stages that make it.
        batch: Windows a step; fewer make for more steps.
        writes: ``chat`` to train on conversations that the teacher writes; ordinary text if empty.
        beside: Whether it stands beside ordinary text, of whose sources each has as many tokens.
    """

    overrides: tuple[str, ...] = ()
    teacher: str = "live"
    prepare: tuple[str, ...] = ()
    batch: int = BATCH
    writes: str = ""
    beside: bool = False


def _rate(lr: str) -> tuple[str, ...]:
    return (f"distill.lr={lr}", f"distill.min_lr={float(lr) / 10:g}")


ARMS = {
    "next_token": Arm(("distill.kd_weight=0", "distill.lm_weight=1")),
    REFERENCE: Arm(),
    "reverse_kl": Arm(("distill.logits_loss=reverse_kl",)),
    "jsd": Arm(("distill.logits_loss=jsd",)),
    "kl_and_next_token": Arm(("distill.lm_weight=0.2",)),
    "kl_and_hidden": Arm(("distill.hidden_weight=1",)),
    "kl_and_hidden_dynamic": Arm(("distill.hidden_weight=1", "distill.loss_balancer=dynamic")),
    "small_batch": Arm(batch=2),
    "lr_6e-4": Arm(_rate("6e-4")),
    "lr_1e-3": Arm(_rate("1e-3")),
    "cached_32": Arm(("cache_logits.top_k=32",), "cached", ("cache_logits",)),
    "cached_128": Arm(("cache_logits.top_k=128",), "cached", ("cache_logits",)),
    "cached_drawn": Arm(
        ("cache_logits.top_k=8", "cache_logits.tail_draws=6"), "cached", ("cache_logits",)
    ),
    "written_chat": Arm(prepare=("prepare_data",), writes="chat"),
    "beside_written_chat": Arm(prepare=("prepare_data",), writes="chat", beside=True),
    "corrected": Arm((), "corrected", ("correct_teacher",)),
}


@dataclass(frozen=True, kw_only=True)
class Outcome(Student):
    """What an arm came to. Times in seconds."""

    student: str
    arm: str
    budget: str
    steps: int
    training_seconds: float
    prepare_seconds: float
    healed: Judgement | None
    """What its training began with, where that was healed."""
    recovered: float | None
    """Of what pruning lost on held-out text, every kind the same; see ``paired``."""


@dataclass(frozen=True)
class Run:
    """A training to make, or made."""

    student: str
    arm: str
    seed: int
    budget: str
    steps: int
    pruned: Path
    healed: Path | None
    """What the training begins with, where it is not the pruned one."""
    out: Path


def train(run: Run, base: Path) -> None:
    """Makes an arm's run, unless it is complete."""
    arm = ARMS[run.arm]
    settings: dict[str, Any] = {
        "distill.inputs.student": run.healed or run.pruned,
        "distill.lm_weight": 0,
        "distill.global_batch_size": arm.batch,
        "distill.micro_batch_size": arm.batch,
        **schedule(run.steps, run.seed),
    }
    settings |= dict(override.split("=") for override in (*_rate("3e-4"), *arm.overrides))
    stages = (*arm.prepare, "distill")
    if arm.writes:
        ordinary = manifest_of(base / "prepare_data").config["sources"] if arm.beside else []
        tokens = ENOUGH * arm.batch * run.steps * WINDOW / (1 + len(ordinary))
        written = f"teacher://{arm.writes}#tokens={tokens:.0f}&seed={run.seed}"
        settings["prepare_data.sources"] = json.dumps([*ordinary, written])
        settings["prepare_data.max_tokens"] = round(tokens)
        settings["prepare_data.heldout_sources"] = "[]"
        settings["prepare_data.inputs.tokenizer"] = base / "import_hf"
        settings["distill.inputs.teacher"] = base / "import_hf"
    else:
        settings[f"{stages[0]}.inputs.teacher"] = base / "import_hf"
        settings |= {f"{stage}.inputs.data": base / "prepare_data" for stage in stages}
    if "cache_logits" in stages:
        settings["cache_logits.num_windows"] = arm.batch * run.steps
        settings["cache_logits.seed"] = run.seed
    if "correct_teacher" in stages:
        settings["correct_teacher.max_steps"] = run.steps
        settings["correct_teacher.warmup_steps"] = run.steps // 10
    launch(base, run.out, stages, settings, f"teacher={arm.teacher}")


def seconds_of(run: Run) -> tuple[float, float]:
    """Time that a run trained for, and that its teacher took."""
    prepared = (
        training_seconds(run.out / stage)
        if stage == "correct_teacher"
        else manifest_of(run.out / stage).seconds
        for stage in ARMS[run.arm].prepare
    )
    return training_seconds(run.out / "distill"), sum(prepared)


def training_seconds(stage: Path) -> float:
    """Time spent in steps, without start, validation and saving."""
    manifest = manifest_of(stage)
    trained = manifest.result(TrainingResult)
    per_step = trained.tokens / trained.steps
    steps = steps_of(stage / METRICS, manifest.stage)
    return sum(per_step / float(step["tokens_per_second"]) for step in steps)


def steps_in_time(run: Run, seconds: float) -> int:
    """Steps of an arm that fit into the time; a teacher is corrected for as many steps."""
    training, prepared = seconds_of(run)
    cost = training + (prepared if "correct_teacher" in ARMS[run.arm].prepare else 0.0)
    return max(1, int(seconds * run.steps / cost))


def runs_of(
    args: argparse.Namespace, pruned: Mapping[str, Path], healed: Mapping[str, Path], out: Path
) -> list[Run]:
    """All trainings of the same tokens, the reference first, a seed of every arm before another."""
    arms = [REFERENCE, *(name for name in args.only if name != REFERENCE)]
    return [
        Run(
            *(student, arm, seed, "equal tokens"),
            args.steps * BATCH // ARMS[arm].batch,
            pruned[student.removesuffix(HEALED)],
            healed.get(student),
            out / student / f"{arm}-{seed}",
        )
        for seed in args.seeds
        for student in args.students
        for arm in arms
    ]


def run_in_time(run: Run, reference: Run) -> Run:
    """The training that an arm has time for; its own where that is about as long."""
    steps = steps_in_time(run, training_seconds(reference.out / "distill"))
    if abs(steps / run.steps - 1) <= SAME_TIME:
        return replace(run, budget="equal time")
    out = run.out.with_name(f"{run.out.name}-in-time")
    return replace(run, budget="equal time", steps=steps, out=out)


def outcomes(runs: Sequence[Run], base: Path, windows: int) -> Iterable[Outcome]:
    """What every arm came to."""
    students = list(students_of(base, runs, windows))
    begun = judge(base, dict.fromkeys(run.healed for run in runs if run.healed), windows)
    teacher = begun[base / "import_hf"].heldout
    for run, student in zip(runs, students, strict=True):
        training, prepared = seconds_of(run)
        models = (teacher, student["pruned"].heldout, student["distilled"].heldout)
        yield Outcome(
            student=run.student,
            arm=run.arm,
            budget=run.budget,
            steps=run.steps,
            training_seconds=round(training, 1),
            prepare_seconds=round(prepared, 1),
            healed=begun[run.healed] if run.healed else None,
            recovered=recovered(*([-one.loss for one in m.sources.values()] for m in models)),
            **student,
        )


def draw(title: str, found: Sequence[Outcome]) -> Table:
    """A table; beside the held-out figures, by how much each arm differs, seed by seed."""
    kinds = list(found[0].distilled.heldout.sources)
    table = Table(
        "arm", "steps", "seconds", "prepare", "validation", "KL", "held-out", *kinds,
        "recovered", "KL", "top 1", "KL more", title=title,
    )  # fmt: skip
    reference = {s.seed: s.distilled.heldout.kl for s in found if s.arm == REFERENCE}
    for seeds in grouped(found, lambda one: one.arm):
        validation = [one.distilled.validation for one in seeds]
        heldout = [one.distilled.heldout for one in seeds]
        pairs = [s.distilled.heldout.kl - reference[s.seed] for s in seeds]
        table.add_row(
            seeds[0].arm,
            f"{seeds[0].steps}",
            f"{mean([s.training_seconds for s in seeds]):.0f}",
            f"{mean([s.prepare_seconds for s in seeds]):.0f}" if seeds[0].prepare_seconds else "",
            varied([q.perplexity for q in validation]),
            varied([q.kl for q in validation], ".3f"),
            varied([q.perplexity for q in heldout]),
            *(varied([q.sources[kind].perplexity for q in heldout]) for kind in kinds),
            varied([s.recovered for s in seeds if s.recovered is not None], ".1%"),
            varied([q.kl for q in heldout], ".3f"),
            varied([q.agreement for q in heldout], ".1%"),
            "" if seeds[0].arm == REFERENCE else varied(pairs, "+.3f"),
        )
    return table


def plots(title: str, found: Sequence[Outcome]) -> Markup:
    """Held-out loss and KL to the teacher, each with its spread over seeds."""

    def rows(style: str, name: str) -> dict[str, list[tuple[str, float, float]]]:
        return {
            seeds[0].arm: [(style, mean(values), spread(values))]
            for seeds in grouped(found, lambda one: one.arm)
            for values in [[float(getattr(s.distilled.heldout, name)) for s in seeds]]
        }

    name = title.replace(" ", "-").replace(",", "")
    return Markup("<h2>{}</h2><h3>Held-out loss</h3>{}<h3>KL to the teacher</h3>{}").format(
        title,
        interval_plot(f"loss-{name}", f"Held-out loss, {title}", rows("distilled", "loss")),
        interval_plot(f"kl-{name}", f"KL to the teacher, {title}", rows("teacher", "kl")),
    )


PAGE = """<!doctype html><meta charset="utf-8"><title>Recovery</title><style>
body{{font:15px system-ui;max-width:56rem;margin:2rem auto;padding:0 1rem}}
svg{{width:100%;overflow:visible;font:12px system-ui}}
svg line,svg path{{stroke:#999}} circle{{fill:#3b7d4f}} rect{{fill:#ddd}}
</style><h1>Recovery by way of distilling</h1>{}"""


def levels(quality: Quality) -> str:
    """A model's figures by kind of text."""
    each = ", ".join(f"{kind} {one.perplexity:.2f}" for kind, one in quality.sources.items())
    return f"perplexity {quality.perplexity:.2f} ({each}), KL {quality.kl:.3f}"


def main() -> None:
    """Runs the arms and writes ``recovery.json`` and ``recovery.html``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run-dir", type=Path, help=f"of {RECIPE}, up to prune")
    parser.add_argument("--steps", type=int, default=40, help="of 4 windows of 256 tokens")
    students = [*STUDENTS, *(name + HEALED for name in STUDENTS)]
    parser.add_argument("--students", nargs="+", choices=students, default=["depth", "width"])
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234, 1, 2])
    parser.add_argument("--windows", type=int, default=64, help="of held-out text")
    parser.add_argument("--equal-time", action="store_true", help="also compare at equal time")
    parser.add_argument("--out", type=Path, default=Path("runs/recovery"))
    args = parser.parse_args()
    base = (args.run_dir or make_inputs()).resolve()
    out, console = args.out.resolve(), screen()
    pruned = {
        name: prune(base, base / "score", out / name, STUDENTS[name])
        if STUDENTS[name]
        else base / "prune"
        for name in dict.fromkeys(name.removesuffix(HEALED) for name in args.students)
    }
    healed = {
        name: heal(base, pruned[name.removesuffix(HEALED)], out / name)
        for name in args.students
        if name.endswith(HEALED)
    }
    runs = runs_of(args, pruned, healed, out)
    for run in runs:
        train(run, base)
        console.print(f"{run.student} {run.arm} {run.seed}: {seconds_of(run)[0]:.0f} s")
    if args.equal_time:
        references = {(r.student, r.seed): r for r in runs if r.arm == REFERENCE}
        timed = [run_in_time(run, references[run.student, run.seed]) for run in runs]
        for run in timed:
            train(run, base)
        runs += timed
    found = collect(outcomes(runs, base, args.windows), out / "recovery.json", console)
    teacher = judge(base, [], args.windows)[base / "import_hf"]
    console.print(f"teacher: {levels(teacher.heldout)}")
    pages = []
    for student in args.students:
        mine = [one for one in found if one.student == student]
        console.print(f"{student}, pruned: {levels(mine[0].pruned.heldout)}")
        if mine[0].healed:
            console.print(f"{student}, not trained: {levels(mine[0].healed.heldout)}")
        for budget in dict.fromkeys(one.budget for one in mine):
            chosen = [one for one in mine if one.budget == budget]
            console.print(draw(f"{student}, {budget}", chosen))
            pages.append(plots(f"{student}, {budget}", chosen))
    write_text_atomically(out / "recovery.html", Markup(PAGE).format(Markup("").join(pages)))


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error
