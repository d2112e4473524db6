"""Evaluates the teacher, the pruned and the distilled model on benchmark items with lm-eval.

Reads the three models, and students that were saved before the end of the training. Writes the
answers to all items. The items are divided among the ranks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.distillation.settings import DistillConfig
from recipes.evaluation.settings import EvaluateTasksConfig
from recipes.evaluation.task_checks import task_problems, task_tokens
from recipes.planning.chain import Chain
from recipes.planning.inference_cost import InferenceCost, benchmark_cost
from recipes.stages.contract import Stage


def inference_cost(cfg: EvaluateTasksConfig, chain: Chain) -> InferenceCost:
    """Estimates the cost of running all models on one rank's items."""
    pruned, distilled = (chain.shape_of(cfg.inputs.get(role)) for role in ("pruned", "distilled"))
    distill = chain.stages.get(cfg.inputs.get("distilled", ""))
    steps = len(distill.student_steps) if isinstance(distill, DistillConfig) else 0
    models = (chain.teacher, pruned, *[distilled] * (1 + steps))
    bf16 = cfg.precision == "bf16-mixed"
    # ``width``: tokens of a forward pass.
    (tokens, generations), width = task_tokens(cfg), cfg.pack_tokens
    cost = benchmark_cost(models, bf16, tokens, width, chain.hardware, generations)
    return replace(cost, keeps_answers=True)


def run(cfg: EvaluateTasksConfig, inputs: Inputs, out: Path) -> Outcome:
    """Evaluates the models in turn, and compares them item by item."""
    from recipes.evaluation.task_scores import score

    return Outcome(score(cfg, inputs, out, metrics_log(out)))


STAGE = Stage(
    config=EvaluateTasksConfig,
    kind="task_results",
    run=run,
    check=task_problems,
    inference_cost=inference_cost,
    inputs={
        "teacher": ("checkpoint_nemo",),
        "pruned": ("checkpoint_nemo",),
        "distilled": ("checkpoint_nemo",),
    },
)
