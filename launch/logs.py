"""What a stage said: its newest log, and why it failed."""

from __future__ import annotations

from pathlib import Path

from recipes.core.files import storage_problem
from recipes.core.manifest import WORK
from recipes.core.silence import hung

LOGS = "logs"
ERROR = "error.txt"
TAIL_BYTES = 1 << 16


def newest_log(stage_dir: Path) -> Path | None:
    """The log that was written to last."""
    logs = list((stage_dir / LOGS).glob("*.log"))
    return max(logs, key=lambda log: log.stat().st_mtime_ns) if logs else None


def tail(file: Path, lines: int) -> list[str]:
    """The last lines of a text file, however large it is."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - TAIL_BYTES - 256 * lines))
        text = opened.read().decode(errors="replace")
    return text.strip().splitlines()[-lines:] if lines else []


def reason(stage_dir: Path, log: Path | None) -> str:
    """Why a stage failed: its own message, or else the last lines of its log."""
    error = stage_dir / WORK / ERROR
    if error.exists():
        return error.read_text(encoding="utf-8").strip()
    if (problem := hung(stage_dir / WORK) or storage_problem(None, stage_dir)) is not None:
        return str(problem)
    if log is None:
        return "it ended without a message or a log"
    shown = "\n    ".join(tail(log, 5))
    return f"it ended without a message; the log's last lines are\n    {shown}"
