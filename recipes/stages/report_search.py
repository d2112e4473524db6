"""One self-contained HTML file that says which shapes a search compared, and which one it chose."""

from __future__ import annotations

from pathlib import Path

from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.report.results import ReportResult
from recipes.report.settings import REPORT_FILE, TEMPLATES, SearchReportConfig
from recipes.stages.contract import Stage


def run(cfg: SearchReportConfig, inputs: Inputs, out: Path) -> Outcome:
    """Collects the inputs' manifests and renders them."""
    from recipes.report.page import render_search

    render_search(cfg, inputs, out / REPORT_FILE)
    metrics_log(out).progress("report", 1, 1)
    return Outcome(ReportResult(REPORT_FILE))


STAGE = Stage(
    config=SearchReportConfig,
    kind="report",
    run=run,
    one_rank="there is one page to write",
    inputs={"teacher": ("checkpoint_nemo",), "search": ("search_results",)},
    needs_torch=False,
    needs_gpu=lambda config, chain: False,
    external=lambda config: {"templates": TEMPLATES},
)

if __name__ == "__main__":
    STAGE.main()
