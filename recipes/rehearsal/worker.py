"""Rehearses ranks of stages: ``python -m recipes.rehearsal.worker JOBS PROCESSES``.

A rehearsal runs a stage on fake tensors. ``JOBS`` is a JSON file with a list of jobs; ``PROCESSES``
jobs run at a time. Prints a line of JSON per job, in the order of the list. The libraries are
imported once. Each rank runs in a forked process, so that no rank changes another's globals.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
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
Task = Callable[[], RehearsalResult]


def main(file: Path, processes: int) -> None:
    """Rehearses the jobs of a file, ``processes`` at a time."""
    die_with_parent()
    prepare_imports()
    jobs: list[RankJob] = TypeAdapter(list[RankJob]).validate_json(file.read_bytes())
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries goes to standard error
    rehearse = prepare()
    for result in in_forks((partial(rehearse, job) for job in jobs), processes):
        print(json.dumps(asdict(result)), file=results, flush=True)


def prepare() -> Rehearse:
    """Replaces CUDA and imports the modules of stages. The process can then only rehearse."""
    from recipes.rehearsal import fake_cuda, files, messages

    fake_cuda.install()
    messages.install()
    files.install()
    # Imported after the patches: on import, some libraries look for a device, or copy references
    # to torch functions.
    from recipes.rehearsal import patches, rank

    patches.install()
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # the garbage collector of each rank then skips what was imported
    return rank.rehearse


def in_forks(tasks: Iterable[Task], processes: int) -> Iterator[RehearsalResult]:
    """Runs each task in a forked process; yields the results in the order of the tasks."""
    running: deque[tuple[BaseProcess, Connection]] = deque()
    for task in tasks:
        if len(running) == processes:
            yield _receive(*running.popleft())
        running.append(_start(task))
    while running:
        yield _receive(*running.popleft())


def _start(task: Task) -> tuple[BaseProcess, Connection]:
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(task, sender))
    child.start()
    sender.close()
    return child, receiver


def _receive(child: BaseProcess, receiver: Connection) -> RehearsalResult:
    try:
        result: RehearsalResult = receiver.recv()
    except EOFError:
        child.join()
        result = RehearsalResult(error=f"its process ended with exit code {child.exitcode}")
    child.join()
    return result


def _send(task: Task, pipe: Connection) -> None:
    pipe.send(task())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
