"""Tests the runner of the GPU tests: order, time limits, dependencies and the table."""

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

CODES = {  # programs that run in place of a step's tests
    "good": "print('fine')",
    "bad": "print('E   assert 1 == 2'); raise SystemExit(1)",
    "dead": "import os; os.abort()",
    "slow": "import os; os.system('sleep 600')",  # its child process must be killed, too
}


def step(name: str, *after: str, seconds: float = 300) -> Step:
    """Returns a step that runs code of ``CODES``, whose key is the name without digits."""
    code = CODES[name.rstrip("0123456789")]
    return Step(name, tests=code, minutes=seconds / 60, checks="something", after=after)


def run(folder: Path, *steps: Step, minutes: float = 10) -> list[StepResult]:
    def command(step: Step) -> list[str]:
        return [sys.executable, "-c", step.tests]

    return list(plan.run(steps, folder, command, minutes))


def test_a_failure_skips_only_the_steps_that_depend_on_it(tmp_path: Path) -> None:
    steps = (step("bad"), step("good1", "bad"), step("good2", "good1"), step("good3"), step("dead"))
    results = run(tmp_path, *steps)
    assert [result.name for result in results] == [step.name for step in steps]
    assert [result.status for result in results] == [FAILED, NOT_RUN, NOT_RUN, PASSED, FAILED]
    reasons = [result.reason for result in results]
    assert reasons[:3] == ["assert 1 == 2", "depends on bad", "depends on good1"]
    assert reasons[4].startswith("exit status -6")  # SIGABRT
    assert (tmp_path / "good3.log").read_text() == "fine\n"
    screen = Console(width=100, file=io.StringIO())
    screen.print(plan.table(steps, results))
    assert ["good1", "not", "run", "300", "depends", "on", "bad"] in [
        line.split() for line in screen.file.getvalue().splitlines()
    ]


def test_each_step_and_the_whole_plan_have_time_limits(tmp_path: Path) -> None:
    results = run(tmp_path, step("slow", seconds=0.5), step("good"))
    assert [result.status for result in results] == [TIMEOUT, PASSED]
    stopped = run(tmp_path, step("slow"), step("good"), minutes=0.5 / 60)
    assert [result.status for result in stopped] == [TIMEOUT, NOT_RUN]
    assert stopped[1].reason == "the 0.00833333 minutes were over"


def test_steps_come_after_their_dependencies() -> None:
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    for index, item in enumerate(STEPS):
        assert set(item.after) <= set(names[:index]), item.name
    for item, following in pairwise(STEPS):  # a step without a GPU comes as late as possible
        assert DEVICE in item.after or item.name in following.after, item.name
    assert [item.name for item in plan.with_dependencies(["killed"])] == [
        "imports", DEVICE, "reference", "training", "killed"
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="there is no step 'loose'"):
        plan.with_dependencies(["loose"])


def test_the_first_ten_minutes_include_layers_of_transformer_engine() -> None:
    index = [item.name for item in STEPS].index("layers")
    assert sum(item.minutes for item in STEPS[: index + 1]) <= 10


def test_every_test_on_a_gpu_is_in_the_plan() -> None:
    tests = [
        f"{file.name}::{node.name}"
        for file in plan.HERE.glob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert sorted(tests) == sorted(node for step in STEPS for node in step.nodes())


def test_the_line_about_a_missing_device_is_the_reason_of_a_failure() -> None:
    log = "F\nno CUDA device: PyTorch 2.13.0+cpu was built without CUDA\nFAILED x.py - no\n"
    assert plan._reason(log, 1) == "no CUDA device: PyTorch 2.13.0+cpu was built without CUDA"


def test_a_step_with_a_skipped_test_is_not_passed(tmp_path: Path) -> None:
    test = tmp_path / "test_skip.py"
    test.write_text(
        "import pytest\ndef test_it():\n    pytest.importorskip('no_such_module')\n"
        "def test_other():\n    pass\n"
    )

    def command(step: Step) -> list[str]:
        program, *options = plan.pytest_command(step)
        return [program, *options[: -len(step.nodes())], "--rootdir", str(tmp_path), str(test)]

    [result] = plan.run([STEPS[0]], tmp_path, command)
    assert result.status == SKIPPED
    assert result.reason.startswith("1 passed, 1 skipped: could not import 'no_such_module'")
