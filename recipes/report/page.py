"""What the report says, collected from the inputs' manifests and metrics, and its rendering.

Every figure comes from a manifest, or from a file that a manifest stamps; the page marks each with
its unrounded value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from markupsafe import Markup

from nemo_convert.results import ImportResult, ParityResult
from recipes.core.manifest import Manifest
from recipes.core.metrics import METRICS, Record, steps_of
from recipes.core.stage import Input, Inputs
from recipes.data.results import DatasetResult, in_words
from recipes.distillation.results import DistillationResult
from recipes.evaluation.results import EvaluationResult
from recipes.pruning.results import HealResult, PruneResult
from recipes.report.cost import costs, upstream, versions, work
from recipes.report.format import render_template
from recipes.report.plots import (
    SMOOTHING,
    Point,
    Series,
    interval_plot,
    is_skewed,
    layer_plot,
    line_plot,
)
from recipes.report.sections import gates_section, search_section, sections
from recipes.report.serving import served
from recipes.report.settings import ReportConfig, SearchReportConfig
from recipes.search.results import SearchResult

CHAIN = ("teacher", "data", "pruned", "distilled", "evaluation", "exported")
"""Inputs that every report has, in the order in which their stages run."""
OPTIONAL = ("plan", "search", "tasks", "engine", "gguf", "speed")
CONTENTS = {
    "gates": "Gates",
    "asked": "What was asked",
    "plan": "Plan",
    "search": "Search",
    "architecture": "Architecture",
    "quality": "Quality",
    "tasks": "Tasks",
    "trade_offs": "Quality against cost",
    "speed": "Speed",
    "engine": "Engine",
    "gguf": "llama.cpp",
    "serve": "Serve",
    "distillation": "Distillation",
    "layers": "Layers",
    "cost": "Cost",
    "generations": "Generations",
    "parity": "Parity",
    "provenance": "Provenance",
}
"""Sections in their order, each a template."""
WHERE_PRESENT = ("gates", "plan", "search", "tasks", "trade_offs", "speed", "engine", "gguf")
"""Sections that are left out where there is nothing to show."""
TERMS = {
    "kd": ("logits", "distilled"),
    "hidden": ("hidden states", "pruned"),
    "lm": ("next token", "teacher"),
    "loss": ("total", "total"),
}
CURVES = {
    "val_loss": ("Validation loss, next token", "teacher"),
    "lr": ("Learning rate", "quiet"),
    "grad_norm": ("Gradient norm", "quiet"),
}


def render(cfg: ReportConfig, inputs: Inputs, path: Path) -> None:
    """Writes the report as one HTML file that loads nothing else."""
    render_template("report.html.j2", _content(cfg, inputs), path)


def render_search(cfg: SearchReportConfig, inputs: Inputs, path: Path) -> None:
    """Writes the page of a search: which shapes were compared, and which one was chosen."""
    found = inputs["search"].manifest.result(SearchResult)
    earlier = upstream(inputs)
    manifests = [*(item.manifest for item in inputs.values()), *earlier.values()]
    content = {
        "title": cfg.title or "Search",
        "description": cfg.description,
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "teacher": inputs["teacher"].manifest,
        "chosen": found.chosen(),
        "versions": versions(manifests),
        **search_section(found, earlier),
        **costs(inputs, earlier, []),
    }
    render_template("search_report.html.j2", content, path)


def _content(cfg: ReportConfig, inputs: Inputs) -> dict[str, object]:
    """Everything that the template shows."""
    manifests = {name: inputs[name].manifest for name in (*CHAIN, *OPTIONAL) if name in inputs}
    evaluation = manifests["evaluation"].result(EvaluationResult)
    prepared = manifests["data"].result(DatasetResult)
    pruned = manifests["pruned"].result_if("prune", PruneResult)
    before, after = manifests["teacher"].parameters, manifests["distilled"].parameters
    earlier = upstream(inputs)
    distilled = inputs["distilled"]
    losses = [
        (role, role, q.loss, q.loss_standard_error) for role, q in evaluation.models().items()
    ]
    content: dict[str, object] = {
        "title": cfg.title or "Distillation report",
        "description": cfg.description,
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "m": manifests,
        "prepared": prepared,
        "conversations": {name: in_words(n) for name, n in prepared.conversations.items()},
        "saved": 1 - after / before if before and after else None,
        "quality": evaluation.models(),
        "evaluation": evaluation,
        "detail": _detail(inputs["evaluation"]),
        "training": _training(distilled),
        "rounds": list(_rounds(distilled, earlier)),
        "gates": gates_section(cfg.gates, manifests),
        "pruned": pruned,
        "healed": _healed(distilled.manifest, earlier),
        "layers_plot": _layers_plot(pruned) if pruned else None,
        "skewed": pruned is not None and is_skewed(pruned.layer_importance.values()),
        "quality_plot": interval_plot(
            "plot-quality", "Loss on held-out text with standard errors", losses
        ),
        "versions": versions(manifests.values()),
        "served": list(served(inputs)),
        "train": manifests["distilled"].config,
        "trained": manifests["distilled"].result_if("distill", DistillationResult),
        "imported": manifests["teacher"].result_if("import_hf", ImportResult),
        "exported": manifests["exported"].result_if("export_hf", ParityResult),
        **costs(inputs, earlier, work(manifests, earlier)),
        **sections(manifests, evaluation, earlier),
    }
    shown = [
        (name, label)
        for name, label in CONTENTS.items()
        if name not in WHERE_PRESENT or content[name]
    ]
    return {**content, "contents": shown}


def _healed(distilled: Manifest, earlier: Mapping[str, Manifest]) -> HealResult | None:
    """What healing brought back before this distillation, if it began with that."""
    given = (m for m in earlier.values() if m.fingerprint == distilled.inputs.get("student"))
    return next((m.result_if("heal", HealResult) for m in given), None)


def _detail(evaluation: Input) -> dict[str, object]:
    """Generations and, over the same windows, how often the distilled model is the better one."""
    path = evaluation.artifact / "results.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    losses = found.get("window_losses", {})
    ours = losses.get("distilled", [])
    wins = {
        other: sum(a < b for a, b in zip(ours, losses[other], strict=True))
        for other in ("pruned", "teacher")
        if ours and other in losses
    }
    return {"generations": found.get("generations", []), "wins": wins, "compared": len(ours)}


def _training(distilled: Input) -> dict[str, object]:
    """The distillation's curves; a plot whose data were not logged is left out."""
    log = distilled.directory / METRICS
    steps = steps_of(log, "distill")
    terms, small = list(_terms(steps)), []
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
        "loss": line_plot("plot-loss", "Distillation loss over steps", terms) if terms else None,
        "small": small,
    }


def _rounds(
    distilled: Input, earlier: Mapping[str, Manifest]
) -> Iterator[tuple[str, Manifest, DistillationResult]]:
    """Every round's distillation, where there were several."""
    every = {**earlier, distilled.directory.name: distilled.manifest}
    trained = [
        (n, m, t) for n, m in every.items() if (t := m.result_if("distill", DistillationResult))
    ]
    if len(trained) > 1:
        yield from sorted(trained, key=lambda one: one[1].started_at)


def _terms(steps: list[Record]) -> Iterator[Series]:
    """The loss terms that are not zero; the total only where it is more than one of them."""
    drawn: list[list[Point]] = []
    for key, (label, style) in TERMS.items():
        points = _points(steps, key)
        if any(y for _, y in points) and points not in drawn:
            drawn.append(points)
            yield Series(label, style, points)


def _points(steps: list[Record], key: str) -> list[Point]:
    return [(float(s["done"]), float(s[key])) for s in steps if s.get(key) is not None]


def _layers_plot(pruned: PruneResult) -> Markup:
    scores = pruned.layer_importance
    title = f"Importance of {len(scores)} layers; dropped: {pruned.dropped_layers() or 'none'}"
    return layer_plot("plot-layers", title, scores, set(pruned.kept_layers))
