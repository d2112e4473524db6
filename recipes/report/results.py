"""What a report stage leaves. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportResult:
    """The page."""

    file: str
    """Its name in the artifact."""
