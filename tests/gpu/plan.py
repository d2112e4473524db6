"""Half an hour on one GPU, step by step: ``make test-gpu``.

For a machine with plain PyTorch, without a network and without TransformerEngine. A step is a test
of this folder in a process of its own, which ends at its limit; one that fails stops only those
that stand on it. What each measured, printed and traced stays in a folder, with the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).parent
MINUTES = 30.0
RESULTS, ON_CPU = "GPU_TESTS_RESULTS", "GPU_TESTS_ON_CPU"
"""Variables: the folder of results, with which no test is skipped; whether a CPU will do."""
PASSED, FAILED, TOO_LONG, NOT_REACHED = "passed", "failed", "too long", "not reached"
DEVICE = "device"


@dataclass(frozen=True)
class Step:
    """One test."""

    name: str
    test: str
    """Below this folder."""
    minutes: float
    """It may take."""
    shows: str
    after: tuple[str, ...] = (DEVICE,)
    """Steps that it stands on."""


CHAIN = (DEVICE, "reference")
_TRAINING = "test_training.py::test_"
_MEMORY = "test_memory.py::test_"
STEPS = (
    Step("imports", "test_imports.py", 2, "every module imports; versions", ()),
    Step("reference", "test_reference.py", 4, "a small model's chain on the CPU", ("imports",)),
    Step("rehearsal", f"{_MEMORY}rehearsed_as_planned", 2, "8B's layers, weightless", ("imports",)),
    Step(DEVICE, "test_device.py", 1, "CUDA, and a kernel compiled with Triton", ("imports",)),
    Step("loss", "test_loss.py", 3, "exact in bfloat16; time and memory beside NeMo's"),
    Step("conversion", "test_conversion.py", 3, "an import proves itself; TF32 off and on", CHAIN),
    Step("scores", "test_scores.py", 3, "importance and ranking are the CPU's", CHAIN),
    Step("training", f"{_TRAINING}losses_are_the_cpus", 4, "20 steps, traced", CHAIN),
    Step("killed", f"{_TRAINING}killed_it_goes_on", 2, "to the same end", (*CHAIN, "training")),
    Step("clock", f"{_TRAINING}clock_stops_it", 2, "and it goes on", (*CHAIN, "training")),
    Step("teachers", "test_teachers.py", 3, "cached; hidden states, with a projection", CHAIN),
    Step("layouts", "test_training_layouts.py", 4, "recomputed activations; CP=2 on two", CHAIN),
    Step("memory", f"{_MEMORY}measured_as_rehearsed", 5, "8B's layers: memory and time of a step",
         (DEVICE, "rehearsal")),
    Step("formats", "test_formats.py", 4, "evaluate in bfloat16, export, FP8",
         (*CHAIN, "training")),
)  # fmt: skip


@dataclass(frozen=True)
class Done:
    """How a step ended."""

    name: str
    result: str
    seconds: float = 0.0
    why: str = ""
    """It did not pass, in a line."""


Command = Callable[[Step], Sequence[str]]


def pytest_command(step: Step) -> list[str]:
    """What runs a step."""
    options = ["-q", "-rs", "--tb=short", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *options, str(HERE / step.test)]


def chosen(names: Sequence[str], steps: Sequence[Step] = STEPS) -> list[Step]:
    """The steps of these names, and those that they stand on, in order; all without a name."""
    known = {step.name: step for step in steps}
    wanted = list(names or known)
    for name in wanted:
        if name not in known:
            raise SystemExit(f"there is no step '{name}': {', '.join(known)}")
        wanted += [before for before in known[name].after if before not in wanted]
    return [step for step in steps if step.name in wanted]


def run(
    steps: Sequence[Step],
    folder: Path,
    command: Command = pytest_command,
    minutes: float = MINUTES,
    env: Mapping[str, str] | None = None,
) -> Iterator[Done]:
    """Runs steps in order.

    Args:
        steps: What to run. Of those that a step stands on, the ones that are listed must have
            passed.
        folder: For the output of each, and what else it leaves.
        command: What runs a step.
        minutes: All of them may take.
        env: Variables beside this process's own.
    """
    end = time.monotonic() + 60 * minutes
    results: dict[str, str] = {}
    listed = {step.name for step in steps}
    for step in steps:
        missing = [n for n in step.after if n in listed and results[n] != PASSED]
        left = min(60 * step.minutes, end - time.monotonic())
        if missing:
            done = Done(step.name, NOT_REACHED, why=f"stands on {missing[0]}")
        elif left <= 0:
            done = Done(step.name, NOT_REACHED, why=f"the {minutes:g} minutes were over")
        else:
            done = _run(step, command(step), folder / f"{step.name}.log", left, env or {})
        results[step.name] = done.result
        yield done


def _run(
    step: Step, command: Sequence[str], log: Path, seconds: float, env: Mapping[str, str]
) -> Done:
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=HERE.parent.parent,
            env={**os.environ, **env},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):  # what it started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = round(time.monotonic() - began, 1)
    if code == 0:
        return Done(step.name, PASSED, took)
    if code is None:
        return Done(step.name, TOO_LONG, took, f"ended after {seconds:.0f} s")
    return Done(step.name, FAILED, took, _reason(log.read_text(errors="replace"), code))


def _reason(text: str, code: int) -> str:
    """What pytest says went wrong, or else the last line."""
    said = re.search(r"^E +(.+)|^(no CUDA device.*)", text, re.MULTILINE)
    lines = text.split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return next(filter(None, said.groups())) if said else f"exit status {code}: {last}"


def table(steps: Sequence[Step], results: Sequence[Done]) -> Table:
    """What passed, failed and was not reached."""
    found = Table(box=None)
    for column in ("step", "result", "seconds", "of", "shows, or why not"):
        found.add_column(column)
    for step, done in zip(steps, results, strict=True):
        times = f"{done.seconds:.0f}" if done.seconds else "", f"{60 * step.minutes:.0f}"
        found.add_row(step.name, done.result, *times, escape(done.why or step.shows))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the plan; returns 0 if all of it passed."""
    parser = argparse.ArgumentParser(description=__doc__, prog="make test-gpu ARGS=")
    parser.add_argument("steps", nargs="*", help="only these, and what they stand on")
    parser.add_argument("--out", type=Path, default=Path("runs/test-gpu"))
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--on-cpu", action="store_true", help="tries the tests themselves, small")
    args = parser.parse_args(arguments)
    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    steps, env = chosen(args.steps), {RESULTS: str(folder)}
    if args.on_cpu:
        steps = [step for step in steps if step.name != DEVICE]
        env |= {ON_CPU: "1", "CUDA_VISIBLE_DEVICES": ""}
    screen = Console(soft_wrap=True)
    results = []
    for done in run(steps, folder, minutes=args.minutes, env=env):
        results.append(done)
        screen.print(f"{done.name}: {done.result} {escape(done.why)}".rstrip())
    screen.print(table(steps, results))
    with (folder / "table.txt").open("w") as file:
        Console(file=file, width=160).print(table(steps, results))
    listed = [asdict(done) for done in results]
    (folder / "results.json").write_text(json.dumps(listed, indent=1))
    screen.print(f"outputs, figures and traces: {folder}")
    return int(any(done.result != PASSED for done in results))


if __name__ == "__main__":
    sys.exit(main())
