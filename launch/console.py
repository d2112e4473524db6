"""Prints a run's plan, tables, summary and gates (limits that its results must meet)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.plan import Plan
from launch.planned import SKIP
from nemo_convert.hub import HUB_SECONDS
from recipes.core.errors import RecipeError
from recipes.core.manifest import Manifest, read_manifest
from recipes.core.screen import plain_table
from recipes.data.origins import known_licences
from recipes.data.results import NOT_COMPARED, DatasetResult, describe_counts
from recipes.data.settings import PrepareDataConfig
from recipes.data.sources import parse_source, source_documents, source_names
from recipes.engines.results import BenchmarkResults, EngineResult
from recipes.evaluation.results import EvaluationResult, ServedResult, TaskResults
from recipes.planning.limits import source_tokens
from recipes.planning.results import Cell, PlanResult
from recipes.pruning.results import HealResult
from recipes.report.settings import REPORT_FILE
from recipes.search.results import LatencyResult, SearchResult


def print_recipes(recipes: Mapping[str, str], console: Console) -> None:
    """Lists the recipes, one line each."""
    table = Table(title="recipes", title_justify="left", box=None, show_header=False)
    for name, description in recipes.items():
        table.add_row(f"[bold]{name}", description)
    console.print(table)
    console.print("Choose one: python launch/run.py recipe=NAME   (--help shows more)")


def print_plan(plan: Plan, console: Console) -> None:
    """Shows the action of each stage with its reason, and the gates of the run."""
    table = plain_table(f"plan for {plan.run_dir}", "stage", "action", "why")
    for stage in plan.stages:
        style = "dim" if stage.action == SKIP else "bold"
        table.add_row(f"[{style}]{stage.name}", stage.action, escape(stage.reason))
    console.print(table)
    console.print(f"gates: {', '.join(map(str, plan.gates)) or 'none'}", markup=False)


def print_sources(plan: Plan, console: Console) -> None:
    """Shows the text sources that the plan's ``prepare_data`` stages will tokenize."""
    for config in (stage.config for stage in plan.todo()):
        if not isinstance(config, PrepareDataConfig):
            continue
        tokens_by_name = source_tokens(config)
        licences = known_licences(tuple(config.texts()), HUB_SECONDS)
        table = plain_table("text", "source", "used for", "at most", "licence")
        for name, source in source_names(config.all_sources()).items():
            licence = parse_source(source).licence or licences.get(source) or "not stated"
            use = "training" if source in config.sources else "evaluation only"
            # A size is known only if the text is on this machine or the settings limit it.
            sizes = []
            if documents := source_documents(source):
                sizes += [f"{documents:,} documents"]
            if (tokens := tokens_by_name[name]) < math.inf:
                sizes += [f"about {tokens:,.0f} tokens"]
            table.add_row(escape(name), use, ", ".join(sizes) or "unknown", escape(licence))
        if table.rows:
            console.print(table)
        if config.prefix:  # no sources: the text is already tokenized
            console.print(f"text {config.prefix}: {NOT_COMPARED}", markup=False)


def print_notes(plan: Plan, skip_rules: Collection[str], console: Console) -> None:
    """Shows the plan's warnings, and its errors of the rules in ``skip_rules``."""
    for note in plan.notes:
        is_skipped = note.rule.name in skip_rules
        label = "skipped" if is_skipped else note.rule.severity
        console.print(f"{label}: {note}", markup=False, style="dim" if is_skipped else "yellow")


def print_tables(plan: Plan, console: Console) -> None:
    """Shows tables of ``plan`` and ``enumerate_shapes``: if the stage ran, or is the only stage."""
    for stage in plan.stages if len(plan.stages) == 1 else plan.todo():
        manifest = read_manifest(stage.directory)
        # "plan" and "shapes" are the types of artifacts that these stages write.
        if manifest is None or manifest.kind not in ("plan", "shapes"):
            continue
        for result_table in manifest.result(PlanResult).tables:
            table = plain_table(result_table.title, *result_table.columns)
            for row in result_table.rows:
                table.add_row(*(escape(_cell_text(cell)) for cell in row))
            console.print(table)


def _cell_text(cell: Cell) -> str:
    """Formats numbers with thousands separators, and floats with four significant digits."""
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:,.4g}" if isinstance(cell, float) else str(cell)


def print_summary(plan: Plan, seconds: float, console: Console) -> None:
    """Shows the time, memory, size and main result of every stage, and the command's time."""
    stages_run = {stage.name for stage in plan.todo()}
    table = plain_table("summary", "stage", "", "time", "peak memory", "size", "result")
    for stage in plan.stages:
        manifest = read_manifest(stage.directory)
        if manifest is None:
            table.add_row(stage.name, "incomplete")
            continue
        table.add_row(
            stage.name,
            "ran" if stage.name in stages_run else "skipped",
            f"{manifest.seconds:.0f} s",
            f"{manifest.peak_rss_bytes / 1e9:.1f} GB",
            f"{manifest.total_bytes() / 1e6:.1f} MB",
            headline(manifest),
        )
    console.print(table)
    if stages_run:
        message = f"{len(stages_run)} stage{'s' if len(stages_run) > 1 else ''} ran"
    else:
        message = "everything was complete, nothing ran"
    console.print(f"{message}; {seconds:.1f} s")


