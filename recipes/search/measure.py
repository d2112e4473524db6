"""Measuring candidate shapes as views of one model whose weights are sorted by importance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_convert import nemo
from nemo_convert.architecture import Architecture
from recipes.core.metrics import MetricsLog
from recipes.core.precision import dtype_of
from recipes.data.token_windows import TextWindows
from recipes.evaluation.predictions import TEACHER, Predictor, Reading, compare, read
from recipes.evaluation.text_quality import load_transformers
from recipes.pruning.cut_checkpoint import layers_to_keep
from recipes.pruning.importance import Importance
from recipes.pruning.kept import cut, order, prefix
from recipes.search.results import Candidate, ProxyQuality
from recipes.search.settings import RankCandidatesConfig
from recipes.search.space import name_of


def measure_shapes(
    cfg: RankCandidatesConfig,
    teacher: Path,
    importance: Importance,
    shapes: list[Architecture],
    text: TextWindows,
    log: MetricsLog,
) -> list[Candidate]:
    """Perplexity and KL to the teacher of every shape right after pruning.

    The model is in memory once: its weights are sorted by importance, and a candidate is their
    first rows and columns.

    Args:
        cfg: The stage's config.
        teacher: NeMo checkpoint.
        importance: Its scores.
        shapes: Shapes to measure.
        text: Windows to measure on.
        log: Metrics file.
    """
    whole = nemo.architecture_of(teacher)
    model = load_transformers(teacher, dtype_of(cfg.precision))
    view = SortedModel(model, whole, importance.widths)
    reference = read(
        view.predictor(whole, range(1, whole.num_layers + 1)), text, cfg.micro_batch_size
    )
    found = []
    for number, shape in enumerate(shapes, 1):
        layers = layers_to_keep(importance, cfg.layer_importance, shape.num_layers)
        candidate = view.predictor(shape, layers)
        found.append(_quality(reference, candidate, text, cfg.micro_batch_size))
        log.progress("rank", number, len(shapes))
    return [
        Candidate(
            name=name_of(shape),
            parameters=shape.parameters(),
            proxy=getattr(quality, cfg.proxy),
            **vars(quality),
            tokens=0,
            chosen=False,
            pareto=False,
            shape=shape,
        )
        for shape, quality in zip(shapes, found, strict=True)
    ]


def _quality(
    teacher: Reading, model: Predictor, text: TextWindows, micro_batch_size: int
) -> ProxyQuality:
    """Of one model beside what the teacher made of the same text."""
    both = {TEACHER: teacher, "candidate": read(model, text, micro_batch_size)}
    found = compare(both, text)["candidate"]
    loss, kl = (each.double().mean().item() for each in (found.losses, found.divergences))
    return ProxyQuality(math.exp(loss), kl)


class SortedModel:
    """A transformers model that takes any smaller shape without a copy of its weights.

    Args:
        model: The teacher, changed in place.
        whole: Its shape.
        scores: Importance of its widths.
    """

    def __init__(
        self, model: PreTrainedModel, whole: Architecture, scores: dict[str, Tensor]
    ) -> None:
        self._model, self._whole = model, whole
        self._layers = list(model.model.layers)
        self._weights: list[tuple[str, torch.nn.Parameter, Tensor]] = []
        everything = order(scores, whole)
        for name, parameter in model.named_parameters():
            parameter.data = cut(name, parameter.data, everything, whole.kv_channels)
            self._weights.append((name, parameter, parameter.data))

    def predictor(self, shape: Architecture, layers: Iterable[int]) -> Predictor:
        """The model in a shape, of only these layers, from 1; until it is given another."""
        for name, parameter, weight in self._weights:
            parameter.data = prefix(name, weight, shape, self._whole)
        kept = [self._layers[layer - 1] for layer in layers]
        for layer in kept:
            per_group = shape.num_attention_heads // shape.num_query_groups
            layer.self_attn.num_key_value_groups = per_group
        self._model.model.layers = torch.nn.ModuleList(kept)
        self._model.config.num_hidden_layers = len(kept)
        return Predictor.of(self._model)


def measure_checkpoints(
    teacher: Path, students: list[Path], text: TextWindows, precision: str, micro_batch_size: int
) -> list[ProxyQuality]:
    """Perplexity and KL to the teacher of NeMo checkpoints, one in memory at a time."""

    def load(checkpoint: Path) -> Predictor:
        return Predictor.of(load_transformers(checkpoint, dtype_of(precision)))

    reference = read(load(teacher), text, micro_batch_size)
    return [_quality(reference, load(student), text, micro_batch_size) for student in students]
