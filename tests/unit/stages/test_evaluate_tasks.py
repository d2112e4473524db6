"""Tests ``evaluate_tasks``: its checks, the config group ``tasks``, and the console's headline."""

from __future__ import annotations

import importlib.util
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launch.console import headline
from recipes.evaluation import task_checks
from recipes.evaluation.offline_tasks import TASKS
from recipes.evaluation.results import TaskResults
from recipes.evaluation.settings import HARNESS, EvaluateTasksConfig
from recipes.evaluation.task_checks import task_problems
from tests.support.manifests import bare_manifest
from tests.support.results import RESULTS

if TYPE_CHECKING:
    from recipes.planning.chain import Chain
    from tests.unit.conftest import MakePlan

VALID_SETTINGS = {"tasks": ["sciq", "mmlu"]}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"limit": None, "num_fewshot": {"mmlu": 5}}, []),
        ({"source": "hub", "tasks": ["winogrande"]}, []),
        ({"tasks": ["sciqq"]}, ["tasks-names"]),
        ({"tasks": ["sciq", "sciq"]}, ["tasks-names"]),
        ({"revisions": {"sciq": "abc"}}, ["tasks-names"]),  # only allowed with source=hub
        ({"num_fewshot": {"piqa": 5}}, []),  # a known task, although ``tasks`` lacks it
        ({"num_fewshot": {"piqaa": 5}}, ["tasks-fewshot"]),
        ({"num_fewshot": {"mmlu": 6}}, ["tasks-fewshot"]),  # has 5 examples
    ],
)
def test_invalid_tasks_break_a_rule(
    chain: Chain, fields: dict[str, Any], expected: list[str]
) -> None:
    cfg = EvaluateTasksConfig(**{**VALID_SETTINGS, **fields})
    assert [problem.rule.name for problem in task_problems(cfg, chain)] == expected


def test_the_verified_version_of_lm_eval_must_be_installed(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_checks.metadata, "version", lambda name: "0.3.0")
    [problem] = task_problems(EvaluateTasksConfig(**VALID_SETTINGS), chain)
    assert "0.3.0" in problem.what
    assert HARNESS in problem.what
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [problem] = task_problems(EvaluateTasksConfig(**VALID_SETTINGS), chain)
    assert "./install.sh" in problem.fix


def test_lm_eval_is_pinned_to_the_verified_version(root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert f"lm_eval[api,hf]=={HARNESS}" in extras["tasks"]
    # Extras of this project that ``dev`` includes, such as "nemo-recipes[tasks]".
    included = [line for line in extras["dev"] if line.startswith("nemo-recipes[")]
    assert any("tasks" in line for line in included)


@pytest.mark.parametrize("tasks", ["null", "quick", "full"])
def test_the_group_tasks_adds_or_removes_the_benchmarks(plan: MakePlan, tasks: str) -> None:
    stages = {stage.name: stage for stage in plan(f"tasks={tasks}").stages}
    has_tasks = tasks != "null"
    assert ("evaluate_tasks" in stages) == has_tasks
    for name in ("report", "export_hf"):
        assert ("tasks" in stages[name].inputs) == has_tasks
    if has_tasks:
        config = stages["evaluate_tasks"].config
        assert isinstance(config, EvaluateTasksConfig)
        assert set(config.tasks) <= TASKS.keys()


@pytest.mark.parametrize(
    ("names", "expected_text"),
    [
        # The means of sciq and piqa, for example (0.845 + 0.680) / 2 for the teacher.
        (("sciq", "piqa", "lambada"), "0.762 → 0.483 → 0.718"),
        (("lambada",), "lambada evaluated"),
    ],
)
def test_headline_is_the_mean_of_only_those_scores_that_are_fractions(
    names: tuple[str, ...], expected_text: str
) -> None:
    """The score of lambada is a perplexity, which cannot be averaged with accuracies."""
    results: TaskResults = RESULTS["evaluate_tasks"]
    tasks = {name: results.tasks[name] for name in names}
    manifest = bare_manifest("evaluate_tasks", "task_results", replace(results, tasks=tasks))
    assert expected_text in headline(manifest)
