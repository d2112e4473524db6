"""Evaluates the teacher, the pruned and the distilled model on benchmark items with lm-eval.

Reads the three models, and the students that ``distill`` saved at ``student_steps``. Writes each
model's answers to all items. The items are divided among the ranks.
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
    roles = ("teacher", "pruned", "distilled")
    teacher, pruned, distilled = (chain.shape_of(cfg.inputs.get(role)) for role in roles)
    distill = chain.stages.get(cfg.inputs.get("distilled", ""))
    # Students of earlier steps are evaluated like the final one.
    num_earlier = len(distill.student_steps) if isinstance(distill, DistillConfig) else 0
    models = (teacher, pruned, distilled, *[distilled] * num_earlier)
    bf16 = cfg.precision == "bf16-mixed"
    tokens, generations = task_tokens(cfg)
    cost = benchmark_cost(models, bf16, tokens, cfg.pack_tokens, chain.hardware, generations)
    return replace(cost, ranks_on_node=cfg.resources.devices, keeps_answers=True)


def run(cfg: EvaluateTasksConfig, inputs: Inputs, out: Path) -> Outcome:
    """Evaluates the models one after the other, and compares their answers item by item."""
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
