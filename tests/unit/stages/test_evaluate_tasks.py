"""Preflight of the benchmarks, and how they come into a recipe."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launch.console import headline
from launch.plan import Plan
from recipes.core.manifest import read_manifest
from recipes.evaluation.offline_tasks import NAMES, spec
from recipes.evaluation.settings import HARNESS, EvaluateTasksConfig
from recipes.stages import evaluate_tasks

if TYPE_CHECKING:
    from recipes.planning.chain import Chain

GOOD = {"tasks": ["sciq", "mmlu"]}


def rules(chain: Chain, **fields: Any) -> list[str]:
    return [
        p.rule.name for p in evaluate_tasks.check(EvaluateTasksConfig(**{**GOOD, **fields}), chain)
    ]


def test_good_settings_have_no_problem(chain: Chain) -> None:
    assert rules(chain) == []
    assert rules(chain, limit=None, num_fewshot={"mmlu": 5}) == []
    assert rules(chain, source="hub", tasks=["winogrande"]) == []


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"tasks": ["sciqq"]}, "tasks-names"),
        ({"tasks": ["sciq", "sciq"]}, "tasks-names"),
        ({"num_fewshot": {"piqa": 5}}, "tasks-fewshot"),
    ],
)
def test_bad_settings_are_found(chain: Chain, fields: dict[str, Any], rule: str) -> None:
    assert rules(chain, **fields) == [rule]


def test_a_mistyped_task_gets_the_nearest_name(chain: Chain) -> None:
    [problem] = evaluate_tasks.check(EvaluateTasksConfig(tasks=["hellaswg"]), chain)
    assert "Did you mean 'hellaswag'?" in problem.what


def test_a_missing_harness_is_one_message_with_the_fix(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [problem] = evaluate_tasks.check(EvaluateTasksConfig(**GOOD), chain)
    assert "lm-eval, which is not installed" in problem.what
    assert 'pip install -e ".[tasks]"' in problem.fix
    assert "tasks=null" in problem.fix


def test_another_harness_is_refused(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_tasks.metadata, "version", lambda name: "0.3.0")
    [problem] = evaluate_tasks.check(EvaluateTasksConfig(**GOOD), chain)
    assert f"lm-eval is 0.3.0; {HARNESS} is needed" in problem.what


def test_the_harness_is_pinned_to_the_version_that_is_checked_for(root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras["tasks"] == [f"lm_eval[hf]=={HARNESS}"]
    assert any("tasks" in extra for extra in extras["dev"] if extra.startswith("nemo-recipes["))


@pytest.mark.parametrize("recipe", ["llama_depth_prune", "llama_width_prune"])
@pytest.mark.parametrize("tasks", ["null", "quick", "full"])
def test_tasks_are_chosen(plan: Callable[..., Plan], recipe: str, tasks: str) -> None:
    stages = {s.name: s for s in plan(f"tasks={tasks}", recipe=f"recipe={recipe}").stages}
    assert ("evaluate_tasks" in stages) == (tasks != "null")
    for reader in ("report", "export_hf"):
        assert ("tasks" in stages[reader].inputs) == (tasks != "null")
    if tasks != "null":
        config = stages["evaluate_tasks"].config
        assert isinstance(config, EvaluateTasksConfig)
        assert set(config.tasks) <= set(NAMES)
        assert all(spec(name) for name in config.tasks)


def test_benchmarks_are_on_by_default(compose: Callable[..., Any]) -> None:
    for recipe in ("llama_depth_prune", "llama_width_prune"):
        assert compose(f"recipe={recipe}").stages.evaluate_tasks.limit == 100


def test_headline_is_the_mean_score(
    plan: Callable[..., Plan], complete: Callable[..., None]
) -> None:
    complete(plan("tasks=quick"))
    manifest = read_manifest(plan("tasks=quick").run_dir / "evaluate_tasks")
    assert manifest is not None
    assert headline(manifest) == "mean score 0.800 → 0.500 → 0.700"
