"""Renders a run's report from manifests and logged metrics.

Training curves come from the metrics log, which has no hash. All other numbers come from a
manifest, or from a file whose hash is in a manifest. The page shows rounded numbers. The tooltip of
a number has its exact value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nemo_convert.results import ImportResult, ParityResult
from recipes.core.files import read_json
from recipes.core.manifest import Manifest
from recipes.core.metrics import Record, result_metrics, steps_of
from recipes.core.stage import Input, Inputs
from recipes.core.statistics import margin95
from recipes.data.results import NOT_COMPARED, DatasetResult, describe_counts
from recipes.distillation.results import DistillationResult
from recipes.evaluation.results import EvaluationResult
from recipes.pruning.results import HealResult, PruneResult
from recipes.report.cost import cost_sections, datasets, distillations, model_flops, versions
from recipes.report.format import render_template
from recipes.report.gates import judge, parse_gate
from recipes.report.plots import (
    SMOOTHING,
    Point,
    Series,
    interval_plot,
    is_skewed,
    layer_plot,
    line_plot,
)
from recipes.report.sections import sections
from recipes.report.serving import run_servers
from recipes.report.settings import ReportConfig
from recipes.report.upstream import phases_of, upstream

CONTENTS = {
    "gates": "Gates",
    "quality": "Quality",
    "tasks": "Benchmarks",
    "served": "Served model",
    "trade_offs": "Quality against cost",
    "speed": "Speed",
    "architecture": "Architecture",
    "generations": "Generations",
    "distillation": "Distillation",
    "layers": "Layer importance",
    "sizes": "Added layers",
    "search": "Architecture search",
    "engine": "Engine",
    "gguf": "GGUF file",
    "serve": "Serving",
    "settings": "Settings",
    "plan": "Plan",
    "cost": "Cost",
    "parity": "Conversion check",
    "provenance": "Provenance",
}
"""Titles of the sections, in order. A key names the section's template and a template variable. If
the variable is empty, the section is left out."""
LOSS_TERMS = {
    "kd": ("distillation (logits)", "distilled"),
    "hidden": ("hidden states", "pruned"),
    "lm": ("next token", "teacher"),
    "loss": ("total", "total"),
}
"""Label and CSS class of each term of the training loss, by its name in the log. The class sets
only the line's color, although classes are named after models."""
CURVES = {
    "val_loss": ("Validation loss (next token)", "teacher"),
    "lr": ("Learning rate", "quiet"),
    "grad_norm": ("Gradient norm", "quiet"),
}
"""Title and CSS class (color) of each other training curve, by its name in the log."""


def render(cfg: ReportConfig, inputs: Inputs, path: Path) -> None:
    """Writes the report to ``path`` as one HTML file, which loads no other files."""
    manifests = {name: item.manifest for name, item in inputs.items()}
    earlier = upstream(inputs)
    has_evaluation = "evaluation" in inputs  # otherwise the report is only about a search
    content: dict[str, object] = {
        **dict.fromkeys(CONTENTS),  # a section without a value below is left out
        "title": cfg.title or "Report",
        "description": cfg.description,
        "time": datetime.now(UTC).isoformat(timespec="minutes"),
        "m": manifests,
        "versions": versions([*manifests.values(), *earlier.values()]),
        "gates": judge(map(parse_gate, cfg.gates), manifests),
        **sections(manifests, earlier),
        **(_distillation(inputs, earlier) if has_evaluation else {}),
        **cost_sections(inputs, earlier, model_flops(manifests, earlier) if has_evaluation else []),
        # The templates of these sections use the variables of ``cost_sections``.
        "cost": True,
        "provenance": True,
    }
    content["contents"] = {name: label for name, label in CONTENTS.items() if content[name]}
    render_template("report.html.j2", content, path)


