"""Runs the tests of this folder in half an hour on one GPU: ``make test-gpu``.

The machine needs neither a network nor TransformerEngine. The tests are divided into steps. Each
step runs in a separate process with a time limit. If a step fails, only the steps that depend on it
are not run. Outputs, results, traces and a table are written to a folder.
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

HERE = Path(__file__).parent  # folder of the GPU tests
MINUTES = 30.0  # time limit of all steps together
RESULTS, ON_CPU = "GPU_TESTS_RESULTS", "GPU_TESTS_ON_CPU"
"""Names of environment variables.

``RESULTS`` holds the path of the folder of results. Without this variable, tests are skipped if
there is no GPU. ``ON_CPU`` is set if the plan runs small versions of the tests on the CPU.
"""
# Values of ``StepResult.status``.
PASSED, FAILED, TIMEOUT, NOT_RUN = "passed", "failed", "timeout", "not run"
SKIPPED = "skipped"  # at least one test was skipped, for example without TransformerEngine
DEVICE = "device"  # name of the step that most steps depend on


@dataclass(frozen=True)
class Step:
    """Tests that run in one process."""

    name: str
    tests: str
    """``FILE::NAME`` of each test, separated by spaces.

    Both names lack their prefix ``test_``, and the file its suffix ``.py``.
    """
    minutes: float
    """Time limit."""
    checks: str
    """What the tests check. The table shows it if the step passes."""
    after: tuple[str, ...] = (DEVICE,)
    """Names of the steps that this step depends on."""

    def nodes(self) -> list[str]:
        """Returns the node id of each test for pytest, relative to ``HERE``."""
        pairs = (test.split("::") for test in self.tests.split())
        return [f"test_{file}.py::test_{name}" for file, name in pairs]


# Dependencies of steps that compare with the model distilled on the CPU (step "reference"), and of
# those that also need the step "training".
NEEDS_REFERENCE, NEEDS_TRAINING = (DEVICE, "reference"), (DEVICE, "reference", "training")
STEPS = (
    Step("imports", "device::every_module_imports", 2, "every module can be imported", ()),
    Step(DEVICE, "device::a_device_computes device::triton_compiles", 1,
         "CUDA computes; Triton compiles a kernel", ("imports",)),
    Step("float32", "kernels::float32_is_not_tensorfloat_32", 1, "float32 GEMMs are not TF32"),
    Step("reference", "chain::cpu_reference_learns", 4,
         "a small model is distilled on the CPU, as reference for other steps", ("imports",)),
    Step("layers", "kernels::transformer_engine_is_used_and_has_the_logits_of_local_layers", 2,
         "TransformerEngine's layers (if installed) are used and give the local layers' logits",
         NEEDS_REFERENCE),
    Step("optimizers", "kernels::first_optimizer_steps_equal_those_of_adamw", 1,
         "our fused Adam, and TransformerEngine's if installed, compute AdamW's first steps"),
    Step("training", "chain::losses_match_the_cpu", 4,
         "20 losses match the CPU's", NEEDS_REFERENCE),
    Step("loss", "loss::losses_and_gradients_match_their_definition "
         "loss::memory_is_below_that_of_nemos_loss", 3,
         "losses are exact in bfloat16 and take less memory than NeMo's"),
    Step("conversion", "conversion::an_imported_model_has_the_logits_of_transformers", 3,
         "an imported model has the logits of transformers, with TF32 off", NEEDS_REFERENCE),
    Step("scores", "chain::importance_and_ranking_match_the_cpu", 3,
         "importance scores and ranked candidates match the CPU's", NEEDS_REFERENCE),
    Step("killed", "chain::killed_training_resumes", 2,
         "a killed training resumes", NEEDS_TRAINING),
    Step("clock", "chain::training_stopped_at_its_deadline_resumes", 2,
         "a training stopped at its time limit resumes", NEEDS_TRAINING),
    Step("teachers", "chain::cached_teacher_gives_the_losses_of_a_live_teacher "
         "chain::hidden_states_with_a_projection_match_the_cpu", 3,
         "a cached teacher gives a live one's losses; hidden-state losses match the CPU's",
         NEEDS_REFERENCE),
    Step("layouts", "chain::each_layout_has_the_losses_of_the_cpu", 4,
         "losses match the CPU's with recomputed activations, and with CP=2 on two GPUs",
         NEEDS_REFERENCE),
    Step("search", "chain::search_trains_on_the_gpu_on_which_it_measures", 5,
         "a search measures candidates, and a child process trains them on the same GPU",
         (*NEEDS_REFERENCE, "scores")),
    Step("rehearsal", "memory::rehearsed_memory_matches_the_plan", 2,
         "training some layers of Llama 8B on fake tensors takes the planned memory", ("imports",)),
    Step("memory", "memory::measured_memory_matches_the_rehearsal", 5,
         "training some layers of Llama 8B takes the memory of their rehearsal",
         (DEVICE, "rehearsal")),
    Step("formats", "chain::a_distilled_model_is_evaluated_exported_and_quantized", 4,
         "a student is evaluated in bfloat16, exported and quantized to FP8", NEEDS_TRAINING),
)  # fmt: skip
"""Steps in the order in which they run.

A step that needs no GPU comes directly before the first step that depends on it. So if the time
limit ends the plan early, as many steps as possible have used the GPU. The first ten minutes
include ``layers``, because TransformerEngine's layers can only be tested on a GPU.
"""


@dataclass(frozen=True)
class StepResult:
    """Result of a step."""

    name: str
    status: str
    """``PASSED``, ``FAILED``, ``TIMEOUT``, ``NOT_RUN`` or ``SKIPPED``."""
    seconds: float = 0.0
    reason: str = ""
    """One line that says why the step did not pass; empty if it passed."""


Command = Callable[[Step], Sequence[str]]
"""Function that returns the command line of a step."""


def pytest_command(step: Step) -> list[str]:
    """Returns the command line that runs a step's tests."""
    options = ["-q", "-rs", "--tb=short", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *options, *(str(HERE / node) for node in step.nodes())]


