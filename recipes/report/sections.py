"""Prepares the report's sections about optional inputs, and plots of quality against cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields

from markupsafe import Markup

from nemo_convert.architecture import Architecture
from nemo_convert.results import GgufResult
from recipes.core.manifest import Manifest
from recipes.core.metrics import flatten
from recipes.core.statistics import margin95
from recipes.distillation.results import DistillationResult
from recipes.engines.results import BenchmarkResults, BenchmarkRow, EngineResult
from recipes.evaluation.results import AddLayersResult, EvaluationResult, ServedResult, TaskResults
from recipes.planning.results import PlanResult
from recipes.report.format import with_prefix
from recipes.report.plots import Dimension, Mark, Series, interval_plot, line_plot, trade_off_plot
from recipes.report.upstream import phases_of
from recipes.search.results import LatencyResult, SearchResult

# A tick of 150.0 M is shown as 150 M.
PARAMETERS = Dimension("parameters", lambda v: with_prefix(v, "KMBT").replace(".0 ", " "))
TOKENS = Dimension("tokens", lambda v: with_prefix(v, "KMBT").replace(".0 ", " "))
DISK = Dimension("size on disk", lambda v: with_prefix(v, "kMGTP", "B").replace(".0 ", " "))
LATENCY = Dimension("decode latency", lambda v: f"{v:,.4g} ms")
PERPLEXITY = Dimension("perplexity", lambda v: f"{v:,.4g}")
DIVERGENCE = Dimension("KL to the teacher", lambda v: f"{v:,.3g}")
ACCURACY = Dimension("mean task score", lambda v: f"{v:.1%}", higher_is_better=True)
EVALUATION_ROLES = {"teacher": "teacher", "student": "distilled"}
"""Maps a model's role in the measurement of speed to its role in the evaluation."""
MAX_LABELS = 8
"""If a search has more candidates, its plot labels only the chosen candidate and those on the
Pareto front, because more labels would overlap."""


def sections(
    manifests: Mapping[str, Manifest], earlier: Mapping[str, Manifest]
) -> dict[str, object]:
    """Returns the template variables of all sections whose inputs are optional.

    ``manifests`` are those of the report's inputs, and ``earlier`` those of all stages upstream of
    them, by name.
    """
    # The templates use the results of these inputs unchanged.
    result_types = {"plan": PlanResult, "served": ServedResult}
    content: dict[str, object] = {
        name: manifests[name].result(result_type)
        for name, result_type in result_types.items()
        if name in manifests
    }
    rows: list[BenchmarkRow] = []
    if "tasks" in manifests:
        tasks = manifests["tasks"].result(TaskResults)
        model = manifests.get("distilled")
        content |= tasks_section(tasks, phases_of(model, earlier.values()) if model else [])
    if "speed" in manifests:
        results = manifests["speed"].result(BenchmarkResults)
        content |= speed_section(results)
        rows = results.rows
    if "engine" in manifests:
        content["engine"] = dict(flatten(asdict(manifests["engine"].result(EngineResult))))
    if "gguf" in manifests:
        content["gguf"] = asdict(manifests["gguf"].result(GgufResult))
    if "sizes" in manifests:
        content |= sizes_section(manifests["sizes"].result(AddLayersResult))
    if "search" in manifests:
        content |= search_section(manifests["search"].result(SearchResult), earlier)
    if "evaluation" in manifests:
        evaluation = manifests["evaluation"].result(EvaluationResult)
        content["trade_offs"] = list(trade_offs(evaluation, rows))
        content["engine_numbers"] = engine_numbers(rows)
    return content


def tasks_section(results: TaskResults, phases: Sequence[Manifest]) -> dict[str, object]:
    """Returns the tasks, a plot of their scores, and plots of scores during the training.

    ``phases`` are the distillations that made the model, from first to last.
    """
    rows = {
        name: [
            (role, score.value, margin95(score.standard_error, task.items))
            for role, score in task.models().items()
        ]
        for name, task in results.tasks.items()
        if task.is_fraction  # other metrics have other scales
    }
    title = "Score by task and model"
    plot = interval_plot("plot-tasks", title, rows, "{:.1%}".format) if rows else None
    trainings = [manifest.result(DistillationResult) for manifest in phases]
    curves = dict(task_curves(results, trainings)) if trainings else {}
    return {"tasks": results, "tasks_plot": plot, "task_curves": curves}


def task_curves(
    results: TaskResults, phases: Sequence[DistillationResult]
) -> Iterator[tuple[str, Markup]]:
    """Yields the name of each task scored during the training, and a plot of score by tokens.

    ``phases`` are the distillations that made the model, from first to last.
    """
    last = phases[-1]  # ``task.steps`` has the scores by steps of this phase
    total = sum(phase.tokens for phase in phases)
    start, step_tokens = total - last.tokens, last.tokens / last.steps
    for number, (name, task) in enumerate(results.tasks.items()):
        if not task.steps:
            continue
        # By training tokens.
        scores = {start + step * step_tokens: score for step, score in task.steps.items()}
        scores = {0: task.pruned, **scores, total: task.distilled}
        student = [(tokens, score.value) for tokens, score in scores.items()]
        teacher = [(tokens, task.teacher.value) for tokens in (0.0, float(total))]
        lines = [
            Series("student", "distilled", student, noisy=False),
            Series("teacher", "teacher", teacher, noisy=False),
        ]
        yield name, line_plot(f"plot-task-{number}", name, lines, height=150, x_dimension=TOKENS)