def headline(manifest: Manifest) -> str:
    """Returns the most important result of a stage, as text for a table."""
    if manifest.kind in HEADLINES:
        return HEADLINES[manifest.kind](manifest)
    # All other types of artifacts are models.
    if result := manifest.result_if("heal", HealResult):
        return f"KL {result.kl_pruned:.3f} → {result.kl_healed:.3f} on validation text"
    size = f"{manifest.parameters / 1e6:.1f} M parameters" if manifest.parameters else ""
    # ``stopped`` says why a distillation ended before its last step.
    return ", ".join(filter(None, (size, manifest.metrics.get("stopped"))))


def _tokens(manifest: Manifest) -> str:
    """States the number of tokens, and for each chat source how many conversations were used."""
    data = manifest.result(DatasetResult)
    text = f"{sum(data.tokens.values()):,} tokens"
    for source, counts in data.conversations.items():
        text += f"; of {source}, {describe_counts(counts)}"
    return text


def _perplexities(manifest: Manifest) -> str:
    """States the perplexities of the teacher, the pruned and the distilled model, in this order."""
    result = manifest.result(EvaluationResult)
    text = " → ".join(f"{quality.perplexity:.1f}" for quality in result.models().values())
    if result.recovered is not None:
        text += f", recovered {result.recovered:.0%} of the loss added by pruning"
    return f"perplexity {text}"


def _mean_score(manifest: Manifest) -> str:
    """States each model's mean score over the benchmarks whose scores are fractions."""
    results = manifest.result(TaskResults)
    num_fractions = len(results.fractions())
    if not num_fractions:  # other metrics, such as perplexity, cannot be averaged
        return f"{', '.join(results.tasks)} evaluated"
    means = " → ".join(f"{value:.3f}" for value in results.means().values())
    return f"mean score of {num_fractions} benchmark{'s' if num_fractions > 1 else ''} {means}"


def _served(manifest: Manifest) -> str:
    """States the perplexities of student and served model, and the mean difference of scores."""
    result = manifest.result(ServedResult)
    text = f"{result.program} {result.precision}"
    if result.text:
        text += f", perplexity {result.text.student_perplexity:.1f} → "
        text += f"{result.text.served_perplexity:.1f}"
    differences = [task.difference.value for task in result.tasks.values() if task.is_fraction]
    return f"{text}, mean score {fmean(differences):+.3f}" if differences else text


def _planned_cost(manifest: Manifest) -> str:
    cost = manifest.result(PlanResult).summary
    hours = f"{cost['device-hours']:,} device-hours of training"
    return f"{hours} on {cost['hardware']}, ${cost['dollars']:,}"


def _best_candidate(manifest: Manifest) -> str:
    result = manifest.result(SearchResult)
    # Until successive halving chooses a candidate, the best is the first, which has the best rank.
    best = result.chosen() or result.candidates[0]
    return f"{best.name}, KL {best.kl_to_teacher:.3f}, {len(result.candidates)} shapes"


def _latency(manifest: Manifest) -> str:
    """States the teacher's latency, and the latency model's largest error on held-out shapes."""
    shapes = manifest.result(LatencyResult).shapes  # the first is the teacher's
    held_out = [shape for shape in shapes if not shape.is_fitted]
    error = max(abs(shape.error) for shape in held_out or shapes)
    return f"teacher {shapes[0].step_ms:.3g} ms a step, fitted within {error:.0%}"


def _speedup(manifest: Manifest) -> str:
    """States the first measured speed-up over the teacher, with its backend and batch size."""
    speedup = manifest.result(BenchmarkResults).speedups[0]
    return (
        f"{speedup.prefill:.2f} × prefill, {speedup.decode:.2f} × decode "
        f"({speedup.backend}, batch {speedup.batch_size})"
    )


HEADLINES: Mapping[str, Callable[[Manifest], str]] = {
    "dataset": _tokens,
    "eval_results": _perplexities,
    "task_results": _mean_score,
    "served_results": _served,
    "plan": _planned_cost,
    "shapes": lambda m: f"{m.result(PlanResult).summary['shapes']} shapes",
    "latency_model": _latency,
    "search_results": _best_candidate,
    "engine": lambda m: "{0.backend} {0.precision}".format(m.result(EngineResult)),
    "speed_results": _speedup,
    "report": lambda m: REPORT_FILE,
}
"""For each type of artifact (``Manifest.kind``), the function that formats its main result."""


def require_gates(plan: Plan, console: Console) -> None:
    """Shows the measured value of each gate; raises ``RecipeError`` if a gate failed.

    No stage checks gates. So a failed gate deletes no results, and a new threshold makes no stage
    run again.
    """
    if not plan.gates:
        return
    verdicts, unmeasured = plan.judge_gates()
    table = plain_table("gates", "gate", "measured", "")
    for verdict in verdicts:
        value = "undefined" if verdict.measured is None else f"{verdict.measured:.4g}"
        table.add_row(str(verdict.gate), value, "passed" if verdict.passed else "[bold]FAILED")
    for gate in unmeasured:
        table.add_row(str(gate), "not measured", "not checked")
    console.print(table)
    if failed := [verdict for verdict in verdicts if not verdict.passed]:
        raise RecipeError(
            f"{len(failed)} of {len(plan.gates)} gates failed: {'; '.join(map(str, failed))}.",
            f"the results are in {plan.run_dir}; distil longer, prune less, serve it in a higher "
            "precision, or change the gates (for benchmarks with few items, replace recovered.TASK "
            "with difference_low.TASK, the lower end of a confidence interval)",
        )