def with_dependencies(names: Sequence[str], steps: Sequence[Step] = STEPS) -> list[Step]:
    """Returns the named steps (all by default) and the steps that they depend on, in order."""
    by_name = {step.name: step for step in steps}
    selected = list(names or by_name)
    for name in selected:
        if name not in by_name:
            raise SystemExit(f"there is no step '{name}'; the steps are: {', '.join(by_name)}")
        # The loop also visits the dependencies that are appended here.
        selected += [other for other in by_name[name].after if other not in selected]
    return [step for step in steps if step.name in selected]


def run(
    steps: Sequence[Step],
    folder: Path,
    command: Command = pytest_command,
    minutes: float = MINUTES,
    env: Mapping[str, str] | None = None,
) -> Iterator[StepResult]:
    """Runs steps in order; yields the result of each step as soon as it ends.

    Args:
        steps: Steps to run. A step is not run if a step that it depends on did not pass.
            Dependencies that are not in ``steps`` are ignored.
        folder: Folder for the output of each step, ``NAME.log``.
        command: Function that returns the command line of a step.
        minutes: Time limit of all steps together.
        env: Environment variables in addition to those of this process.
    """
    end = time.monotonic() + 60 * minutes
    statuses: dict[str, str] = {}
    for step in steps:
        not_passed = [name for name in step.after if statuses.get(name, PASSED) != PASSED]
        limit = min(60 * step.minutes, end - time.monotonic())  # seconds
        if not_passed:
            reason = f"depends on {not_passed[0]}, which did not pass"
            result = StepResult(step.name, NOT_RUN, reason=reason)
        elif limit <= 0:
            result = StepResult(step.name, NOT_RUN, reason=f"the {minutes:g} minutes were over")
        else:
            result = _run(step, command(step), folder / f"{step.name}.log", limit, env or {})
        statuses[step.name] = result.status
        yield result


def _run(
    step: Step, command: Sequence[str], log: Path, seconds: float, env: Mapping[str, str]
) -> StepResult:
    """Runs a step's command, with its output in ``log``, for at most ``seconds``."""
    start = time.monotonic()
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
            exit_status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            exit_status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the children of the process
            process.wait()
    duration = round(time.monotonic() - start, 1)
    if exit_status is None:
        return StepResult(step.name, TIMEOUT, duration, f"stopped after {seconds:.0f} s")
    output = log.read_text(errors="replace")
    if exit_status != 0:
        return StepResult(step.name, FAILED, duration, _reason(output, exit_status))
    # A line such as "SKIPPED [1] tests/gpu/test_x.py:12: REASON", and at the end, a line such as
    # "1 passed, 1 skipped in 2.34s".
    if skip := re.search(r"^SKIPPED \[\d+\] [^:]+(?::\d+)?: (.+)", output, re.MULTILINE):
        counts = output.strip().splitlines()[-1].partition(" in ")[0]
        return StepResult(step.name, SKIPPED, duration, f"{counts}: {skip[1]}")
    return StepResult(step.name, PASSED, duration)


def _reason(output: str, exit_status: int) -> str:
    """Returns the first error message in pytest's output, or else the last line.

    pytest marks an error with "E". ``test_device.py`` prints the line about a missing device.
    """
    error = re.search(r"^E +(.+)|^(no CUDA device.*)", output, re.MULTILINE)
    if error:
        return error[1] or error[2]
    *_, last_line = output.strip().splitlines() or ["no output"]
    return f"exit status {exit_status}: {last_line}"


def table(steps: Sequence[Step], results: Sequence[StepResult]) -> Table:
    """Returns a table with a row for each step."""
    rich_table = Table("step", "result", "seconds", "limit", "check, or why not passed", box=None)
    for step, result in zip(steps, results, strict=True):
        seconds = f"{result.seconds:.0f}" if result.seconds else ""
        text = escape(result.reason or step.checks)
        rich_table.add_row(step.name, result.status, seconds, f"{60 * step.minutes:.0f}", text)
    return rich_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the plan; returns 0 if each step passed or was skipped."""
    parser = argparse.ArgumentParser(description=__doc__, prog="make test-gpu ARGS=")
    parser.add_argument("steps", nargs="*", help="run only these steps and their dependencies")
    parser.add_argument("--out", type=Path, default=Path("runs/test-gpu"), help="folder of results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit of all steps")
    parser.add_argument("--on-cpu", action="store_true", help="run small versions on the CPU")
    args = parser.parse_args(arguments)
    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    steps, env = with_dependencies(args.steps), {RESULTS: str(folder)}
    if args.on_cpu:
        # Steps that depend on ``DEVICE`` still run: ``run`` ignores dependencies that are missing.
        steps = [step for step in steps if step.name != DEVICE]
        env |= {ON_CPU: "1", "CUDA_VISIBLE_DEVICES": ""}
    console = Console(soft_wrap=True)
    results = []
    for result in run(steps, folder, minutes=args.minutes, env=env):
        results.append(result)
        console.print(f"{result.name}: {result.status} {escape(result.reason)}".rstrip())
    console.print(table(steps, results))
    with (folder / "table.txt").open("w") as file:
        Console(file=file, width=160).print(table(steps, results))
    results_json = json.dumps([asdict(result) for result in results], indent=1)
    (folder / "results.json").write_text(results_json)
    console.print(f"outputs, results and traces: {folder}")
    return int(any(result.status not in (PASSED, SKIPPED) for result in results))


if __name__ == "__main__":
    sys.exit(main())
