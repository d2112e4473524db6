"""``python launch/run.py doctor``: what this machine has and lacks. ``doctor rules``: all rules."""

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
from rich.table import Table

from recipes.core.errors import RecipeError, did_you_mean
from recipes.core.versions import installed, pins
from recipes.core.wheels import cache_dir
from recipes.planning.hardware import physical_memory
from recipes.planning.rules import RULES

OK, WARN, FAIL = "ok", "warn", "fail"
STYLES = {OK: "green", WARN: "yellow", FAIL: "red"}
DISK_BYTES, MEMORY_BYTES, SHM_BYTES = 4e9, 5e9, 1e9
"""What the embedded recipes take: disk with the stack installed, memory, and shared memory."""
QUERY = "--query-gpu=name,memory.total,driver_version"


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    found: str
    result: str
    fix: str = ""


def run(words: Sequence[str], console: Console) -> int:
    """Prints the table of checks, or that of rules.

    Returns:
        Exit status: 1 if something here makes every recipe impossible.

    Raises:
        RecipeError: Other words than ``rules``.
    """
    if list(words) == ["rules"]:
        print_rules(console)
        return 0
    if words:
        raise RecipeError(
            f"doctor does not know '{' '.join(words)}'.{did_you_mean(words[0], ['rules'])}",
            "doctor, or doctor rules",
        )
    checks = list(examine())
    table = Table(title="doctor", title_justify="left", box=None)
    for column in ("check", "found", "", "fix"):
        table.add_column(column)
    for check in checks:
        style = STYLES[check.result]
        table.add_row(
            check.name, escape(check.found), f"[{style}]{check.result}", escape(check.fix)
        )
    console.print(table)
    failed = [check.name for check in checks if check.result == FAIL]
    console.print(f"impossible here: {', '.join(failed)}" if failed else "recipes can run here")
    return 1 if failed else 0


def print_rules(console: Console) -> None:
    """Prints every rule of preflight."""
    table = Table(title="rules", title_justify="left", box=None)
    for column in ("rule", "severity", "reason", "reference"):
        table.add_column(column)
    for rule in RULES.values():
        table.add_row(rule.name, rule.severity, escape(rule.reason), escape(rule.reference))
    console.print(table)


def examine() -> Iterator[Check]:
    """All checks."""
    yield from _libraries()
    yield from _accelerators()
    yield from _room()
    yield from _programs()


def _libraries() -> Iterator[Check]:
    for pin in pins():
        yield Check(
            f"{pin.name} {pin.wanted}",
            pin.found or "missing",
            OK if pin.holds else FAIL,
            "" if pin.holds else "./install.sh, then .venv/bin/python launch/run.py doctor",
        )


def _accelerators() -> Iterator[Check]:
    gpus, cuda = _gpus(), _cuda_of_torch()
    built = f"CUDA {cuda}" if cuda else "for CPU"
    if gpus and not cuda:
        yield Check(
            "build of torch", built, FAIL, "install a CUDA build of torch: this machine has a GPU"
        )
    else:
        yield Check("build of torch", built, OK)
    for gpu in gpus:
        yield Check("GPU", gpu, OK)
    if not gpus:
        bf16 = "avx512_bf16" in _text("/proc/cpuinfo") or "amx_bf16" in _text("/proc/cpuinfo")
        fix = "" if bf16 else "bfloat16 may be slow: stages.distill.precision=32"
        found = "no GPU; CPU " + ("with" if bf16 else "without") + " bfloat16 instructions"
        yield Check("GPU", found, OK if bf16 else WARN, fix)


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", QUERY, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _cuda_of_torch() -> str | None:
    """CUDA version that torch was built for, read from its files: an import takes seconds."""
    try:
        files = metadata.files("torch") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.as_posix() == "torch/version.py":
            found = re.search(r"^cuda\b[^=]*= '([\d.]+)'", file.read_text(), re.MULTILINE)
            return found.group(1) if found else None
    return None


def _room() -> Iterator[Check]:
    for name, have, least, fix in (
        ("disk here", _free(Path.cwd()), DISK_BYTES, "set run_dir to another disk"),
        ("memory", physical_memory(), MEMORY_BYTES, "use a smaller model or micro batch"),
    ):
        enough = have >= least
        yield Check(name, f"{have / 1e9:.1f} GB", OK if enough else FAIL, "" if enough else fix)
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).total if shm.is_dir() else 0
    enough = size >= SHM_BYTES
    fix = "" if enough else "NCCL and gloo use it between ranks: docker run --ipc=host"
    yield Check("shared memory", f"{size / 1e9:.1f} GB", OK if enough else WARN, fix)
    cache = cache_dir()
    existing = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    writable = os.access(existing, os.W_OK)
    yield Check(
        "cache", str(cache), OK if writable else FAIL,
        "" if writable else "set NEMO_RECIPES_CACHE to a folder that is writable",
    )  # fmt: skip


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _programs() -> Iterator[Check]:
    for program, use in (
        ("docker", "cluster=docker"),
        ("sbatch", "cluster=slurm"),
        ("enroot", "images on Slurm"),
        ("trtllm-build", "TensorRT-LLM engines"),
    ):
        path = shutil.which(program)
        yield Check(program, path or "not here", OK if path else WARN, "" if path else f"for {use}")
    found = installed("tensorrt_llm")
    yield Check("tensorrt_llm", found or "not here", OK if found else WARN,
                "" if found else "for TensorRT-LLM engines, in an image of its own")  # fmt: skip


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
