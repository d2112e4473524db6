"""The page of a search: which shapes were compared, and which one was chosen."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from recipes.core.stage import Inputs
from recipes.report.cost import costs, upstream, versions
from recipes.report.format import render_template
from recipes.report.sections import search_section
from recipes.report.settings import SearchReportConfig
from recipes.search.results import LatencyResult, SearchResult

TEMPLATE = "search_report.html.j2"


def render(cfg: SearchReportConfig, inputs: Inputs, path: Path) -> None:
    """Writes the page as one HTML file that loads nothing else."""
    render_template(TEMPLATE, page(cfg, inputs), path)


def page(cfg: SearchReportConfig, inputs: Inputs) -> dict[str, object]:
    """Everything that the template shows."""
    latency = inputs.get("latency")
    found = inputs["search"].manifest.result(SearchResult)
    before = upstream(inputs)
    manifests = [*(item.manifest for item in inputs.values()), *before.values()]
    return {
        "title": cfg.title or "Search",
        "description": cfg.description,
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "teacher": inputs["teacher"].manifest,
        "search": search_section(found),
        "chosen": found.chosen(),
        "latency": latency.manifest.result(LatencyResult) if latency else None,
        "versions": versions(manifests),
        **costs(inputs, before, []),
    }
