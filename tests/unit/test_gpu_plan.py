"""The half hour on a GPU: order, limits, what stands on what, the table."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.gpu import plan
from tests.gpu.plan import DEVICE, FAILED, NOT_REACHED, PASSED, STEPS, TOO_LONG, Done, Step

CODES = {
    "good": "print('fine')",
    "bad": "print('E   assert 1 == 2'); raise SystemExit(1)",
    "dead": "import os; os.abort()",
    "slow": "import os; os.system('sleep 600')",
}


def step(name: str, *after: str, seconds: float = 300) -> Step:
    return Step(name, CODES[name.rstrip("0123456789")], seconds / 60, "something", after)


def run(folder: Path, *steps: Step, minutes: float = 10) -> list[Done]:
    def command(step: Step) -> list[str]:
        return [sys.executable, "-c", step.test]

    return list(plan.run(steps, folder, command, minutes))


def test_one_that_fails_stops_only_those_that_stand_on_it(tmp_path: Path) -> None:
    steps = (step("bad"), step("good1", "bad"), step("good2", "good1"), step("good3"), step("dead"))
    found = run(tmp_path, *steps)
    assert [done.name for done in found] == [step.name for step in steps]
    assert [done.result for done in found] == [FAILED, NOT_REACHED, NOT_REACHED, PASSED, FAILED]
    assert [done.why for done in found[:3]] == ["assert 1 == 2", "stands on bad", "stands on good1"]
    assert found[4].why.startswith("exit status -6")
    assert (tmp_path / "good3.log").read_text() == "fine\n"
    screen = Console(width=100, file=io.StringIO())
    screen.print(plan.table(steps, found))
    assert ["good1", "not", "reached", "300", "stands", "on", "bad"] in [
        line.split() for line in screen.file.getvalue().splitlines()
    ]


def test_a_step_ends_at_its_limit_and_all_of_them_at_theirs(tmp_path: Path) -> None:
    found = run(tmp_path, step("slow", seconds=0.5), step("good"))
    assert [done.result for done in found] == [TOO_LONG, PASSED]
    late = run(tmp_path, step("slow"), step("good"), minutes=0.5 / 60)
    assert [done.result for done in late] == [TOO_LONG, NOT_REACHED]
    assert late[1].why == "the 0.00833333 minutes were over"


def test_a_device_comes_before_all_that_need_one() -> None:
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    for number, one in enumerate(STEPS):
        assert set(one.after) <= set(names[:number]), one.name
    without = [one.name for one in STEPS if DEVICE not in one.after]
    assert without == ["imports", "reference", "rehearsal", DEVICE]
    assert [one.name for one in plan.chosen(["killed"])] == [
        "imports", "reference", DEVICE, "training", "killed"
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="there is no step 'loose'"):
        plan.chosen(["loose"])


def test_every_test_on_a_gpu_is_in_the_plan() -> None:
    listed = {step.test for step in STEPS}
    for file in plan.HERE.glob("test_*.py"):
        tests = {
            node.name
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
        named = {test.partition("::")[2] for test in listed if test.startswith(file.name)}
        assert named in ({""}, tests), file.name


def test_no_device_is_said_in_a_line(tmp_path: Path) -> None:
    log = "F\nno CUDA device: PyTorch 2.13.0+cpu was built without CUDA\nFAILED x.py - no\n"
    assert plan._reason(log, 1) == "no CUDA device: PyTorch 2.13.0+cpu was built without CUDA"
