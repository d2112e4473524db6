"""Tests the checks of ``evaluate_tasks``, the config group ``tasks``, and the result's headline."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launch.console import headline
from launch.plan import Plan
from recipes.evaluation import task_checks
from recipes.evaluation.offline_tasks import TASKS
from recipes.evaluation.results import TaskResults
from recipes.evaluation.settings import HARNESS, EvaluateTasksConfig
from recipes.evaluation.task_checks import task_problems
from tests.support.manifests import bare_manifest
from tests.support.results import RESULTS

if TYPE_CHECKING:
    from recipes.planning.chain import Chain

GOOD = {"tasks": ["sciq", "mmlu"]}


def rule_names(chain: Chain, **fields: Any) -> list[str]:
    cfg = EvaluateTasksConfig(**{**GOOD, **fields})
    return [problem.rule.name for problem in task_problems(cfg, chain)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"limit": None, "num_fewshot": {"mmlu": 5}}, []),
        ({"source": "hub", "tasks": ["winogrande"]}, []),
        ({"tasks": ["sciqq"]}, ["tasks-names"]),
        ({"tasks": ["sciq", "sciq"]}, ["tasks-names"]),
        ({"revisions": {"sciq": "abc"}}, ["tasks-names"]),
        ({"num_fewshot": {"piqa": 5}}, []),
        ({"num_fewshot": {"piqaa": 5}}, ["tasks-fewshot"]),
    ],
)
def test_invalid_tasks_break_a_rule(
    chain: Chain, fields: dict[str, Any], expected: list[str]
) -> None:
    assert rule_names(chain, **fields) == expected


def test_the_verified_version_of_lm_eval_must_be_installed(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_checks.metadata, "version", lambda name: "0.3.0")
    [problem] = task_problems(EvaluateTasksConfig(**GOOD), chain)
    assert "0.3.0" in problem.what
    assert HARNESS in problem.what
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [problem] = task_problems(EvaluateTasksConfig(**GOOD), chain)
    assert "./install.sh" in problem.fix


def test_lm_eval_is_pinned_to_the_verified_version(root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert f"lm_eval[api,hf]=={HARNESS}" in extras["tasks"]
    assert any("tasks" in extra for extra in extras["dev"] if extra.startswith("nemo-recipes["))


@pytest.mark.parametrize("recipe", ["llama_depth_prune", "llama_width_prune"])
@pytest.mark.parametrize("tasks", ["null", "quick", "full"])
def test_tasks_are_chosen_on_the_command_line(
    plan: Callable[..., Plan], recipe: str, tasks: str
) -> None:
    stages = {s.name: s for s in plan(f"tasks={tasks}", recipe=f"recipe={recipe}").stages}
    assert ("evaluate_tasks" in stages) == (tasks != "null")
    for name in ("report", "export_hf"):
        assert ("tasks" in stages[name].inputs) == (tasks != "null")
    if tasks != "null":
        config = stages["evaluate_tasks"].config
        assert isinstance(config, EvaluateTasksConfig)
        assert set(config.tasks) <= TASKS.keys()


@pytest.mark.parametrize(
    ("names", "scores"),
    [(("sciq", "piqa", "lambada"), "0.762 → 0.483 → 0.718"), (("lambada",), "lambada")],
)
def test_headline_is_the_mean_of_only_those_scores_that_are_fractions(
    names: tuple[str, ...], scores: str
) -> None:
    """A mean of accuracies and a perplexity would have no meaning."""
    results: TaskResults = RESULTS["evaluate_tasks"]
    tasks = {name: results.tasks[name] for name in names}
    manifest = bare_manifest("evaluate_tasks", "task_results", replace(results, tasks=tasks))
    assert scores in headline(manifest)
