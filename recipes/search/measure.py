"""Measures the quality of candidate shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from nemo_convert import nemo
from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import with_shape
from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog, ProgressCallback
from recipes.core.precision import dtype_of
from recipes.core.stage import Inputs
from recipes.data.token_sequences import TextSequences, read_sequences
from recipes.evaluation.predictions import FinalStates, Predictor, compute_states
from recipes.evaluation.results import TokenQuality
from recipes.evaluation.text_quality import load_transformers, token_quality, with_weights
from recipes.pruning.healing import heal_weights
from recipes.pruning.kept import (
    Importance,
    importance_of,
    layers_to_keep,
    leading_submatrix,
    prune_weight,
    select_indices,
    sort_indices,
)
from recipes.pruning.pruned_checkpoint import prune_weights
from recipes.search.results import Candidate
from recipes.search.settings import RankCandidatesConfig
from recipes.search.space import name_of


def measure_shapes(
    cfg: RankCandidatesConfig, inputs: Inputs, shapes: list[Architecture], log: MetricsLog
) -> list[Candidate]:
    """Measures every pruned shape; heals the best ones by least squares and measures them again.

    Returns:
        A candidate for each shape, in the same order.
    """
    teacher = nemo.find_checkpoint(inputs["checkpoint"].artifact)
    importance = importance_of(inputs)
    data, seq_length = inputs["data"], cfg.seq_length
    text = read_sequences(data, "validation", seq_length, cfg.num_samples)
    calibration = read_sequences(data, "calibration", seq_length, cfg.num_calibration_samples)
    batches = calibration.tokens.split(cfg.micro_batch_size)
    teacher_states, candidates = _measure_pruned(cfg, teacher, importance, shapes, text, log)
    best = sorted(candidates, key=lambda candidate: candidate.proxy)[: cfg.num_healed]
    for number, candidate in enumerate(best):
        shape = candidate.shape

        # ``done`` and ``total`` count the layers of this shape; the log counts those of all shapes.
        # The default value binds the loop's variable at once.
        def progress(done: int, total: int, shapes_done: int = number) -> None:
            log.progress("heal", shapes_done * total + done, len(best) * total)

        model = Predictor.of(_heal(cfg, teacher, importance, shape, batches, progress))
        states = compute_states(model, text, cfg.micro_batch_size)
        quality = token_quality(teacher_states, states, text)
        candidates[candidates.index(candidate)] = _candidate(cfg, shape, quality, healed=True)
        del model, states  # frees memory before the next shape is healed
    return candidates


def _measure_pruned(
    cfg: RankCandidatesConfig,
    teacher: Path,
    importance: Importance,
    shapes: list[Architecture],
    text: TextSequences,
    log: MetricsLog,
) -> tuple[FinalStates, list[Candidate]]:
    """Returns the teacher's hidden states on the text, and every pruned shape as a candidate."""
    teacher_shape = nemo.architecture_of(teacher)
    # Selected before the first measurement, because missing scores are an error.
    kept_layers = [layers_to_keep(importance, cfg.layer_importance, s.num_layers) for s in shapes]
    model = load_transformers(teacher, dtype_of(cfg.precision))
    sorted_model = SortedModel(model, teacher_shape, importance.widths)
    all_layers = range(1, teacher_shape.num_layers + 1)
    unpruned = sorted_model.predictor(teacher_shape, all_layers)
    teacher_states = compute_states(unpruned, text, cfg.micro_batch_size)
    candidates = []
    for number, (shape, layers) in enumerate(zip(shapes, kept_layers, strict=True), 1):
        states = compute_states(sorted_model.predictor(shape, layers), text, cfg.micro_batch_size)
        quality = token_quality(teacher_states, states, text)
        candidates.append(_candidate(cfg, shape, quality, healed=False))
        log.progress("rank", number, len(shapes))
    return teacher_states, candidates


def _heal(
    cfg: RankCandidatesConfig,
    teacher: Path,
    importance: Importance,
    shape: Architecture,
    batches: Sequence[Tensor],
    progress: ProgressCallback,
) -> PreTrainedModel:
    """Prunes the teacher to a shape and heals the pruned model by least squares."""
    layers = layers_to_keep(importance, cfg.layer_importance, shape.num_layers)
    kept = select_indices(importance.widths, nemo.architecture_of(teacher), shape, layers)
    weights = prune_weights(teacher, kept, shape.kv_channels)
    heal_weights(teacher, shape, kept, weights, batches, progress)
    config = AutoConfig.for_model(**with_shape(nemo.read_config(teacher), shape))
    return with_weights(config, weights.items(), dtype_of(cfg.precision))


def _candidate(
    cfg: RankCandidatesConfig, shape: Architecture, quality: TokenQuality, healed: bool
) -> Candidate:
    """Returns a shape with its quality.

    Raises:
        RecipeError: The metric ``cfg.proxy`` is NaN, which cannot be ranked.
    """
    proxy = float(getattr(quality, cfg.proxy))
    if math.isnan(proxy):
        state, setting = ("reconstructed", "num_healed=0") if healed else ("pruned", "precision=32")
        raise RecipeError(
            f"{cfg.proxy} of the {state} candidate {name_of(shape)} is not a number.",
            f"set stages.rank_candidates.{setting}",
        )
    return Candidate(
        name=name_of(shape),
        parameters=shape.parameters(),
        shape=shape,
        proxy=proxy,
        perplexity=quality.perplexity,
        kl_to_teacher=quality.kl_to_teacher,
        healed=healed,
    )


class SortedModel:
    """A transformers model that can take any smaller shape.

    The rows and columns of each weight are sorted by importance. So a pruned weight is a slice, the
    first rows and columns, which needs no copy. ``model`` is the teacher; its weights and layers
    are replaced in place. ``scores`` are the teacher's ``Importance.widths``.
    """

    def __init__(
        self, model: PreTrainedModel, teacher_shape: Architecture, scores: dict[str, Tensor]
    ) -> None:
        self._model, self._teacher_shape = model, teacher_shape
        self._layers = list(model.model.layers)
        # For each weight: the name, the parameter, which gets slices, and the whole sorted weight.
        self._weights: list[tuple[str, torch.nn.Parameter, Tensor]] = []
        order = sort_indices(scores, teacher_shape)
        for name, parameter in model.named_parameters():
            # ``order`` has all indices, so ``prune_weight`` removes nothing and only sorts.
            parameter.data = prune_weight(name, parameter.data, order, teacher_shape.kv_channels)
            self._weights.append((name, parameter, parameter.data))

    def predictor(self, shape: Architecture, layers: Iterable[int]) -> Predictor:
        """Gives the model a shape and only these layers, counted from 1, and returns its predictor.

        Invalidates earlier predictors, because every call changes the same model.
        """
        for name, parameter, weight in self._weights:
            parameter.data = leading_submatrix(name, weight, shape, self._teacher_shape)
        kept_layers = [self._layers[layer - 1] for layer in layers]
        for layer in kept_layers:
            # Despite its name, transformers' attribute is the number of heads per query group.
            heads_per_group = shape.num_attention_heads // shape.num_query_groups
            layer.self_attn.num_key_value_groups = heads_per_group
        self._model.model.layers = torch.nn.ModuleList(kept_layers)
        self._model.config.num_hidden_layers = len(kept_layers)
        return Predictor.of(self._model)
