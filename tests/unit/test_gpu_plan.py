"""Tests ``tests.gpu.plan``, which runs the GPU tests: order, limits, dependencies and table."""

from __future__ import annotations

import ast
import io
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from tests.gpu import plan
from tests.gpu.plan import (
    DEVICE,
    FAILED,
    NOT_RUN,
    PASSED,
    SKIPPED,
    STEPS,
    TIMEOUT,
    Step,
    StepResult,
)

PROGRAMS = {  # Python code that runs in place of a step's tests
    "good": "print('fine')",
    "bad": "print('E   assert 1 == 2'); raise SystemExit(1)",
    "dead": "import os; os.abort()",
    "slow": "import os; os.system('sleep 600')",  # its child process must be killed, too
}


def step(name: str, *after: str, seconds: float = 300) -> Step:
    """Returns a step that runs one of ``PROGRAMS``: "good1" and "good2" both run "good".

    Args:
        name: Key of ``PROGRAMS``, followed by digits if a test needs several such steps.
        after: Names of the steps that this step depends on.
        seconds: Time limit.
    """
    program = PROGRAMS[name.rstrip("0123456789")]
    return Step(name, tests=program, minutes=seconds / 60, checks="something", after=after)


def run(folder: Path, *steps: Step, minutes: float = 10) -> list[StepResult]:
    """Runs steps with a time limit of all together; writes their outputs to ``folder``."""

    def command(step: Step) -> list[str]:
        return [sys.executable, "-c", step.tests]

    return list(plan.run(steps, folder, command, minutes))


def test_a_failure_skips_only_the_steps_that_depend_on_it(tmp_path: Path) -> None:
    steps = (step("bad"), step("good1", "bad"), step("good2", "good1"), step("good3"), step("dead"))
    results = run(tmp_path, *steps)
    assert [result.name for result in results] == [step.name for step in steps]
    assert [result.status for result in results] == [FAILED, NOT_RUN, NOT_RUN, PASSED, FAILED]
    reasons = [result.reason for result in results]
    assert reasons[0] == "assert 1 == 2"
    not_run = [f"depends on {name}, which did not pass" for name in ("bad", "good1")]
    assert reasons[1:3] == not_run
    assert reasons[4].startswith("exit status -6")  # SIGABRT
    assert (tmp_path / "good3.log").read_text() == "fine\n"
    output = io.StringIO()
    Console(width=100, file=output).print(plan.table(steps, results))
    words_by_row = [line.split() for line in output.getvalue().splitlines()]
    # Name, status, time limit in seconds, and reason.
    assert ["good1", "not", "run", "300", *not_run[0].split()] in words_by_row


def test_each_step_and_the_whole_plan_have_time_limits(tmp_path: Path) -> None:
    results = run(tmp_path, step("slow", seconds=0.5), step("good"))
    assert [result.status for result in results] == [TIMEOUT, PASSED]
    results = run(tmp_path, step("slow"), step("good"), minutes=0.5 / 60)
    assert [result.status for result in results] == [TIMEOUT, NOT_RUN]
    assert results[1].reason == "the 0.00833333 minutes were over"


def test_steps_come_after_their_dependencies() -> None:
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    for index, item in enumerate(STEPS):
        assert set(item.after) <= set(names[:index]), item.name
    # A step that needs no GPU comes directly before the first step that depends on it.
    for item, next_item in pairwise(STEPS):
        assert DEVICE in item.after or item.name in next_item.after, item.name
    assert [item.name for item in plan.with_dependencies(["killed"])] == [
        "imports", DEVICE, "reference", "training", "killed"
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="there is no step 'loose'"):
        plan.with_dependencies(["loose"])


def test_the_first_ten_minutes_include_layers_of_transformer_engine() -> None:
    """The sum of the time limits of all steps up to ``layers`` is at most ten minutes."""
    index = [item.name for item in STEPS].index("layers")
    assert sum(item.minutes for item in STEPS[: index + 1]) <= 10


def test_every_test_on_a_gpu_is_in_exactly_one_step() -> None:
    node_ids = [
        f"{file.name}::{node.name}"
        for file in plan.HERE.glob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert sorted(node_ids) == sorted(node for step in STEPS for node in step.nodes())


def test_the_line_about_a_missing_device_is_the_reason_of_a_failure() -> None:
    log = "F\nno CUDA device: PyTorch 2.13.0+cpu was built without CUDA\nFAILED x.py - no\n"
    reason = plan._reason(log, exit_status=1)
    assert reason == "no CUDA device: PyTorch 2.13.0+cpu was built without CUDA"


def test_a_step_with_a_skipped_test_is_not_passed(tmp_path: Path) -> None:
    """In place of the tests of a real step, its pytest command runs a file of two tests."""
    test_file = tmp_path / "test_skip.py"
    test_file.write_text(
        "import pytest\ndef test_it():\n    pytest.importorskip('no_such_module')\n"
        "def test_other():\n    pass\n"
    )

    def command(step: Step) -> list[str]:
        real_command = plan.pytest_command(step)  # ends with the step's tests
        without_tests = real_command[: -len(step.nodes())]
        return [*without_tests, "--rootdir", str(tmp_path), str(test_file)]

    [result] = plan.run([STEPS[0]], tmp_path, command)
    assert result.status == SKIPPED
    assert result.reason.startswith("1 passed, 1 skipped: could not import 'no_such_module'")