def speed_section(results: BenchmarkResults) -> dict[str, object]:
    """Returns the measurements, the bars' scale, and the row of the best speed-up in decoding."""
    bar_lengths = [1.0]  # each bar has a mark at a speed-up of 1
    for speedup in results.speedups:
        bar_lengths += [speedup.prefill, speedup.prefill_roofline or 0]
        bar_lengths += [speedup.decode, speedup.decode_roofline]
    return {
        "speed": results,
        "bar_scale": 1.08 * max(bar_lengths),  # the longest bar leaves a margin of 8%
        "fastest": max(results.engine_speedups(), key=lambda speedup: speedup.decode, default=None),
    }


def search_section(search: SearchResult, earlier: Mapping[str, Manifest]) -> dict[str, object]:
    """Returns the candidates, their plot, the axes in which they differ, and the latency model.

    ``earlier`` has the manifests of all stages upstream of the report's inputs.
    """
    candidates = search.candidates
    # A state is (training tokens, whether untrained weights were reconstructed). Perplexities can
    # be compared only within a state. Only candidates of the largest state can be on the Pareto
    # front. Training does not start from reconstructed weights, so it makes ``healed`` irrelevant.
    states = [(c.tokens, c.healed and not c.tokens) for c in candidates]
    marks = []
    for candidate, state in zip(candidates, states, strict=True):
        has_label = len(candidates) <= MAX_LABELS or candidate.chosen or candidate.pareto
        mark = Mark(
            candidate.name if has_label else "",
            # The CSS class: the chosen candidate has the colour of distilled models.
            "distilled" if candidate.chosen else "quiet",
            float(candidate.parameters),
            candidate.perplexity,
            reference=state != max(states),
        )
        marks.append(mark)
    sizes_by_axis = {
        axis.name: {getattr(candidate.shape, axis.name) for candidate in candidates}
        for axis in fields(Architecture)
    }
    latency_models = (
        manifest.result(LatencyResult)
        for manifest in earlier.values()
        if manifest.kind == "latency_model"
    )
    return {
        "search": search,
        "search_axes": [axis for axis, sizes in sizes_by_axis.items() if len(sizes) > 1],
        "search_plot": trade_off_plot("plot-search", marks, PARAMETERS, PERPLEXITY),
        "latency": next(latency_models, None),
    }


def sizes_section(result: AddLayersResult) -> dict[str, object]:
    """Returns the students with added layers of the teacher, and a plot of their KL by size."""
    marks = [
        Mark(
            str(num_layers),
            # The CSS class: the model that the stage wrote has the colour of distilled models.
            "distilled" if num_layers == len(result.kept_layers) else "quiet",
            float(quality.parameters),
            quality.kl_to_teacher,
        )
        for num_layers, quality in sorted(result.sizes.items())
    ]
    return {
        "sizes": result,
        "sizes_plot": trade_off_plot("plot-added-layers", marks, PARAMETERS, DIVERGENCE),
    }


def quality_mark(role: str, label: str, evaluation: EvaluationResult, cost: float) -> Mark:
    """Returns a mark at a model's perplexity, with the 95% interval.

    ``role`` is a key of ``evaluation.models()`` and the mark's CSS class.
    """
    quality = evaluation.models()[role]
    perplexity = quality.perplexity
    interval: tuple[float, float] | None = None
    margin = margin95(quality.loss_standard_error, evaluation.sequences)
    if margin is not None:
        # A loss of l ± d means a perplexity between exp(l) / exp(d) and exp(l) * exp(d).
        # exp overflows above 709. Intervals with a margin of 700 are too large to be drawn anyway.
        factor = math.exp(min(margin, 700))
        interval = (perplexity / factor, perplexity * factor)
    return Mark(label, role, cost, perplexity, interval, reference=role == "teacher")


def trade_offs(
    evaluation: EvaluationResult, rows: Sequence[BenchmarkRow]
) -> Iterator[tuple[str, str, Markup]]:
    """Yields title, note and plot of perplexity against parameters, disk size and latency.

    ``rows`` are the measurements of speed. Plots show those of the smallest batch and prompt.
    """
    quality = evaluation.models()
    sized = [quality_mark(role, role, evaluation, q.parameters) for role, q in quality.items()]
    yield "Parameters", "", trade_off_plot("plot-by-parameters", sized, PARAMETERS, PERPLEXITY)
    setting = smallest_setting(rows)
    if setting is None:
        return
    note = f"batch {setting[0]}, prompt of {setting[1]} tokens"
    numbers = engine_numbers(rows)
    for name, title, dimension, cost_of in (
        ("plot-by-size", "Size on disk", DISK, lambda row: row.disk_bytes),
        ("plot-by-latency", "Decode latency per token", LATENCY, lambda row: row.decode_latency_ms),
    ):
        marks = [
            quality_mark(EVALUATION_ROLES[row.role], numbers[row.engine], evaluation, cost)
            for row in rows
            if row.setting == setting and (cost := cost_of(row)) is not None
        ]
        if marks:
            yield title, note, trade_off_plot(name, marks, dimension, PERPLEXITY)


def engine_numbers(rows: Iterable[BenchmarkRow]) -> dict[str, str]:
    """Maps each engine's name to a number. Plots show the number, because names would overlap."""
    names = dict.fromkeys(row.engine for row in rows)
    return {name: str(number) for number, name in enumerate(names, 1)}


def smallest_setting(rows: Iterable[BenchmarkRow]) -> tuple[int, int] | None:
    """Returns the smallest batch size, and the length of the shortest prompt with this batch size.

    This setting shows latency best. Returns ``None`` if nothing was measured.
    """
    return min((row.setting for row in rows), default=None)
