"""What the report says, collected from the inputs' manifests and metrics, and its rendering.

Every figure comes from a manifest, or from a file that a manifest stamps; the page marks each with
its unrounded value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from markupsafe import Markup

from nemo_convert.results import ImportResult, ParityResult
from recipes.core.manifest import Manifest
from recipes.core.metrics import METRICS, Record, steps_of
from recipes.core.stage import Input, Inputs
from recipes.data.results import DatasetResult
from recipes.distillation.results import DistillationResult
from recipes.evaluation.results import ROLES, EvaluationResult
from recipes.pruning.results import PruneResult
from recipes.report.cost import costs, upstream, versions, work
from recipes.report.format import render_template
from recipes.report.plots import SMOOTHING, Series, interval_plot, is_skewed, layer_plot, line_plot
from recipes.report.sections import gates_section, sections
from recipes.report.settings import ReportConfig

TEMPLATE = "report.html.j2"
CHAIN = ("teacher", "data", "pruned", "distilled", "evaluation", "exported")
"""Inputs that every report has, in the order in which their stages run."""
OPTIONAL = ("plan", "search", "tasks", "engine", "speed")
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
    "distillation": "Distillation",
    "layers": "Layers",
    "cost": "Cost",
    "generations": "Generations",
    "parity": "Parity",
    "provenance": "Provenance",
}
"""Sections in their order, each a template."""
WHERE_PRESENT = ("gates", "plan", "search", "tasks", "trade_offs", "speed", "engine")
"""Sections that are left out where there is nothing to show."""
SHAPE = {
    "num_layers": "Layers",
    "hidden_size": "Hidden size",
    "ffn_hidden_size": "Feed-forward size",
    "num_attention_heads": "Attention heads",
    "num_query_groups": "Query groups",
    "kv_channels": "Head size",
    "vocab_size": "Vocabulary",
}
TARGETS = {
    "target_num_layers": "Layers",
    "drop_layers": "Layers to drop",
    "target_hidden_size": "Hidden size",
    "target_ffn_hidden_size": "Feed-forward size",
    "target_num_attention_heads": "Attention heads",
}
TERMS = {
    "loss": ("total", "total"),
    "kd": ("logits", "distilled"),
    "hidden": ("hidden states", "pruned"),
    "lm": ("next token", "teacher"),
}
PARTS = {
    "train": "Training",
    "validation": "Validation",
    "calibration": "Calibration",
    "heldout": "Held out",
}


def render(cfg: ReportConfig, inputs: Inputs, path: Path) -> None:
    """Writes the report as one HTML file that loads nothing else.

    Args:
        cfg: Title and description.
        inputs: Inputs of the stage, by its names for them.
        path: File to write.
    """
    render_template(TEMPLATE, page(cfg, inputs), path)


def page(cfg: ReportConfig, inputs: Inputs) -> dict[str, object]:
    """Everything that the template shows."""
    manifests = {name: inputs[name].manifest for name in (*CHAIN, *OPTIONAL) if name in inputs}
    evaluation = manifests["evaluation"].result(EvaluationResult)
    prepared = manifests["data"].result(DatasetResult)
    pruned = manifests["pruned"].result_if("prune", PruneResult)
    before = upstream(inputs)
    content: dict[str, object] = {
        "title": cfg.title or "Distillation report",
        "description": cfg.description,
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "m": manifests,
        "targets": _targets(manifests["pruned"].config),
        "prepared": prepared,
        "parts": list(_parts(prepared)),
        "saved": _saved(manifests),
        "shape": list(_shape(manifests)),
        "quality": evaluation.models(),
        "gap": _gap(evaluation.recovered),
        "evaluation": evaluation,
        "detail": _detail(inputs["evaluation"]),
        "training": _training(inputs["distilled"]),
        "gates": gates_section(cfg.gates, manifests),
        "pruned": pruned,
        "layers": _layers(pruned) if pruned else None,
        "quality_plot": _quality_plot(evaluation),
        "versions": versions(manifests.values()),
        "train": manifests["distilled"].config,
        "trained": manifests["distilled"].result_if("distill", DistillationResult),
        "imported": manifests["teacher"].result_if("import_hf", ImportResult),
        "exported": manifests["exported"].result_if("export_hf", ParityResult),
        "calibration": manifests["pruned"].config,
        **costs(inputs, before, work(manifests, before)),
        **sections(manifests, evaluation),
    }
    shown = [
        (name, label)
        for name, label in CONTENTS.items()
        if name not in WHERE_PRESENT or content[name]
    ]
    return {**content, "contents": shown}


def _targets(config: Mapping[str, object]) -> list[tuple[str, object]]:
    """The pruning targets that were set."""
    chosen = ((label, config.get(key)) for key, label in TARGETS.items())
    return [
        (label, ", ".join(map(str, value)) if isinstance(value, list) else value)
        for label, value in chosen
        if value
    ]


def _parts(prepared: DatasetResult) -> Iterator[tuple[str, int, int]]:
    """Name, tokens and documents of each part of the text."""
    for part, label in PARTS.items():
        yield label, prepared.tokens[part], prepared.documents[part]


def _saved(manifests: Mapping[str, Manifest]) -> float | None:
    before, after = manifests["teacher"].parameters, manifests["distilled"].parameters
    return 1 - after / before if before and after else None


def _shape(manifests: Mapping[str, Manifest]) -> Iterator[tuple[str, object, object]]:
    before = manifests["teacher"].architecture or {}
    after = manifests["distilled"].architecture or {}
    for key, label in SHAPE.items():
        yield label, before.get(key), after.get(key)
    yield "Parameters", manifests["teacher"].parameters, manifests["distilled"].parameters


def _gap(share: float | None) -> dict[str, float | None]:
    """Share of the lost quality that each model has: all, none, and what was measured."""
    if share is None:
        return dict.fromkeys(ROLES)
    return {"teacher": 1.0, "pruned": 0.0, "distilled": share}


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
    terms = list(_terms(steps))
    curves = [
        _small(steps_of(log, "validate"), "val_loss", "Validation loss, next token", "teacher"),
        _small(steps, "lr", "Learning rate", "quiet"),
        _small(steps, "grad_norm", "Gradient norm", "quiet"),
    ]
    return {
        "terms": terms,
        "smoothed": len(steps) >= 2 * SMOOTHING,
        "loss": line_plot("plot-loss", "Distillation loss over steps", terms) if terms else None,
        "small": [curve for curve in curves if curve],
    }


def _small(steps: list[Record], key: str, title: str, style: str) -> tuple[str, Markup] | None:
    """A small plot of one logged value, or nothing where it was not logged."""
    series = replace(_one(steps, key, title, style), noisy=key == "grad_norm")
    if not series.points:
        return None
    name = f"plot-{key.replace('_', '-')}"
    return title, line_plot(name, title, [series], height=130, zero=key != "val_loss")


def _terms(steps: list[Record]) -> Iterator[Series]:
    """The loss terms that are not zero; the total only where it is more than one of them."""
    drawn: list[list[tuple[float, float]]] = []
    for key in ("kd", "hidden", "lm", "loss"):
        points = _one(steps, key, "", "").points
        if any(y for _, y in points) and points not in drawn:
            drawn.append(list(points))
            yield Series(*TERMS[key], points)


def _one(steps: list[Record], key: str, label: str, style: str) -> Series:
    points = [(float(s["done"]), float(s[key])) for s in steps if s.get(key) is not None]
    return Series(label, style, points)


def _layers(pruned: PruneResult) -> dict[str, object]:
    scores, dropped = pruned.layer_importance, pruned.dropped_layers()
    kept = set(pruned.kept_layers)
    title = f"Importance of {len(scores)} layers; dropped: {dropped or 'none'}"
    plot = layer_plot("plot-layers", title, scores, kept)
    return {
        "plot": plot,
        "dropped": dropped,
        "kept": len(kept),
        "skewed": is_skewed(scores.values()),
        "measure": pruned.layer_measure,
    }


def _quality_plot(evaluation: EvaluationResult) -> Markup:
    rows = [(role, role, q.loss, q.loss_standard_error) for role, q in evaluation.models().items()]
    return interval_plot("plot-quality", "Loss on held-out text with standard errors", rows)
