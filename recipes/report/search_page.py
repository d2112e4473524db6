"""The page of a search: which shapes were compared, and which one was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from recipes.core.stage import Inputs
from recipes.report.settings import SearchReportConfig

TEMPLATE = "search_report.html.j2"


def page(cfg: SearchReportConfig, inputs: Inputs) -> dict[str, Any]:
    """Everything that the template shows."""
    from recipes.report.cost import costs, upstream, versions
    from recipes.report.sections import search_section

    found = inputs["search"].manifest.metrics
    candidates = found["candidates"]
    chosen = next((one for one in candidates if one.get("chosen")), None)
    before = upstream(inputs)
    manifests = [*(item.manifest for item in inputs.values()), *before.values()]
    return {
        "title": cfg.title or "Search",
        "description": cfg.description,
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "teacher": inputs["teacher"].manifest,
        "search": search_section(found),
        "chosen": chosen,
        "latency": _latency(inputs),
        "versions": versions(manifests),
        **costs(inputs, before, []),
    }


def _latency(inputs: Inputs) -> Mapping[str, Any] | None:
    """Timed engines, each with how far the fitted line is from it."""
    if "latency" not in inputs:
        return None
    found = inputs["latency"].manifest.metrics
    shapes = [
        {**shape, "error": shape["fitted_ms"] / shape["step_ms"] - 1} for shape in found["shapes"]
    ]
    return {**found, "shapes": shapes}
