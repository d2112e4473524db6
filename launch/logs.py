"""What a stage said: its newest log, and why it failed."""

from __future__ import annotations

import re
import signal
from datetime import datetime, timedelta
from pathlib import Path

from recipes.core.files import storage_problem
from recipes.core.manifest import WORK
from recipes.core.processes import ended_by
from recipes.core.watchdog import hang_error

LOGS = "logs"
ERROR = "error.txt"
TAIL_BYTES = 1 << 16
_FAILED_RANK = re.compile(
    r"time +: (?P<time>\d{4}-\d\d-\d\d_[\d:]{8})(?:.*\n)+?.*rank +: (?P<rank>\d+) "
    r"(?:.*\n)+?.*exitcode +: (?P<code>-?\d+)"
)


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


def _killed_rank(log: Path) -> str | None:
    """Which rank was killed, in the words of torchrun; the others then lost their connection to it.

    Not those that torchrun itself kills, half a minute after another one failed.
    """
    found = [
        (datetime.strptime(each["time"], "%Y-%m-%d_%H:%M:%S"), each["rank"], int(each["code"]))
        for each in _FAILED_RANK.finditer("\n".join(tail(log, 200)))
    ]
    soon = min((when for when, _, _ in found), default=datetime.min) + timedelta(seconds=10)
    killed = [rank for when, rank, code in found if code == -signal.SIGKILL and when < soon]
    return f"rank {killed[0]} was {ended_by(-signal.SIGKILL)}" if killed else None


def reason(stage_dir: Path, log: Path | None) -> str:
    """Why a stage failed: its own message, or else the last lines of its log."""
    error = stage_dir / WORK / ERROR
    if log is not None and (killed := _killed_rank(log)) is not None:
        return killed
    if error.exists():
        return error.read_text(encoding="utf-8").strip()
    if (problem := hang_error(stage_dir / WORK) or storage_problem(None, stage_dir)) is not None:
        return str(problem)
    if log is None:
        return "it ended without a message or a log"
    shown = "\n    ".join(tail(log, 5))
    return f"it ended without a message; the log's last lines are\n    {shown}"
