"""Scores the importance of channels, heads and layers by forward passes.

Reads a NeMo checkpoint and calibration text. Writes ``importance.json`` and
``importance.safetensors``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log, rank
from recipes.planning import rules
from recipes.planning.chain import Chain, sequence_problems
from recipes.planning.inference_cost import InferenceCost, Sequences, ablation_passes, scoring_cost
from recipes.planning.rules import Problem
from recipes.pruning.results import ScoreResult
from recipes.pruning.settings import PruneConfig, ScoreConfig
from recipes.stages.contract import Stage


def resolve_from_chain(cfg: ScoreConfig, chain: Chain) -> ScoreConfig:
    """Sets ``block_sizes``, if it is ``None``, to the numbers of layers that this run drops."""
    if cfg.block_sizes is not None:
        return cfg
    drop_counts = {
        chain.shape_of(prune.inputs.get("checkpoint")).num_layers - chain.shape_of(name).num_layers
        for name, prune in chain.stages.items()
        if isinstance(prune, PruneConfig)
        and prune.inputs.get("importance") == cfg.name
        and prune.layer_importance == "block"
        and not prune.drop_layers  # layers listed by the user need no scores
    }
    return replace(cfg, block_sizes=sorted(count for count in drop_counts if count > 0))


def check(cfg: ScoreConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of the sequences, of the blocks to ablate and of the ranks."""
    yield from sequence_problems(cfg.seq_length, cfg.inputs, chain)
    layers = chain.shape_of(cfg.inputs.get("checkpoint")).num_layers
    blocks = resolve_from_chain(cfg, chain).block_sizes or []
    if blocks and (max(blocks) >= layers or not cfg.num_loss_samples):
        yield Problem(
            rules.CALIBRATION,
            f"block_sizes={blocks} cannot be measured with "
            f"num_loss_samples={cfg.num_loss_samples} and {layers} layers",
            f"remove fewer than {layers} layers, and set num_loss_samples to at least 1",
        )
    ranks, pipeline_size = cfg.resources.ranks, cfg.pipeline_model_parallel_size
    data_ranks = ranks // pipeline_size
    batches = math.ceil(cfg.num_calibration_samples / cfg.micro_batch_size)
    if ranks % pipeline_size != 0 or pipeline_size > layers:
        yield Problem(
            rules.RANKS,
            f"{cfg.name} has {ranks} rank(s), pipeline_model_parallel_size={pipeline_size} and "
            f"{layers} layers",
            "set pipeline_model_parallel_size to at most the number of layers, and "
            "resources.devices to a multiple of it",
        )
    elif batches < data_ranks:
        yield Problem(
            rules.RANKS,
            f"{cfg.name} splits {batches} micro batch(es) over {data_ranks} data-parallel ranks",
            f"use at most {batches * pipeline_size} ranks, a smaller micro_batch_size, or more "
            "num_calibration_samples",
        )


def inference_cost(cfg: ScoreConfig, chain: Chain) -> InferenceCost:
    """Estimates the cost of forward passes over calibration text, with and without ablations."""
    model = chain.shape_of(cfg.inputs.get("checkpoint"))
    block_sizes = resolve_from_chain(cfg, chain).block_sizes or []
    data_ranks = max(1, cfg.resources.ranks // cfg.pipeline_model_parallel_size)
    # Each data-parallel rank gets the same fraction of the sequences and of the ablations.
    sequences = cfg.num_calibration_samples / data_ranks
    text = Sequences(sequences, cfg.seq_length, cfg.micro_batch_size)
    ablations = ablation_passes(model.num_layers, cfg.num_loss_samples, block_sizes) / data_ranks
    bf16, pipeline_size = cfg.precision == "bf16-mixed", cfg.pipeline_model_parallel_size
    cost = scoring_cost(model, bf16, text, chain.hardware, pipeline_size, ablations)
    return replace(cost, ranks_on_node=cfg.resources.devices)


def run(cfg: ScoreConfig, inputs: Inputs, out: Path) -> Outcome:
    """Runs the forward passes and saves the scores."""
    from nemo_convert import nemo
    from recipes.pruning.scoring import calibration_text, score_checkpoint

    checkpoint = nemo.find_checkpoint(inputs["checkpoint"].artifact)
    text = calibration_text(cfg, inputs["calibration"], checkpoint)
    importance = score_checkpoint(cfg, checkpoint, text, metrics_log(out))
    if rank() == 0:
        importance.save(out)
    result = ScoreResult(
        calibration=cfg.calibration,
        calibration_sequences=len(text),
        calibration_tokens=text.tokens.numel(),
        teacher_loss=importance.teacher_loss,
        layer_importance=importance.layers,
        loss_predictions=text.first(cfg.loss_sequences).predictions,
    )
    return Outcome(result)


STAGE = Stage(
    config=ScoreConfig,
    kind="importance",
    run=run,
    check=check,
    inference_cost=inference_cost,
    resolve_from_chain=resolve_from_chain,
    inputs={"checkpoint": ("checkpoint_nemo",), "calibration": ("dataset",)},
)
