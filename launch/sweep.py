"""Names the best run at the end of a sweep (``-m``)."""

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
    """Hydra callback that compares the runs of a sweep; set in ``conf/config.yaml``."""

    def __init__(self) -> None:
        self._runs: list[Path] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **more: Any) -> None:
        """Collects the run's directory, unless it was only planned."""
        if job_return.status is JobStatus.COMPLETED and job_return.return_value is not None:
            self._runs.append(job_return.return_value)

    def on_multirun_end(self, config: DictConfig, **more: Any) -> None:
        """Prints which run is best."""
        if len(self._runs) > 1:
            screen().print(best_of(self._runs), markup=False)


def best_of(run_dirs: Sequence[Path]) -> str:
    """Returns which run is best, if they are evaluated, and the command that compares them."""
    from recipes.report.compare import comparison, verdict
    from recipes.report.runs import read_run

    places = shlex.join(os.path.relpath(path) for path in run_dirs)
    command = f"python launch/run.py compare {places}"
    try:
        rows = comparison([read_run(path) for path in run_dirs])["rows"]
    except RecipeError:
        return f"which is best, once two of them are evaluated: {command}"
    return f"{verdict(rows)}\nside by side: {command}"
