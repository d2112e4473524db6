"""What a sweep (``-m``) says once its last run has ended: which is best, and by which rule."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from recipes.core.errors import RecipeError
from recipes.core.screen import screen


class Best(Callback):
    """Notes the directory that each run of a sweep returns; ``conf/config.yaml`` names it."""

    def __init__(self) -> None:
        self._runs: list[Path] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **more: Any) -> None:
        """Notes a run; none that was only planned."""
        if job_return.status is JobStatus.COMPLETED and job_return.return_value is not None:
            self._runs.append(job_return.return_value)

    def on_multirun_end(self, config: DictConfig, **more: Any) -> None:
        """Says which of them is best."""
        if len(self._runs) > 1:
            screen().print(best_of(self._runs), markup=False)


def best_of(run_dirs: Sequence[Path]) -> str:
    """Which run is best, and what sets them side by side; that alone for runs without figures."""
    from recipes.report.compare import comparison, verdict
    from recipes.report.runs import read_run

    places = shlex.join(os.path.relpath(path) for path in run_dirs)
    command = f"python launch/run.py compare {places}"
    try:
        rows = comparison([read_run(path) for path in run_dirs])["rows"]
    except RecipeError:
        return f"which is best, once two of them are evaluated: {command}"
    return f"{verdict(rows)}\nside by side: {command}"
