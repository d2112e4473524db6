"""Evaluates the teacher, the pruned and the distilled model on the same held-out text.

Reads the three models and the prepared text. Writes ``results.json`` with each model's loss on each
sequence and the text that it generates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.evaluation.settings import EvaluateConfig
from recipes.planning import rules
from recipes.planning.chain import Chain, sequence_problems
from recipes.planning.inference_cost import InferenceCost, Sequences, comparison_cost
from recipes.planning.rules import Problem
from recipes.stages.contract import Stage


def check(cfg: EvaluateConfig, chain: Chain) -> Iterator[Problem]:
    """Checks the lengths of prompts and sequences, and that each rank gets a sequence or more."""
    if cfg.prompt_tokens >= cfg.seq_length:
        what = f"prompt_tokens={cfg.prompt_tokens} must be less than seq_length={cfg.seq_length}"
        yield Problem(rules.EVALUATE, what, "lower prompt_tokens")
    length = cfg.prompt_tokens + cfg.new_tokens
    positions = chain.teacher.max_position_embeddings
    if cfg.num_generations and length > positions:
        yield Problem(
            rules.LENGTH,
            f"prompt_tokens + new_tokens is {length}, but the model has {positions} positions",
            "lower new_tokens",
        )
    if cfg.num_sequences < cfg.resources.ranks:
        yield Problem(
            rules.RANKS,
            f"{cfg.name} has num_sequences={cfg.num_sequences} for {cfg.resources.ranks} ranks",
            "use at most as many ranks as sequences",
        )
    yield from sequence_problems(cfg.seq_length, cfg.inputs, chain)


def inference_cost(cfg: EvaluateConfig, chain: Chain) -> InferenceCost:
    """Estimates the cost of evaluating all models on one rank's sequences."""
    models = [chain.shape_of(cfg.inputs.get(role)) for role in ("teacher", "pruned", "distilled")]
    sequences_per_rank = cfg.num_sequences / cfg.resources.ranks
    text = Sequences(sequences_per_rank, cfg.seq_length, cfg.micro_batch_size)
    bf16 = cfg.precision == "bf16-mixed"
    cost = comparison_cost(models, bf16, text, chain.hardware)
    return replace(cost, ranks_on_node=cfg.resources.devices)  # one rank per device


def run(cfg: EvaluateConfig, inputs: Inputs, out: Path) -> Outcome:
    """Measures perplexity, KL and top-1 agreement with the teacher, in total and by text source."""
    from nemo_convert import nemo
    from recipes.evaluation.text_quality import measure

    checkpoints = {
        name: nemo.find_checkpoint(item.artifact) for name, item in inputs.items() if name != "data"
    }
    return Outcome(measure(cfg, checkpoints, inputs["data"], out, metrics_log(out)))


STAGE = Stage(
    config=EvaluateConfig,
    kind="eval_results",
    run=run,
    check=check,
    inference_cost=inference_cost,
    inputs={
        "teacher": ("checkpoint_nemo",),
        "pruned": ("checkpoint_nemo",),
        "distilled": ("checkpoint_nemo",),
        "data": ("dataset",),
    },
)
