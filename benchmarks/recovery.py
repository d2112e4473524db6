"""What brings quality back: ways to distil one pruned student, at equal tokens and equal time.

``python -m benchmarks.recovery`` trains every arm on the same windows from the same student with
the same schedule. First each takes ``--steps`` steps. Then the arms whose steps are faster or
slower, or whose teacher was prepared at a cost, are trained again for as many steps as fit into
the time of the reference arm; correcting a teacher counts, storing what it says does not, since
other runs use it again (its time is shown). Each arm is a run of the launcher, so a killed
benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.table import Table

from benchmarks.contenders import launch, make_inputs, manifest_of
from benchmarks.students import schedule
from recipes.core.errors import RecipeError
from recipes.core.files import write_json, write_text_atomically
from recipes.core.metrics import METRICS, steps_of
from recipes.core.screen import screen
from recipes.distillation.results import TrainingResult
from recipes.evaluation.results import EvaluationResult
from recipes.report.plots import interval_plot

REFERENCE = "forward_kl"
SAME_TIME = 0.05
"""An arm whose number of steps would change by less than this share is not trained again."""


@dataclass(frozen=True)
class Arm:
    """One way to distil.

    Attributes:
        overrides: What the launcher is told, without ``stages.``.
        teacher: Where the teacher's knowledge comes from, a choice of ``conf/teacher``.
        prepare: Stages that make it.
    """

    overrides: tuple[str, ...] = ()
    teacher: str = "live"
    prepare: tuple[str, ...] = ()


ARMS = {
    "next_token": Arm(("distill.kd_weight=0", "distill.lm_weight=1")),
    REFERENCE: Arm(),
    "reverse_kl": Arm(("distill.logits_loss=reverse_kl",)),
    "jsd": Arm(("distill.logits_loss=jsd",)),
    "forward_kl_and_next_token": Arm(("distill.lm_weight=0.2",)),
    "forward_kl_and_hidden": Arm(("distill.hidden_weight=1",)),
    "forward_kl_and_hidden_dynamic": Arm(
        ("distill.hidden_weight=1", "distill.loss_balancer=dynamic")
    ),
    "cached_32": Arm(("cache_logits.top_k=32",), "cached", ("cache_logits",)),
    "cached_128": Arm(("cache_logits.top_k=128",), "cached", ("cache_logits",)),
    "corrected": Arm((), "corrected", ("correct_teacher",)),
}


@dataclass(frozen=True)
class Outcome:
    """What an arm came to. Times in seconds, losses in nats on held-out text."""

    steps: int
    tokens: int
    training_seconds: float
    prepare_seconds: float
    perplexity: float
    loss: float
    loss_standard_error: float
    kl_to_teacher: float
    top1_agreement: float
    recovered: float | None


def run_arm(name: str, steps: int, base: Path, out: Path) -> Outcome:
    """Trains and evaluates one arm, or reads what an earlier call found."""
    arm = ARMS[name]
    stages = (*arm.prepare, "distill", "evaluate")
    first = stages[0]
    settings: dict[str, Any] = {
        "distill.inputs.student": base / "prune",
        "distill.lm_weight": 0,
        **schedule(steps),
        "evaluate.inputs.teacher": base / "import_hf",
        "evaluate.inputs.pruned": base / "prune",
        "evaluate.num_generations": 1,
        f"{first}.inputs.teacher": base / "import_hf",
    }
    settings |= dict(override.split("=") for override in arm.overrides)
    settings |= {f"{stage}.inputs.data": base / "prepare_data" for stage in stages}
    if "cache_logits" in stages:
        settings["cache_logits.num_windows"] = 4 * steps
    if "correct_teacher" in stages:
        settings["correct_teacher.max_steps"] = steps
        settings["correct_teacher.warmup_steps"] = steps // 10
    launch(base, out, stages, settings, f"teacher={arm.teacher}")
    return read_outcome(arm, out)


def read_outcome(arm: Arm, out: Path) -> Outcome:
    """Reads an arm's manifests and metrics."""
    trained = manifest_of(out / "distill").result(TrainingResult)
    evaluation = manifest_of(out / "evaluate").result(EvaluationResult)
    found = evaluation.distilled
    return Outcome(
        steps=trained.steps,
        tokens=trained.tokens,
        training_seconds=round(training_seconds(out / "distill"), 1),
        prepare_seconds=round(
            sum(
                training_seconds(out / stage)
                if stage == "correct_teacher"
                else manifest_of(out / stage).seconds
                for stage in arm.prepare
            ),
            1,
        ),
        recovered=evaluation.recovered,
        perplexity=found.perplexity,
        loss=found.loss,
        loss_standard_error=found.loss_standard_error,
        kl_to_teacher=found.kl_to_teacher,
        top1_agreement=found.top1_agreement,
    )


