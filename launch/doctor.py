"""Command ``doctor``: checks this machine. ``doctor rules`` lists the rules that plans check."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from recipes.core.errors import RecipeError, did_you_mean
from recipes.core.screen import plain_table
from recipes.core.versions import RESULT_LIBRARIES, STAGE_EXTRAS, installed_version, pins
from recipes.core.wheels import cache_dir
from recipes.planning.hardware import cpu_profile, physical_memory
from recipes.planning.rules import RULES

OK, WARN, FAIL = "ok", "warn", "fail"
STYLES = {OK: "green", WARN: "yellow", FAIL: "red"}
MIN_DISK_BYTES, MIN_MEMORY_BYTES, MIN_SHM_BYTES = 9e9, 5e9, 1e9
"""What ``make demo`` needs: free disk space, memory and shared memory."""
PROGRAMS = {
    "docker": "cluster=docker",
    "sbatch": "cluster=slurm",
    "enroot": "images on Slurm",
    "trtllm-build": "TensorRT-LLM engines",
}
"""Optional programs, and the setting or feature that needs each."""
GPU_QUERY = "--query-gpu=name,memory.total,driver_version"


@dataclass(frozen=True)
class Check:
    """One check of this machine, which is a row of the printed table."""

    name: str
    value: str
    """Version, size or path on this machine."""
    result: str
    """``OK``, ``WARN`` or ``FAIL``."""
    fix: str = ""


def run(arguments: Sequence[str], console: Console) -> int:
    """Prints all checks, or all rules; returns the exit status, which is 1 if a check failed."""
    if list(arguments) == ["rules"]:
        table = plain_table("rules", "rule", "severity", "reason", "reference")
        for rule in RULES.values():
            table.add_row(rule.name, rule.severity, escape(rule.reason), escape(rule.reference))
        console.print(table)
        return 0
    if arguments:
        raise RecipeError(
            f"doctor does not know '{' '.join(arguments)}'.{did_you_mean(arguments[0], ['rules'])}",
            "doctor, or doctor rules",
        )
    checks = list(examine())
    table = plain_table("doctor", "check", "found", "", "fix")
    for check in checks:
        result = f"[{STYLES[check.result]}]{check.result}"
        table.add_row(check.name, escape(check.value), result, escape(check.fix))
    console.print(table)
    failed = [check.name for check in checks if check.result == FAIL]
    only_launcher = _has_only_launcher()
    subject = "the launcher" if only_launcher else "recipes"
    if failed:
        console.print(f"{subject} cannot run here: fix {', '.join(failed)}")
    elif only_launcher:
        console.print(
            "this environment has only the launcher, which plans, submits, follows and compares "
            "runs; ./install.sh installs the libraries that stages need"
        )
    else:
        console.print("recipes can run here")
    return int(bool(failed))


def examine() -> Iterator[Check]:
    """Yields all checks; if only the launcher is installed, only checks of what it needs."""
    if _has_only_launcher():
        yield from _pins(["launcher"], "./install.sh launcher")
        yield _cache()
        yield from _programs("docker", "sbatch", "enroot")
        return
    yield from _pins(STAGE_EXTRAS, "./install.sh, then .venv/bin/python launch/run.py doctor")
    yield from _accelerators()
    yield from _resources()
    yield _cache()
    yield from _programs(*PROGRAMS)
    version = installed_version("tensorrt_llm")
    fix = "for TensorRT-LLM engines; it needs its own image"
    yield _check("tensorrt_llm", version or "not here", version, fix, otherwise=WARN)


def _has_only_launcher() -> bool:
    """Returns whether no library of stages is installed, as on a login node."""
    return not any(map(installed_version, RESULT_LIBRARIES))


def _pins(extras: Sequence[str], fix: str) -> Iterator[Check]:
    """Compares installed versions with those that the extras of pyproject.toml require."""
    for pin in pins(extras):
        name = f"{pin.name} {pin.required}"
        yield _check(name, pin.installed or "missing", pin.is_satisfied, fix)


def _check(name: str, value: str, passed: object, fix: str, otherwise: str = FAIL) -> Check:
    """Returns a check: ``OK`` if ``passed`` is true, or else ``otherwise`` with the fix."""
    return Check(name, value, OK) if passed else Check(name, value, otherwise, fix)


def _accelerators() -> Iterator[Check]:
    """Checks that torch supports the GPUs or, without GPUs, that the CPU supports bfloat16."""
    gpus, cuda = _gpus(), _cuda_of_torch()
    fix = "install a CUDA build of torch: this machine has a GPU"
    yield _check("build of torch", f"CUDA {cuda}" if cuda else "for CPU", cuda or not gpus, fix)
    for gpu in gpus:
        yield Check("GPU", gpu, OK)
    if not gpus:
        has_bf16 = cpu_profile("precision") == "bf16-mixed"
        value = f"no GPU; CPU {'with' if has_bf16 else 'without'} bfloat16 instructions"
        fix = "bfloat16 may be slow: stages.distill.precision=32"
        yield _check("GPU", value, has_bf16, fix, otherwise=WARN)


def _gpus() -> list[str]:
    """Returns the name, memory and driver version of each GPU; empty if nvidia-smi fails."""
    command = ["nvidia-smi", GPU_QUERY, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _cuda_of_torch() -> str | None:
    """Returns the CUDA version that torch was built with; ``None`` without torch or CUDA."""
    try:  # reads a file, because importing torch takes seconds
        file = metadata.distribution("torch").locate_file("torch/version.py")
        text = Path(str(file)).read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        return None
    # The line is ``cuda: Optional[str] = '12.9'``, or ``= None`` in a build for CPUs.
    match = re.search(r"^cuda\b[^=]*= '([\d.]+)'", text, re.MULTILINE)
    return match[1] if match else None


def _resources() -> Iterator[Check]:
    """Checks the disk of the current directory, the memory and the shared memory."""
    disk, fix = shutil.disk_usage(Path.cwd()).free, "set run_dir to another disk"
    yield _check("disk here", f"{disk / 1e9:.1f} GB", disk >= MIN_DISK_BYTES, fix)
    memory, fix = physical_memory(), "use a smaller model or micro batch"
    yield _check("memory", f"{memory / 1e9:.1f} GB", memory >= MIN_MEMORY_BYTES, fix)
    folder, fix = Path("/dev/shm"), "NCCL and gloo use it between ranks: docker run --ipc=host"
    shm = shutil.disk_usage(folder).total if folder.is_dir() else 0
    yield _check("shared memory", f"{shm / 1e9:.1f} GB", shm >= MIN_SHM_BYTES, fix, otherwise=WARN)


def _cache() -> Check:
    """Checks that the cache directory is writable, or can be created."""
    cache, fix = cache_dir(), "set NEMO_RECIPES_CACHE to a writable folder"
    nearest_existing = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    return _check("cache", str(cache), os.access(nearest_existing, os.W_OK), fix)


def _programs(*names: str) -> Iterator[Check]:
    """Warns of optional programs that are not on the PATH."""
    for program in names:
        path = shutil.which(program)
        yield _check(program, path or "not here", path, f"for {PROGRAMS[program]}", otherwise=WARN)
