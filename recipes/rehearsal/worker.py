"""Rehearses ranks of stages: ``python -m recipes.rehearsal.worker JOBS`` (a JSON list of jobs).

Prints a line of JSON for each. The stack is imported once and each rank is a fork: what one leaves
in the globals of Megatron is not there for the next.
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

from recipes.core.processes import die_with_parent, expect_no_gpu
from recipes.rehearsal.job import RankJob, Rehearsed

IMPORTED = (
    "recipes.distillation.logit_cache_writer",
    "recipes.distillation.trainer",
    "recipes.evaluation.text_quality",
    "recipes.pruning.scoring",
    "recipes.search.measure",
)
"""What the stages import when they run, and with it the stack: once, for all forks."""
Rehearse = Callable[[RankJob], Rehearsed]


def main(file: Path) -> None:
    """Rehearses the jobs of a file, one after the other."""
    die_with_parent()
    expect_no_gpu()
    jobs = [RankJob.of(plain) for plain in json.loads(file.read_text(encoding="utf-8"))]
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is for the log
    rehearse = prepare()
    for job in jobs:
        print(json.dumps(asdict(in_fork(rehearse, job))), file=results, flush=True)


def prepare() -> Rehearse:
    """Makes this process one for rehearsals, and imports what they need."""
    from recipes.rehearsal import fake_cuda, files, messages

    fake_cuda.stand_in()
    messages.stand_in()
    files.stand_in()
    # Not before: some of the stack looks for a device, or keeps functions of torch, on import.
    rank = importlib.import_module("recipes.rehearsal.rank")
    rank.stand_in()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # what was imported stays: no rank has to look through it for garbage
    rehearse: Rehearse = rank.rehearse
    return rehearse


def in_fork(rehearse: Rehearse, job: RankJob) -> Rehearsed:
    """Rehearses in a process of its own."""
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(rehearse, job, theirs))
    child.start()
    theirs.close()
    try:
        found: Rehearsed = ours.recv()
    except EOFError:
        child.join()
        found = Rehearsed(error=f"its process ended with {child.exitcode}")
    child.join()
    return found


def _send(rehearse: Rehearse, job: RankJob, pipe: Connection) -> None:
    pipe.send(rehearse(job))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