def training_seconds(stage: Path) -> float:
    """Time spent in steps, without start, validation and saving."""
    manifest = manifest_of(stage)
    trained = manifest.result(TrainingResult)
    per_step = trained.tokens / trained.steps
    steps = steps_of(stage / METRICS, manifest.stage)
    return sum(per_step / float(step["tokens_per_second"]) for step in steps)


def steps_in_time(outcome: Outcome, arm: Arm, seconds: float) -> int:
    """Steps of an arm that fit into the time; a teacher is corrected for as many steps."""
    cost = outcome.prepare_seconds if "correct_teacher" in arm.prepare else 0.0
    per_step = outcome.training_seconds / outcome.steps
    if cost:  # it is trained for as many steps as the student
        per_step += cost / outcome.steps
    return max(1, int(seconds / per_step))


def draw(title: str, outcomes: Mapping[str, Outcome]) -> Table:
    """A table, best perplexity first."""
    table = Table(
        "arm", "steps", "tokens", "training", "prepare", "perplexity", "recovered", "KL", "top-1",
        title=title,
    )  # fmt: skip
    for name, o in sorted(outcomes.items(), key=lambda item: item[1].loss):
        table.add_row(
            name,
            f"{o.steps}",
            f"{o.tokens:,}",
            f"{o.training_seconds:.0f} s",
            f"{o.prepare_seconds:.0f} s" if o.prepare_seconds else "",
            f"{o.perplexity:.2f}",
            "" if o.recovered is None else f"{o.recovered:.1%}",
            f"{o.kl_to_teacher:.4f}",
            f"{o.top1_agreement:.1%}",
        )
    return table


def plots(title: str, outcomes: Mapping[str, Outcome]) -> Markup:
    """Held-out loss with standard errors, and KL to the teacher."""
    ordered = sorted(outcomes.items(), key=lambda item: item[1].loss)
    losses = [(name, "distilled", o.loss, o.loss_standard_error) for name, o in ordered]
    divergences = [(name, "teacher", o.kl_to_teacher, 0.0) for name, o in ordered]
    name = title.replace(" ", "-")
    return Markup("<h2>{}</h2><h3>Held-out loss</h3>{}<h3>KL to the teacher</h3>{}").format(
        title,
        interval_plot(f"loss-{name}", f"Held-out loss, {title}", losses),
        interval_plot(f"kl-{name}", f"KL to the teacher, {title}", divergences),
    )


PAGE = """<!doctype html><meta charset="utf-8"><title>Recovery</title><style>
body{{font:15px system-ui;max-width:56rem;margin:2rem auto;padding:0 1rem}}
svg{{width:100%;overflow:visible;font:12px system-ui}}
svg line,svg path{{stroke:#999}} circle{{fill:#3b7d4f}} rect{{fill:#ddd}}
</style><h1>Recovery by way of distilling</h1>{}"""


def main() -> None:
    """Runs the arms and writes ``recovery.json`` and ``recovery.html``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run-dir", type=Path, help="with import_hf, prepare_data and prune")
    parser.add_argument("--steps", type=int, default=60, help="of 4 windows of 256 tokens")
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/recovery"))
    args = parser.parse_args()
    base = (args.run_dir or make_inputs()).resolve()
    out = args.out.resolve()
    console = screen()
    results: dict[str, dict[str, Outcome]] = {"equal tokens": {}, "equal time": {}}
    names = [REFERENCE, *(name for name in args.only if name != REFERENCE)]
    for name in names:
        results["equal tokens"][name] = run_arm(name, args.steps, base, out / name)
        console.print(name, results["equal tokens"][name])
    seconds = results["equal tokens"][REFERENCE].training_seconds
    for name in names:
        before = results["equal tokens"][name]
        steps = steps_in_time(before, ARMS[name], seconds)
        if abs(steps / args.steps - 1) > SAME_TIME:
            before = run_arm(name, steps, base, out / f"{name}-in-time")
        results["equal time"][name] = before
    for title, outcomes in results.items():
        console.print(draw(title, outcomes))
    plain = {t: {n: asdict(o) for n, o in outcomes.items()} for t, outcomes in results.items()}
    write_json(out / "recovery.json", plain)
    page = Markup(PAGE).format(Markup("").join(plots(t, o) for t, o in results.items()))
    write_text_atomically(out / "recovery.html", page)


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error
