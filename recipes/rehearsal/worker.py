"""Rehearses ranks of stages: ``python -m recipes.rehearsal.worker JOBS`` (a JSON list of jobs).

Prints a line of JSON per job. The libraries are imported once, and each rank runs in a fork, so
that it does not see what another rank left in Megatron's globals.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from pydantic import TypeAdapter

from recipes.core.processes import die_with_parent, prepare_imports
from recipes.rehearsal.job import RankJob, RehearsalResult

PRELOADED = (
    "recipes.distillation.logit_cache_writer",
    "recipes.distillation.trainer",
    "recipes.evaluation.text_quality",
    "recipes.pruning.scoring",
    "recipes.search.measure",
)
"""Modules that stages import when they run."""
Rehearse = Callable[[RankJob], RehearsalResult]


def main(file: Path) -> None:
    """Rehearses the jobs of a file in order."""
    die_with_parent()
    prepare_imports()
    jobs: list[RankJob] = TypeAdapter(list[RankJob]).validate_json(file.read_bytes())
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries goes to standard error
    rehearse = prepare()
    for job in jobs:
        print(json.dumps(asdict(in_fork(rehearse, job))), file=results, flush=True)


def prepare() -> Rehearse:
    """Replaces the device, and imports what stages need; the process can then only rehearse."""
    from recipes.rehearsal import fake_cuda, files, messages

    fake_cuda.install()
    messages.install()
    files.install()
    # Only now: some libraries look for a device, or keep references to torch functions, on import.
    from recipes.rehearsal import patches, rank

    patches.install()
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # the garbage collector of each rank then skips what was imported
    return rank.rehearse


def in_fork(rehearse: Rehearse, job: RankJob) -> RehearsalResult:
    """Rehearses in its own process."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(rehearse, job, sender))
    child.start()
    sender.close()
    try:
        result: RehearsalResult = receiver.recv()
    except EOFError:
        child.join()
        result = RehearsalResult(error=f"its process ended with exit code {child.exitcode}")
    child.join()
    return result


def _send(rehearse: Rehearse, job: RankJob, pipe: Connection) -> None:
    pipe.send(rehearse(job))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
