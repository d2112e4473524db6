"""Settings of ``report`` and ``report_search``. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes.core.stage import StageConfig

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).with_name("templates")
"""The code fingerprint does not cover templates, so stages name them as external files."""
CARD_TEMPLATE = TEMPLATES / "model_card.md.j2"


@dataclass
class SearchReportConfig(StageConfig):
    """Settings of ``report_search``."""

    title: str = ""
    """Name of the recipe."""
    description: str = ""
    """Purpose of the recipe, in one line."""


@dataclass
class ReportConfig(SearchReportConfig):
    """Settings of ``report``."""

    gates: list[str] = field(default_factory=list, metadata={"resource": True})
    """Gates to show with the measured values. The launcher judges them, so a new threshold reruns
    no stage."""
