"""The objective of training: terms and weights of the loss, and the source of teacher logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.modules.loss import _Loss

from nemo_convert import nemo
from nemo_convert.architecture import Architecture
from nemo_convert.pipeline import last_stage_layers
from recipes.backend.device import device
from recipes.core.errors import RecipeError
from recipes.core.stage import Input, Inputs
from recipes.distillation.logit_cache import TeacherCache
from recipes.distillation.losses import LogitsLoss
from recipes.distillation.results import KeptLayers
from recipes.distillation.settings import CACHE_KIND, TERMS, DistillConfig, uses_teacher

DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda student, teacher: 1 - cosine_similarity(student, teacher, dim=-1),
    "mse": lambda student, teacher: (student - teacher).square().mean(dim=-1),
}
"""Maps each of ``HIDDEN_LOSSES`` to a function of the student's and the teacher's hidden states
[sequence, batch, hidden size], which returns the distances [sequence, batch]."""
PROJECTION_SEED = 0
"""Seed of the initial weights of ``HiddenLoss.projection``, which must be equal on all ranks."""
Pairs = Sequence[tuple[int, int]]
"""Pairs (student layer, teacher layer) whose outputs are compared. Layers are counted from 1."""


def layer_pairs(
    cfg: DistillConfig,
    student_kept: Sequence[int] | None,
    num_student_layers: int,
    num_teacher_layers: int,
    teacher_kept: Sequence[int] | None = None,
) -> Pairs:
    """Returns the configured pairs of layers, or the default pairs.

    By default, each student layer is compared with the teacher layer that it comes from, if both
    are on the last of ``hidden_pipeline_stages`` stages. ``student_kept`` and ``teacher_kept`` are
    the models' ``kept_layers``: for each layer, its number in the model before all pruning.

    Raises:
        RecipeError: No pairs are configured, and none can be derived.
    """
    if cfg.intermediate_layer_pairs:
        return [(student, teacher) for student, teacher in cfg.intermediate_layer_pairs]
    stages = cfg.hidden_pipeline_stages or cfg.pipeline_model_parallel_size
    student_last_stage = last_stage_layers(num_student_layers, min(stages, num_student_layers))
    teacher_last_stage = last_stage_layers(num_teacher_layers, min(stages, num_teacher_layers))
    # A teacher without kept layers was not pruned. A student of equal depth has the same layers.
    teacher_kept = teacher_kept or range(1, num_teacher_layers + 1)
    if student_kept is None and num_student_layers == num_teacher_layers:
        student_kept = teacher_kept
    teacher_layer_of = {original: layer for layer, original in enumerate(teacher_kept, start=1)}
    if only_student := [layer for layer in student_kept or () if layer not in teacher_layer_of]:
        raise RecipeError(
            f"the student has the layers {only_student} of the model before pruning, but the "
            "teacher does not have them.",
            "set intermediate_layer_pairs, for example [[24,30]]",
        )
    pairs = [
        (student_layer, teacher_layer_of[original])
        for student_layer, original in enumerate(student_kept or (), start=1)
        if student_layer in student_last_stage and teacher_layer_of[original] in teacher_last_stage
    ]
    if not pairs:
        raise RecipeError(
            "no pair of layers can be derived for the loss on hidden states: "
            + ("it is not known which layers the student kept." if student_kept is None else
               "no kept layer is on the last pipeline stage of both teacher and student."),
            "set intermediate_layer_pairs, for example [[24,30]]",
        )  # fmt: skip
    return pairs


@dataclass(frozen=True)
class TeacherSource:
    """Source of the teacher's logits: a checkpoint (a live teacher), a cache, or neither."""

    checkpoint: Path | None = None
    pairs: Pairs = ()  # empty without a loss on hidden states
    cache: TeacherCache | None = None
    runs_in_validation: bool = False
    """Whether a live teacher also runs in validation."""

    @classmethod
    def of(cls, cfg: DistillConfig, inputs: Inputs, student: Architecture) -> TeacherSource:
        """Returns the source that a config requires; an empty source if LM is the only term."""
        if not uses_teacher(vars(cfg)):
            return cls()
        source = inputs["teacher"]
        if source.manifest.kind == CACHE_KIND:
            _require_same_text(source, inputs["data"])
            return cls(cache=TeacherCache(source.artifact))
        checkpoint = nemo.find_checkpoint(source.artifact)
        pairs: Pairs = ()
        if cfg.hidden_weight:
            student_kept = inputs["student"].manifest.result(KeptLayers).kept_layers
            teacher_kept = source.manifest.result(KeptLayers).kept_layers
            layers = nemo.architecture_of(checkpoint).num_layers
            pairs = layer_pairs(cfg, student_kept, student.num_layers, layers, teacher_kept)
        return cls(checkpoint, pairs, runs_in_validation=cfg.stop_at_recovered is not None)


