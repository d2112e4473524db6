"""Measuring candidate shapes as views of one model whose weights are sorted by importance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from nemo_convert import nemo
from nemo_convert.architecture import Architecture
from nemo_convert.cpu_backend import device
from recipes.core.metrics import MetricsLog
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
    tokens: Tensor,
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
        tokens: Windows [windows, sequence].
        log: Metrics file.
    """
    whole = nemo.architecture_of(teacher)
    view = SortedModel(load_transformers(teacher), whole, importance.widths)
    sums = torch.zeros(len(shapes), 2, dtype=torch.float64)
    kept = [layers_to_keep(importance, cfg.layer_importance, s.num_layers) for s in shapes]
    for done in range(0, len(tokens), cfg.micro_batch_size):
        batch = tokens[done : done + cfg.micro_batch_size].to(device())
        reference = view.log_probabilities(whole, range(1, whole.num_layers + 1), batch)
        for number, (shape, layers) in enumerate(zip(shapes, kept, strict=True)):
            found = view.log_probabilities(shape, layers, batch)
            sums[number] += torch.tensor(losses(reference, found, batch), dtype=torch.float64)
            log.progress("rank", number + 1, len(shapes), windows=done + len(batch))
    means = (sums / tokens[:, 1:].numel()).tolist()
    return [
        Candidate(
            name=name_of(shape),
            parameters=shape.parameters(),
            proxy=kl if cfg.proxy == "kl_to_teacher" else math.exp(loss),
            perplexity=math.exp(loss),
            kl_to_teacher=kl,
            tokens=0,
            chosen=False,
            pareto=False,
            shape=shape,
        )
        for shape, (loss, kl) in zip(shapes, means, strict=True)
    ]


def losses(reference: Tensor, found: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Next-token loss and KL to the reference, summed over all positions that have a next token.

    Args:
        reference: The teacher's log-probabilities [windows, sequence, vocabulary].
        found: The candidate's.
        tokens: Windows [windows, sequence].
    """
    found, targets = found[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    loss = functional.nll_loss(found, targets, reduction="sum")
    kl = functional.kl_div(found, reference[:, :-1].flatten(0, 1), reduction="sum", log_target=True)
    return loss.item(), kl.item()


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

    @torch.no_grad()
    def log_probabilities(
        self, shape: Architecture, layers: Iterable[int], tokens: Tensor
    ) -> Tensor:
        """Of every next token [windows, sequence, vocabulary], with only these layers, from 1."""
        for name, parameter, weight in self._weights:
            parameter.data = prefix(name, weight, shape, self._whole)
        kept = [self._layers[layer - 1] for layer in layers]
        for layer in kept:
            per_group = shape.num_attention_heads // shape.num_query_groups
            layer.self_attn.num_key_value_groups = per_group
        self._model.model.layers = torch.nn.ModuleList(kept)
        self._model.config.num_hidden_layers = len(kept)
        logits = self._model(tokens, use_cache=False).logits
        return torch.log_softmax(logits.float(), dim=-1)


@torch.no_grad()
def measure_checkpoints(
    teacher: Path, students: list[Path], tokens: Tensor, batch: int
) -> list[ProxyQuality]:
    """Perplexity and KL to the teacher of NeMo checkpoints, one in memory beside the teacher."""
    reference = load_transformers(teacher)
    results = []
    for student in students:
        model = load_transformers(student)
        sums = torch.zeros(2, dtype=torch.float64)
        for part in tokens.to(device()).split(batch):
            whole, found = (
                torch.log_softmax(m(part, use_cache=False).logits.float(), dim=-1)
                for m in (reference, model)
            )
            sums += torch.tensor(losses(whole, found, part), dtype=torch.float64)
        loss, kl = (sums / tokens[:, 1:].numel()).tolist()
        results.append(ProxyQuality(math.exp(loss), kl))
    return results
