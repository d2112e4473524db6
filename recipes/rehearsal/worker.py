"""Rehearses ranks of stages: ``python -m recipes.rehearsal.worker JOBS PROCESSES``.

A rehearsal runs one rank of a stage on fake tensors. ``JOBS`` is a JSON file with a list of
``RankJob``. At most ``PROCESSES`` jobs run at a time. The worker prints the ``RehearsalResult`` of
each job as a line of JSON, in the order of the list.

The libraries are imported once. Each job runs in a forked process, so that it cannot change the
global variables of other jobs.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
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
"""Modules that stages import only when they run. Importing them before the forks saves time."""
Rehearse = Callable[[RankJob], RehearsalResult]
Task = Callable[[], RehearsalResult]  # rehearses one job


def main(file: Path, processes: int) -> None:
    """Rehearses the jobs of a file, at most ``processes`` at a time, and prints the results."""
    die_with_parent()
    prepare_imports()
    jobs: list[RankJob] = TypeAdapter(list[RankJob]).validate_json(file.read_bytes())
    # Only results go to standard output. Output of libraries is redirected to standard error.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    rehearse = prepare()
    for result in in_forks((partial(rehearse, job) for job in jobs), processes):
        print(json.dumps(asdict(result)), file=results, flush=True)


def prepare() -> Rehearse:
    """Replaces CUDA, imports the modules of stages, and returns the function that rehearses a job.

    Afterwards, this process can be used only for rehearsals.
    """
    from recipes.rehearsal import fake_cuda, files, messages

    fake_cuda.install()
    messages.install()
    files.install()
    # This import comes after the calls above, because some of the imported libraries look for a
    # device, or copy references to torch functions.
    from recipes.rehearsal import patches, rank

    patches.install()
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # the garbage collector of each fork then skips the imported modules
    return rank.rehearse


def in_forks(tasks: Iterable[Task], processes: int) -> Iterator[RehearsalResult]:
    """Runs each task in a fork, at most ``processes`` at a time; yields the results in order."""
    running: deque[tuple[BaseProcess, Connection]] = deque()
    for task in tasks:
        if len(running) == processes:
            yield _receive(*running.popleft())
        running.append(_start(task))
    while running:
        yield _receive(*running.popleft())


def _start(task: Task) -> tuple[BaseProcess, Connection]:
    """Starts a task in a fork; returns the fork and the pipe that will receive the result."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(task()))
    child.start()
    sender.close()  # now only the fork can send, so the pipe ends if the fork dies
    return child, receiver


def _receive(child: BaseProcess, receiver: Connection) -> RehearsalResult:
    """Waits for the result of a fork, then for the end of the fork."""
    result: RehearsalResult | None = None
    with suppress(EOFError):  # the fork died before it sent a result
        result = receiver.recv()
    child.join()
    return result or RehearsalResult(error=f"its process ended with exit code {child.exitcode}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
