"""Renders reports from the manifests and metrics of a run.

Every number comes from a manifest or from a file whose hash a manifest has. The page keeps the
exact value of each number beside the rounded one.
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
from recipes.core.metrics import METRICS, Record, steps_of
from recipes.core.stage import Input, Inputs
from recipes.data.results import DatasetResult, in_words
from recipes.distillation.results import DistillationResult
from recipes.evaluation.results import EvaluationResult
from recipes.pruning.results import HealResult, PruneResult
from recipes.report.cost import costs, model_flops, upstream, versions
from recipes.report.format import render_template
from recipes.report.gates import judge, parse
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
from recipes.report.serving import served
from recipes.report.settings import ReportConfig

CONTENTS = {
    "gates": "Gates",
    "quality": "Quality",
    "tasks": "Benchmarks",
    "trade_offs": "Quality against cost",
    "speed": "Speed",
    "architecture": "Architecture",
    "generations": "Generations",
    "distillation": "Distillation",
    "layers": "Layer importance",
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
"""Sections in order, each a template; results come before settings and plan.

A section is left out if its variable is empty.
"""
TERMS = {
    "kd": ("distillation (logits)", "distilled"),
    "hidden": ("hidden states", "pruned"),
    "lm": ("next token", "teacher"),
    "loss": ("total", "total"),
}
"""Label and CSS class of each term of the training loss."""
CURVES = {
    "val_loss": ("Validation loss (next token)", "teacher"),
    "lr": ("Learning rate", "quiet"),
    "grad_norm": ("Gradient norm", "quiet"),
}
"""Title and CSS class of each other training curve."""


def render(cfg: ReportConfig, inputs: Inputs, path: Path) -> None:
    """Writes the report as one HTML file that loads nothing else."""
    manifests = {name: item.manifest for name, item in inputs.items()}
    earlier = upstream(inputs)
    content: dict[str, object] = {
        **dict.fromkeys(CONTENTS),
        "title": cfg.title or "Report",
        "description": cfg.description,
        "time": datetime.now(UTC).isoformat(timespec="minutes"),
        "m": manifests,
        "versions": versions([*manifests.values(), *earlier.values()]),
        "gates": judge(map(parse, cfg.gates), {m.kind: m for m in manifests.values()}),
        **sections(manifests, earlier),
        **(_distillation(inputs, earlier) if "evaluation" in inputs else {}),
        **costs(inputs, earlier, model_flops(manifests, earlier) if "evaluation" in inputs else []),
        "cost": True,
        "provenance": True,
    }
    content["contents"] = {name: label for name, label in CONTENTS.items() if content[name]}
    render_template("report.html.j2", content, path)


def _distillation(inputs: Inputs, earlier: Mapping[str, Manifest]) -> dict[str, object]:
    """Returns the variables of the sections about a distillation."""
    manifests = {name: item.manifest for name, item in inputs.items()}
    evaluation = manifests["evaluation"].result(EvaluationResult)
    prepared = manifests["data"].result(DatasetResult)
    pruned = manifests["pruned"].result_if("prune", PruneResult)
    before, after = manifests["teacher"].parameters, manifests["distilled"].parameters
    distilled = inputs["distilled"]
    initial = distilled.manifest.inputs.get("student")
    student = next((m for m in earlier.values() if m.fingerprint == initial), None)
    losses = {
        role: [(role, quality.loss, quality.loss_standard_error)]
        for role, quality in evaluation.models().items()
    }
    return {
        "prepared": prepared,
        "conversations": {name: in_words(n) for name, n in prepared.conversations.items()},
        "saved": 1 - after / before if before and after else None,
        "quality": evaluation.models(),
        "evaluation": evaluation,
        "quality_plot": interval_plot("plot-quality", "Loss on held-out text", losses),
        "architecture": True,
        "generations": _generations(inputs["evaluation"]),
        "distillation": _training(distilled),
        "rounds": list(_rounds(distilled, earlier)),
        "healed": student.result_if("heal", HealResult) if student else None,
        **(_layers(pruned) if pruned else {}),
        "serve": list(served(inputs)),
        "settings": distilled.manifest.config,
        "trained": distilled.manifest.result_if("distill", DistillationResult),
        "parity": {
            "Import into NeMo": manifests["teacher"].result_if("import_hf", ImportResult),
            "Export to Hugging Face": manifests["exported"].result_if("export_hf", ParityResult),
        },
    }


def _generations(evaluation: Input) -> list[dict[str, str]]:
    """Returns prompts, each with the continuations of all models."""
    path = evaluation.artifact / "results.json"
    results = read_json(path) if path.is_file() else {}
    generations: list[dict[str, str]] = results.get("generations", [])
    return generations


def _training(distilled: Input) -> dict[str, Any]:
    """Returns the plots of the distillation; a plot is left out if its values were not logged."""
    log = distilled.directory / METRICS
    steps = steps_of(log, "distill")
    terms = list(_terms(steps))
    small: list[tuple[str, Markup]] = []
    for key, (title, style) in CURVES.items():
        points = _points(steps_of(log, "validate") if key == "val_loss" else steps, key)
        if points:
            name = f"plot-{key.replace('_', '-')}"
            series = Series(title, style, points, noisy=key == "grad_norm")
            plot = line_plot(name, title, [series], height=130, zero=key != "val_loss")
            small.append((title, plot))
    return {
        "terms": terms,
        "smoothed": len(steps) >= 2 * SMOOTHING,
        "loss": line_plot("plot-loss", "Training loss by step", terms) if terms else None,
        "small": small,
    }


def _rounds(
    distilled: Input, earlier: Mapping[str, Manifest]
) -> Iterator[tuple[str, Manifest, DistillationResult]]:
    """Yields the distillation of every round, if there were several."""
    stages = {**earlier, distilled.directory.name: distilled.manifest}
    results = [(n, m, m.result_if("distill", DistillationResult)) for n, m in stages.items()]
    rounds = [(name, manifest, result) for name, manifest, result in results if result]
    if len(rounds) > 1:
        yield from sorted(rounds, key=lambda one: one[1].started_at)


def _terms(steps: list[Record]) -> Iterator[Series]:
    """Yields the loss terms in use; the total is left out if it equals the only term."""
    previous: list[list[Point]] = []
    for key, (label, style) in TERMS.items():
        points = _points(steps, key)
        if any(y for _, y in points) and points not in previous:
            previous.append(points)
            yield Series(label, style, points)


def _points(steps: list[Record], key: str) -> list[Point]:
    return [(float(s["done"]), float(s[key])) for s in steps if s.get(key) is not None]


def _layers(pruned: PruneResult) -> dict[str, object]:
    """Returns the variables of the section about layer importance."""
    scores = pruned.layer_importance
    title = f"Importance of {len(scores)} layers; dropped: {pruned.dropped_layers() or 'none'}"
    return {
        "layers": pruned,
        "layers_plot": layer_plot("plot-layers", title, scores, set(pruned.kept_layers)),
        "logarithmic": is_skewed(scores.values()),
    }
