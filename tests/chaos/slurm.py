"""Faults of a training on two nodes of a real Slurm: a node is lost, or its time is over.

The launcher follows the job. However that ends, the same command must then go on from the last
whole checkpoint to what an undisturbed training gives.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

from launch.executors.slurm_queue import read_jobs
from recipes.core.manifest import WORK
from recipes.core.metrics import METRICS, read_records
from recipes.distillation.training import CHECKPOINTS, UNFINISHED, whole_checkpoints
from tests.chaos.chain import CHECKPOINT_INTERVAL, differences
from tests.chaos.kills import PATIENCE, Disturbed
from tests.slurm.cluster import Cluster, run, wait_for, without_slurm
from tests.support import processes

WORDS = (
    "cluster=slurm",
    "cluster.gpus=null",
    "cluster.images.default=null",
    f"cluster.python={sys.executable}",
    "cluster.time=01:00:00",
    "cluster.follow=true",
    "only=[distill]",
    "stages.distill.resources.nodes=2",
    "stages.distill.micro_batch_size=2",
)
NODES = 3
"""One more than the training needs."""
SILENCE = 15
"""Seconds after which Slurm takes a node for lost; its own default is 300."""
Command = Callable[..., Disturbed]
Fault = Callable[[Cluster, str, Path], None]
"""Disturbs a job of the run in the directory."""


def training(
    base: Path, run_dir: Path, command: Command, fault: Fault, expected: str
) -> Iterator[str]:
    """One that is disturbed once it has a checkpoint; what the launcher then says is expected."""
    if why := without_slurm():
        yield why
        return
    with Cluster.running(NODES, SILENCE) as cluster:
        asked, whole = command(*WORDS), base.with_name("trained-by-slurm")
        if not whole.exists():
            _untrained(base, run_dir)
            code, said = asked.finish()
            if code:
                yield f"undisturbed: {said[-2000:]}"
                return
            run_dir.rename(whole)
        _untrained(base, run_dir)
        launcher = asked.start()
        checkpoints = run_dir / "distill" / WORK / CHECKPOINTS
        wait_for(lambda: whole_checkpoints(checkpoints) or launcher.poll() is not None, PATIENCE)
        if launcher.poll() is not None:
            yield f"ended too early: {asked.output()[-2000:]}"
            return
        fault(cluster, read_jobs(run_dir)["distill"].id, run_dir)
        code, said = launcher.wait(timeout=PATIENCE), asked.output()
        print(said.splitlines()[-2:], flush=True)
        if not re.search(expected, said) or "Traceback" in said:
            yield f"exit status {code}: {said[-2000:]}"
        code, said = asked.finish()
        if code:
            yield f"exit status {code} afterwards: {said[-2000:]}"
            return
        yield from differences(whole, run_dir)
        yield from _went_on(run_dir)


def _untrained(base: Path, run_dir: Path) -> None:
    shutil.copytree(base, run_dir, ignore=shutil.ignore_patterns(".lock"))
    shutil.rmtree(run_dir / "distill")


def _went_on(run_dir: Path) -> Iterator[str]:
    """Each start, which measures the teacher's loss anew, but the first is from a checkpoint."""
    records = read_records(run_dir / "distill" / METRICS)
    steps = [record for record in records if record.get("task") == "distill"]
    starts = [next(g)["done"] for _, g in groupby(steps, lambda step: step["teacher_loss"])]
    print(f"steps {starts} were the first of their starts", flush=True)
    if any(step == 1 or step % CHECKPOINT_INTERVAL != 1 for step in starts[1:]):
        yield f"it did not go on from a checkpoint: {[step['done'] for step in steps]}"


def lose(cluster: Cluster, job: str, run_dir: Path, node: str) -> None:
    """A node of the job, of which nothing answers any more."""
    cluster.lose_node(node)
    wait_for(lambda: "Restarts=1" in run("scontrol", "show", "job", job), PATIENCE)


def restart_controller(cluster: Cluster, job: str, run_dir: Path) -> None:
    """Slurm's own, which is away for longer than the launcher's questions wait."""
    cluster.restart_controller(seconds=25)


def end_while_saving(cluster: Cluster, job: str, run_dir: Path) -> None:
    """Its time is over while a checkpoint is written, on storage that takes for ever."""
    checkpoints, found = run_dir / "distill" / WORK / CHECKPOINTS, list[int]()

    def saving() -> bool:
        return any(checkpoints.glob(f"*{UNFINISHED}"))

    while not found:
        wait_for(saving, PATIENCE, pause=0.001)
        found = processes.with_variable("SLURM_JOB_ID", job)
        found = [pid for pid in found if "recipes.stages.distill" in processes.command(pid)]
        for pid in found:
            os.kill(pid, signal.SIGSTOP)
        if not saving():  # it has just been done
            for pid in found:
                os.kill(pid, signal.SIGCONT)
            found = []
    run("scontrol", "update", f"jobid={job}", "EndTime=now")


FAULTS: dict[str, tuple[Fault, str]] = {
    **{
        what: (partial(lose, node=node), r"distill: complete")
        for what, node in (("batch-node", "n1"), ("other-node", "n2"))
    },
    "controller": (restart_controller, r"distill: complete"),
    "time-limit": (end_while_saving, r"failed \(TIMEOUT\): its time limit was over"),
}
"""By name, with what the launcher is to say."""
