"""Settings of ``report`` and ``report_search``. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes.core.stage import StageConfig

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).with_name("templates")
"""The pages' own, which the fingerprint of code does not see."""


@dataclass
class SearchReportConfig(StageConfig):
    """Settings of ``report_search``."""

    title: str = ""
    """Name of the recipe."""
    description: str = ""
    """What the recipe does, in a line."""


@dataclass
class ReportConfig(SearchReportConfig):
    """Settings of ``report``."""

    gates: list[str] = field(default_factory=list, metadata={"resource": True})
    """Shown with what was measured. The launcher judges them, so that another threshold runs
    nothing again, not even this."""
