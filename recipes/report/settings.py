"""Settings of ``report`` and ``report_search``. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes.core.stage import StageConfig

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).with_name("templates")


@dataclass
class ReportConfig(StageConfig):
    """Settings of ``report``."""

    title: str = ""
    """Name of the recipe."""
    description: str = ""
    """What the recipe does, in a line."""
    gates: list[str] = field(default_factory=list, metadata={"resource": True})
    """Shown with what was measured. The launcher judges them, so that another threshold runs
    nothing again, not even this."""


@dataclass
class SearchReportConfig(StageConfig):
    """Settings of ``report_search``."""

    title: str = ""
    """Name of the recipe."""
    description: str = ""
    """What the recipe does, in a line."""


def templates(cfg: ReportConfig | SearchReportConfig) -> dict[str, Path]:
    """The pages' templates, which the code's fingerprint does not see."""
    return {"templates": TEMPLATES}