def _require_same_text(cache: Input, data: Input) -> None:
    """Checks that a teacher was cached for the training text, by the content of the text.

    The check before a run compares only the settings of the text.
    """
    if cache.manifest.input_content.get("data") != data.manifest.content_hash():
        raise RecipeError(
            f"the teacher in {cache.directory} was cached for other text.",
            "give both stages the same data, and cache the teacher again",
        )


@dataclass(frozen=True)
class Objective:
    """Terms and weights of the loss, and the source of the teacher's logits."""

    weights: Mapping[str, float]
    """Maps each term of the loss to its configured weight, in the order of ``TERMS``."""
    teacher: TeacherSource = TeacherSource()
    logits: LogitsLoss = field(default_factory=LogitsLoss)
    """Settings of the KD loss, which is on logits."""
    hidden_loss: str = "cosine"
    """One of ``HIDDEN_LOSSES``."""
    dynamic: bool = False
    """Whether ``weights_after`` computes other weights for each step."""

    @classmethod
    def of(cls, cfg: DistillConfig, inputs: Inputs, student: Architecture) -> Objective:
        """Returns the objective of a distillation."""
        weights = {name: getattr(cfg, f"{name}_weight") for name in TERMS}
        return cls(
            {name: weight for name, weight in weights.items() if weight},
            TeacherSource.of(cfg, inputs, student),
            LogitsLoss(cfg.logits_loss, cfg.temperature, cfg.jsd_beta, cfg.top_k),
            cfg.hidden_loss,
            cfg.loss_balancer == "dynamic",
        )

    def weights_after(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Returns each term's weight, given the means of the terms in the previous step.

        With ``dynamic`` the hidden loss is scaled to the size of the weighted KD loss. The sum of
        these two is scaled to the size of the LM loss. Configured weights multiply scaled terms.
        Before the first step ``means`` is empty, and the weights are the configured weights.

        The means are of a global batch. NeMo's own balancer uses the means of each micro batch, so
        its result depends on the number of micro batches.
        """
        weights = dict(self.weights)
        if not (self.dynamic and means):
            return weights
        first = next(iter(weights))  # the first of KD, hidden and LM that the loss has
        # Weighted sum of KD and hidden terms, divided by their common factor, ``weights[first]``.
        teacher_terms = means[first]
        if "kd" in weights and "hidden" in weights:
            weights["hidden"] *= weights["kd"] * _scale_factor(means["kd"], means["hidden"])
            teacher_terms += self.weights["hidden"] * means["kd"]
        if "lm" in weights:
            for name in weights.keys() - {"lm"}:
                weights[name] *= _scale_factor(means["lm"], teacher_terms)
        return weights


def _scale_factor(size: float, mean: float) -> float:
    """Returns the factor that scales a mean to a size; 1 if the mean is 0."""
    return size / mean if mean > 0 else 1.0


# This class replaces HiddenStateCosineLoss and MSELoss of ModelOpt
# (modelopt/torch/distill/plugins/megatron.py). They compute in the activations' dtype, and return a
# tuple that only ModelOpt's own reduction understands.
class HiddenLoss(_Loss):
    """Distance of the student's hidden states from the teacher's, per token.

    If the hidden sizes differ, a learned projection maps the student's states to the teacher's
    size. All pairs of layers share one module and one projection, because all layers write to one
    residual stream with one basis.

    With ``sequence_parallel`` each tensor-parallel rank has a shard of the sequence. The projection
    is then marked, so that Megatron sums the projection's gradient over the ranks
    (``megatron/core/distributed/finalize_model_grads.py``).
    """

    projection: nn.Linear | None

    def __init__(
        self,
        distance: str,
        student_size: int,
        teacher_size: int,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._distance = distance
        self.projection = None
        if student_size != teacher_size:
            self.projection = nn.Linear(student_size, teacher_size, bias=False, dtype=dtype)
            generator = torch.Generator().manual_seed(PROJECTION_SEED)
            # Initialised on the CPU, since a GPU's generator has other numbers for the same seed.
            initial = torch.randn(teacher_size, student_size, generator=generator, device="cpu")
            # With this factor, projected states have the variance of the student's states.
            self.projection.weight.data.copy_(initial * student_size**-0.5)
            if sequence_parallel:
                self.projection.weight.sequence_parallel = True

    def forward(
        self, student: Tensor | tuple[Tensor, ...], teacher: Tensor | tuple[Tensor, ...]
    ) -> Tensor:
        """Computes the loss per token [batch, sequence] in float32.

        Both arguments are hidden states [sequence, batch, hidden size] of any float type, or the
        tuple (hidden states, context) that Megatron's TransformerLayer returns. The context is
        ignored. With sequence parallelism, ``sequence`` is the length of this rank's shard. The
        teacher gets no gradient.
        """
        states = student[0] if isinstance(student, tuple) else student
        targets = teacher[0] if isinstance(teacher, tuple) else teacher
        if self.projection is not None:
            states = self.projection(states.to(self.projection.weight.dtype))
        # Distances are in float32: as bfloat16, a cosine of 0.999 would round to 1.
        states, targets = states.float(), targets.detach().float()
        return DISTANCES[self._distance](states, targets).t()


class LossReduction(MegatronLossReduction):  # type: ignore[misc]
    """Masks and sums the losses of a micro batch, and stores the step's means for logging.

    The loss is a sum, because Megatron divides the gradients by the number of unmasked tokens of
    the global batch (``calculate_per_token_loss``). A mean of the micro batches' means would weigh
    tokens unequally.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self._objective = objective
        self.last_means: dict[str, float] = {}
        """Maps ``loss`` (the weighted total) and each term to the mean over the unmasked tokens of
        the last global batch. Only the last pipeline stage has these means."""
        self.last_tokens = 0.0
        """Number of unmasked tokens of the last global batch."""
        self.finite_means: dict[str, float] = {}
        """``last_means`` of the last step whose means were all finite. Dynamic weights of the next
        step depend on these means."""

    def weights(self) -> Mapping[str, float]:
        """Returns the weights of this step's terms."""
        return self._objective.weights_after(self.finite_means)

    def forward(
        self, batch: dict[str, Tensor], forward_out: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sums losses [1 + terms, batch, sequence] over the unmasked tokens of a micro batch.

        The first row is the weighted total. The other rows are the terms.

        Returns:
            The sum of the first row; the number of unmasked tokens; and a dictionary for
            ``reduce``, whose ``report`` is one tensor: the number of tokens, then all rows' sums.
        """
        mask = batch["loss_mask"].float()
        sums = (forward_out * mask).flatten(1).sum(dim=1)
        # A NaN or infinite loss makes the gradients NaN, so that all ranks see a NaN gradient norm.
        loss = sums[0] * torch.where(sums[0].detach().isfinite(), 1.0, math.nan)
        tokens = mask.sum()
        report = torch.cat([tokens.view(1), loss.detach().view(1), sums[1:].detach()])
        return loss, tokens.to(torch.int), {"report": report}

    def reduce(self, micro_batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """Stores the means over the unmasked tokens of the global batch.

        ``micro_batches`` are the dictionaries of ``forward`` for this rank's micro batches.

        Returns:
            The mean of the weighted total.
        """
        if not micro_batches:
            return torch.tensor(0.0, device=device())  # a pipeline stage without a loss
        sums = torch.stack([batch["report"] for batch in micro_batches]).sum(dim=0)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(sums, group=group)
        means = sums[1:] / sums[0].clamp_min(1)  # ``sums[0]`` is the number of tokens
        # ``tolist`` transfers all numbers from the GPU at once.
        self.last_tokens, *values = torch.cat([sums[:1], means]).tolist()
        self.last_means = dict(zip(("loss", *self._objective.weights), values, strict=True))
        if all(math.isfinite(mean) for mean in self.last_means.values()):
            self.finite_means = self.last_means
        return means[0]
