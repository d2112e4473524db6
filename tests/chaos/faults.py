"""Faults beside kills: a disk that is full, a rank that hangs, one that runs out of memory.

Each must end with one message that names the cause; then the fault is gone, and the same command
must go on to its end.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from recipes.core.manifest import ARTIFACT, MANIFEST
from recipes.core.metrics import METRICS
from tests.chaos import slurm
from tests.chaos.chain import SMALL_ENGINES, differences
from tests.chaos.kills import PATIENCE, Disturbed, roles_of
from tests.support.disks import small_disk
from tests.support.runs import HEALING, settings

ROOM = tuple(4096 * pages for pages in (16, 12, 8, 6, 4))
"""Left on a disk, until a stage that makes little has too little; the launcher needs some, too."""
HANGING = """
import signal, time
def hang(*_):
    time.sleep(1e6)
signal.signal(signal.SIGUSR1, hang)
"""
OTHERS = (
    "engine=openvino",
    *SMALL_ENGINES,
    "gguf=q8_0",
    "tasks=quick",
    *settings("evaluate_tasks", tasks="[sciq,piqa]", limit=4),
    "+stage/quantize@stages.quantize=default",
    *settings("quantize", num_sequences=4, num_eval_sequences=2),
    "skip_rules=[alignment]",  # of kernels that nothing here runs
)
"""Makes engines, a file for llama.cpp and a quantised copy of the student, and does benchmarks."""
OF_OTHERS = ("evaluate_tasks", "build_engine", "measure_speed", "export_gguf", "quantize")
Command = Callable[..., Disturbed]
"""Makes the chain's command, of further words, and with further variables."""


def full_disk(base: Path, run: Path, command: Command, stage: str) -> Iterator[str]:
    """Half of what a stage makes fits."""
    run.mkdir(exist_ok=True)
    with small_disk(run, "300m") as disk:
        shutil.copytree(base, run, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        shutil.rmtree(run / stage)
        asked = command(f"only=[{stage}]", "skip_rules=[disk,alignment]")
        made = sum(f.stat().st_size for f in (base / stage / ARTIFACT).rglob("*") if f.is_file())
        for room in (max(ROOM[0], made // 2), *ROOM[1:]):
            disk.leave(room)
            code, said = asked.finish()
            if code:
                break
            shutil.rmtree(run / stage)
        if code != 1 or "Traceback" in said:
            yield f"exit status {code}: {said[-2000:]}"
        for words in ("No space left on device", "free some space; the same command resumes"):
            if words not in said:
                yield f"{words!r} is not said: {said[-2000:]}"
        if (run / stage / MANIFEST).exists():
            yield "it counts as complete"
        disk.remount("size=300m")
        code, said = asked.finish()
        if code:
            yield f"with space again: {said[-2000:]}"
            return
        yield from differences(base, run)


def full_disk_of_others(base: Path, run: Path, command: Command, stage: str) -> Iterator[str]:
    """The same of a stage that the chain has not otherwise."""
    whole = base.with_name("base-of-others")
    if not whole.exists():
        shutil.copytree(base, run, ignore=shutil.ignore_patterns(".lock"))
        code, said = command(*OTHERS).finish()
        if code:
            yield f"undisturbed: {said[-2000:]}"
            return
        run.rename(whole)
    yield from full_disk(whole, run, partial(command, *OTHERS), stage)


def one_rank(base: Path, run: Path, command: Command, how: str) -> Iterator[str]:
    """One of two that train hangs, in a call that does not return, or is killed by the kernel."""
    shutil.copytree(base, run, ignore=shutil.ignore_patterns(".lock"))
    shutil.rmtree(run / "distill")
    (run.parent / "sitecustomize.py").write_text(HANGING)
    asked = command(
        "only=[distill]",
        "stages.distill.resources.devices=2",
        "stages.distill.micro_batch_size=2",
        "stages.distill.resources.max_silence=30",
        PYTHONPATH=str(run.parent),
    )
    launcher, metrics = asked.start(), run / "distill" / METRICS
    while not metrics.exists() or metrics.read_text().count("\n") < 8:
        if launcher.poll() is not None:
            yield f"ended too early: {asked.output()[-2000:]}"
            return
        time.sleep(0.02)
    victim = max(roles_of(launcher.pid)["stage"])
    os.kill(victim, signal.SIGUSR1 if how == "hangs" else signal.SIGKILL)
    if (code := launcher.wait(timeout=PATIENCE)) != 1:
        yield f"exit status {code}"
    said = asked.output()
    expected = {
        "hangs": r"resources\.max_silence allows(?s:.*)rank 1: .*sitecustomize\.py, .* in hang",
        "memory": r"rank 1.* killed by SIGKILL: out of memory",
    }[how]
    if not re.search(expected, said) or "Traceback" in said:
        yield f"said: {said[-2000:]}"
    code, said = asked.finish()
    if code or "resume" not in said:
        yield f"exit status {code} afterwards: {said[-2000:]}"


FAULTS: dict[str, Callable[[Path, Path, Command], Iterator[str]]] = {
    **{f"disk-{stage}": partial(full_disk, stage=stage) for stage in HEALING},
    **{f"disk-{stage}": partial(full_disk_of_others, stage=stage) for stage in OF_OTHERS},
    **{f"rank-{how}": partial(one_rank, how=how) for how in ("hangs", "memory")},
    **{
        f"slurm-{name}": partial(slurm.training, fault=fault, expected=expected)
        for name, (fault, expected) in slurm.FAULTS.items()
    },
}
"""By name; each yields what is wrong."""