def _distillation(inputs: Inputs, earlier: Mapping[str, Manifest]) -> dict[str, object]:
    """Returns the template variables of the sections about a distillation.

    ``earlier`` has the manifests of all stages upstream of the report's inputs, by name.
    """
    manifests = {name: item.manifest for name, item in inputs.items()}
    evaluation = manifests["evaluation"].result(EvaluationResult)
    prepared = manifests["data"].result(DatasetResult)
    pruned = manifests["pruned"].result_if("prune", PruneResult)
    # The student after ``add_layers``, if this stage ran, else after the distillation.
    final = manifests.get("sizes", manifests["distilled"])
    teacher_size, student_size = manifests["teacher"].parameters, final.parameters
    distilled = inputs["distilled"]
    first_phase = (phases_of(distilled.manifest, earlier.values()) or [distilled.manifest])[0]
    # The stage that made the student before the first distillation, such as ``prune`` or ``heal``.
    fingerprint = first_phase.inputs.get("student")
    initial_student = next((m for m in earlier.values() if m.fingerprint == fingerprint), None)
    phases = distillations({**earlier, distilled.directory.name: distilled.manifest})
    texts = datasets([*earlier.values(), manifests["data"]])
    losses = {
        role: [(role, quality.loss, margin95(quality.loss_standard_error, evaluation.sequences))]
        for role, quality in evaluation.models().items()
    }
    return {
        "prepared": prepared,
        "sources": {  # maps each source of all training phases to its licence and a note
            source: (text.licence(source), NOT_COMPARED if text.sample else "")
            for text in texts
            for source in text.sources
        },
        "conversations": {
            source: describe_counts(counts) for source, counts in prepared.conversations.items()
        },
        # The fraction of the teacher's parameters that the student does not have.
        "removed": 1 - student_size / teacher_size if teacher_size and student_size else None,
        "quality": evaluation.models(),
        "evaluation": evaluation,
        "quality_plot": interval_plot("plot-quality", "Loss on held-out text", losses),
        "architecture": True,
        "final": final,
        "generations": _generations(inputs["evaluation"]),
        "distillation": _training_plots(distilled),
        "phases": phases if len(phases) > 1 else [],
        "healed": initial_student.result_if("heal", HealResult) if initial_student else None,
        **(_layers(pruned) if pruned else {}),
        "serve": list(run_servers(inputs)),
        "settings": distilled.manifest.config,
        # ``None`` if another stage than ``distill`` made the student.
        "trained": distilled.manifest.result_if("distill", DistillationResult),
        "trained_stage": distilled.directory.name,
        "trained_tokens": sum(result.tokens for _, _, result in phases),
        "parity": {
            "Import into NeMo": manifests["teacher"].result_if("import_hf", ImportResult),
            "Export to Hugging Face": manifests["exported"].result_if("export_hf", ParityResult),
        },
    }


def _generations(evaluation: Input) -> list[dict[str, str]]:
    """Returns the prompts of an evaluation, if any, each with the continuation of every model."""
    path = evaluation.artifact / "results.json"
    results = read_json(path) if path.is_file() else {}
    generations: list[dict[str, str]] = results.get("generations", [])
    return generations


def _training_plots(distilled: Input) -> dict[str, Any]:
    """Returns the template variable ``distillation``: plots of the training curves in the log."""
    log = result_metrics(distilled.directory)
    steps = steps_of(log, "distill")
    terms = list(_loss_terms(steps))
    curves: list[tuple[str, Markup]] = []
    for key, (title, style) in CURVES.items():
        points = _points(steps_of(log, "validate") if key == "val_loss" else steps, key)
        if points:
            name = f"plot-{key.replace('_', '-')}"
            series = Series(title, style, points, noisy=key == "grad_norm")
            # An axis from 0 would flatten the curve of the validation loss.
            plot = line_plot(name, title, [series], height=130, zero=key != "val_loss")
            curves.append((title, plot))
    return {
        "terms": terms,
        "smoothed": len(steps) >= 2 * SMOOTHING,  # the condition of ``line_plot``
        "loss": line_plot("plot-loss", "Training loss by step", terms) if terms else None,
        "curves": curves,
    }


def _loss_terms(steps: list[Record]) -> Iterator[Series]:
    """Yields the curves of the loss terms that are not always zero.

    Leaves out a curve that equals an earlier one, as the total does if the loss has one term.
    """
    previous: list[list[Point]] = []  # points of the curves so far
    for key, (label, style) in LOSS_TERMS.items():
        points = _points(steps, key)
        if any(y for _, y in points) and points not in previous:
            previous.append(points)
            yield Series(label, style, points)


def _points(records: list[Record], key: str) -> list[Point]:
    """Returns the completed steps and the value ``key`` of each record that has this value."""
    with_value = (record for record in records if record.get(key) is not None)
    return [(float(record["done"]), float(record[key])) for record in with_value]


def _layers(pruned: PruneResult) -> dict[str, object]:
    """Returns the template variables of the section about layer importance."""
    scores = pruned.layer_importance
    title = f"Importance of {len(scores)} layers; dropped: {pruned.dropped_layers() or 'none'}"
    return {
        "layers": pruned,
        "layers_plot": layer_plot("plot-layers", title, scores, set(pruned.kept_layers)),
        "logarithmic": is_skewed(scores.values()),  # the condition of ``layer_plot``
    }
