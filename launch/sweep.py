"""Sweeps (``-m``): checks that runs do not overwrite each other, and prints the best run."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from recipes.core.errors import RecipeError
from recipes.core.run_state import RUN_FILE
from recipes.core.screen import screen

SWEEP_FILE = "multirun.yaml"
"""File that Hydra writes to the folder of a sweep."""
UNIQUE_SETTINGS = {
    "run_dir": "set hydra.sweep.dir=DIR instead: each run gets a folder in DIR",
    "hub.push": "include the swept field: 'hub.push=ORG/NAME-${stages.prune.target_num_layers}'",
}
"""Settings that must differ between the runs of a sweep, and the fix if they do not."""
_results: set[str] = set()
"""``UNIQUE_SETTINGS`` of the runs that this sweep has started, such as ``run_dir=DIR``."""


def is_sweep() -> bool:
    """Returns whether Hydra runs a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def require_separate_results(cfg: DictConfig, arguments: Sequence[str]) -> None:
    """Refuses a sweep whose runs would overwrite each other's results, before its first run.

    ``cfg`` is the config of one run, and ``arguments`` is the sweep's command line. Values with
    interpolations are not checked here, but by ``require_new_results`` before each run.
    """
    overrides = [arg for arg in arguments if "=" in arg and not arg.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = [override for override in parsed if override.is_sweep_override()]
    # Hydra runs all combinations of swept fields. So with two or more swept fields, each value
    # occurs in several runs.
    only_swept = swept[0] if len(swept) == 1 else None
    for name, fix in UNIQUE_SETTINGS.items():
        group, _, key = name.rpartition(".")
        node = cfg[group] if group else cfg
        if not isinstance(node, DictConfig):  # such as ``hub=null``, which ``settings_of`` refuses
            continue
        if OmegaConf.is_interpolation(node, key) or node[key] is None:
            continue
        values: list[str] = []
        if only_swept is not None and only_swept.key_or_group == name:
            values = list(only_swept.sweep_string_iterator())
        if len(values) < 2 or len(set(values)) < len(values):
            raise RecipeError(f"several runs of this sweep would have {name}={node[key]}.", fix)


def require_new_results(run_dir: Path, push: str | None) -> None:
    """Refuses a run of a sweep that would overwrite the results of an earlier run of the sweep.

    ``push`` is the run's ``hub.push``. The values of an accepted run are added to ``_results``.
    """
    values = {"run_dir": str(run_dir), "hub.push": push}
    results = {f"{name}={value}": name for name, value in values.items() if value is not None}
    for result, name in results.items():
        if result in _results:
            what = f"an earlier run of this sweep has {result}, too."
            raise RecipeError(what, UNIQUE_SETTINGS[name])
    _results.update(results)


def remove_unused_folder() -> None:
    """Deletes the folder of the current sweep if none of its runs has written anything."""
    folder = Path(HydraConfig.get().sweep.dir)
    # Hydra has created a folder for each run, even if the run's ``run_dir`` is elsewhere.
    if not any(path.is_file() and path.name != SWEEP_FILE for path in folder.rglob("*")):
        shutil.rmtree(folder, ignore_errors=True)


def resuming_argument(arguments: Sequence[str]) -> str:
    """Returns the argument that a command line lacks to resume the runs of a started sweep.

    Without this argument, ``hydra.sweep.dir=DIR``, a repeated sweep gets a new directory. Returns
    an empty string if no argument is needed.
    """
    if not HydraConfig.initialized():  # for example, the command ``status``
        return ""
    folder = HydraConfig.get().sweep.dir
    argument = f"hydra.sweep.dir={folder}"
    is_started = any(Path(folder).glob(f"*/{RUN_FILE}"))
    return argument if is_sweep() and is_started and argument not in arguments else ""


class Best(Callback):
    """Compares a sweep's runs. ``conf/config.yaml`` registers this class as a callback of Hydra."""

    def __init__(self) -> None:
        self._runs: list[Path] = []
        self._started = self._failed = 0  # numbers of runs

    def on_multirun_start(self, config: DictConfig, **more: Any) -> None:
        """Forgets an earlier sweep; sets Hydra's global config, which ``resuming_argument`` reads.

        Hydra sets this config only during a run, but an interrupt may come between two runs.
        """
        _results.clear()
        HydraConfig.instance().set_config(config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **more: Any) -> None:
        """Collects the run's directory that ``main`` returned, or counts its error."""
        self._started += 1
        result = job_return.return_value if job_return.status is JobStatus.COMPLETED else None
        if isinstance(result, RecipeError):
            self._failed += 1
        elif result is not None:  # ``None`` for a dry run or a rehearsal
            self._runs.append(result)

    def on_multirun_end(self, config: DictConfig, **more: Any) -> None:
        """Prints the best run; exits with status 1 if a run failed, or if there was no run."""
        if len(self._runs) > 1:
            screen().print(best_of(self._runs), markup=False)
        if self._failed:
            argument = resuming_argument(sys.argv[1:])
            advice = f"; to resume this sweep, add {argument}" if argument else ""
            screen(stderr=True).print(f"runs that failed: {self._failed}{advice}", markup=False)
        if not self._started:  # glob(…) matched no choice
            screen(stderr=True).print(
                "error: this sweep has no run.\n  fix: correct the pattern; --help lists all names"
            )
        remove_unused_folder()
        if self._failed or not self._started:
            raise SystemExit(1)


def best_of(run_dirs: Sequence[Path]) -> str:
    """Describes the best of the runs, and names the command that compares all of them."""
    from recipes.report.compare import compare_runs, describe_best
    from recipes.report.runs import read_run

    paths = shlex.join(os.path.relpath(path) for path in run_dirs)
    command = f"python launch/run.py compare {paths}"
    try:
        rows = compare_runs([read_run(path) for path in run_dirs])["rows"]
    except RecipeError:  # fewer than two runs are evaluated
        return f"no best run yet: at least two must be evaluated; then: {command}"
    return f"{describe_best(rows)}\nside by side: {command}"
