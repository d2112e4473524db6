"""Runs the launcher and its stages in the test's process, which imports the libraries once.

The launcher composes, plans, prints and returns its exit status as usual. But a stage of one rank
runs in this process, the ranks of other stages are forked, and disks look large (``large_disks``).
Tests of processes, signals, logs or memory use ``run_recipe`` instead.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging.config
import sys
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from launch import run
from launch.cluster import Cluster, Follow
from launch.executors import local
from launch.plan import Plan
from launch.planned import load_stage
from recipes.core.run_state import REQUEST, InputRef, request_of
from recipes.core.stage import StageConfig
from recipes.core.worker import run_stage
from recipes.search import halving
from recipes.stages.contract import Stage
from tests.support.disks import large_disks
from tests.support.launcher import CommandResult
from tests.support.ranks import stage_ranks


def run_in_process(*overrides: str, cwd: Path) -> CommandResult:
    """Runs the launcher in the directory ``cwd``, and its stages in this process."""
    output = io.StringIO()
    with (
        mock.patch.object(local, "start", _start),
        mock.patch.object(sys, "argv", ["run.py", *overrides]),
        large_disks(),
        # Hydra would close all logging handlers, and absl's handler would close pytest's stderr.
        mock.patch.object(logging.config, "dictConfig"),
        mock.patch.object(halving, "run_child", run_here),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            code = run.cli()
        except SystemExit as end:
            code = int(end.code or 0)
    return CommandResult(code, output.getvalue())


def run_successfully(*overrides: str, cwd: Path) -> CommandResult:
    """Runs the launcher as ``run_in_process`` does, and requires that it succeeds."""
    result = run_in_process(*overrides, cwd=cwd)
    assert result.code == 0, result.output
    return result


def _start(plan: Plan, cluster: Cluster, follow: Follow, console: Console) -> bool:
    """Replaces ``local.start``: runs the stages one after the other.

    Returns:
        ``True``, because the stages have ended. An executor that only submits returns ``False``.
    """
    for stage in plan.todo():
        with follow(stage) as follower:
            if stage.config.resources.devices > 1:
                local.run(stage, follower, stage_ranks)
            else:
                _run(stage.definition, stage.directory / REQUEST)
    return True


def run_here(config: StageConfig, directory: Path, inputs: dict[str, Path]) -> None:
    """Replaces ``run_child`` of a search: runs a candidate's stage in this process.

    Args:
        config: The stage's settings.
        directory: The stage's directory.
        inputs: The stage directory of each input, by input name.
    """
    refs = {name: InputRef.of(source) for name, source in inputs.items()}
    _run(load_stage(config.stage), request_of(config.stage, config, refs).write(directory))


def _run(stage: Stage[Any], request: Path) -> None:
    """Runs a stage of one rank in this process; ``request`` is its ``config.yaml``."""
    if stage.needs_torch:
        _import_libraries()
        from megatron.core import num_microbatches_calculator as batches

        # Megatron's calculator is global, and still has the batch sizes of an earlier stage.
        batches.unset_num_microbatches_calculator()
    run_stage(stage.run, stage.config, stage.kind, request.parent)


@cache
def _import_libraries() -> None:
    """Imports the libraries of stages, as the fork server does.

    Garbage collection then skips the imported objects, which saves time.
    """
    for module in local.PRELOADED:
        importlib.import_module(module)
    gc.freeze()
