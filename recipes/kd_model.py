"""The NeMo model that is trained: a student, and where it has one a teacher beside it.

The losses on logits are computed where Megatron computes its own, in the student's
``compute_language_model_loss``; losses on hidden states by ModelOpt's ``DistillationModel``. The
model's output is then one row of per-token losses for each term, and nothing as wide as the
vocabulary outlives the forward pass.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import modelopt.torch.distill as mtd
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from nemo.collections import llm
from nemo.collections.llm.modelopt.distill.utils import (
    DistillationConfig,
    adjust_distillation_model_for_mcore,
    teacher_provider,
)
from nemo.lightning.megatron_parallel import MegatronLossReduction
from nemo.utils.model_utils import unwrap_model
from torch import Tensor

from nemo_convert import nemo
from nemo_convert.cpu_backend import adapt_config
from recipes.architecture import Architecture
from recipes.distill import CACHED, Config, Pairs, layer_pairs
from recipes.errors import RecipeError
from recipes.kd_hidden import HiddenLoss
from recipes.kd_loss import LogitsLoss, TopK, distillation_loss, token_cross_entropy
from recipes.parallelism import pipeline_split
from recipes.stage import Input, Inputs
from recipes.teacher_cache import TeacherCache
from recipes.teacher_check import require_better_than_chance
from recipes.training import TERMS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SHARED_SETTINGS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
    "context_parallel_size",
    "params_dtype",
    "pipeline_dtype",
    "autocast_dtype",
    "bf16",
    "fp16",
    "fp32_residual_connection",
    "deallocate_pipeline_outputs",
    "calculate_per_token_loss",
)
"""What the teacher's config must share with the student's. NeMo copies fewer and so would run a
float32 teacher beside a bfloat16 student."""


def split_pipeline(config: Any) -> None:
    """Gives Megatron the layers of the first and last pipeline stage where they are not equal."""
    split = pipeline_split(config.num_layers, config.pipeline_model_parallel_size)
    if len(set(split)) > 1:
        config.num_layers_in_first_pipeline_stage = split[0]
        config.num_layers_in_last_pipeline_stage = split[-1]


@dataclass(frozen=True)
class Teacher:
    """Where the teacher's knowledge comes from: a checkpoint, or a cache of what it says."""

    checkpoint: Path | None = None
    pairs: Pairs = ()
    """Layers whose hidden states are compared."""
    cache: TeacherCache | None = None

    @classmethod
    def of(cls, cfg: Config, inputs: Inputs, student: Architecture) -> Teacher:
        """What the config needs of the teacher; nothing where it learns from text alone."""
        if cfg.kd_weight == cfg.hidden_weight == 0:
            return cls()
        source = inputs["teacher"]
        if source.manifest.kind == CACHED:
            cache = TeacherCache(source.artifact)
            _require_fit(cfg, cache, source, inputs["data"])
            return cls(cache=cache)
        checkpoint = nemo.find_checkpoint(source.artifact)
        pairs: Pairs = ()
        if cfg.hidden_weight:
            kept = inputs["student"].manifest.metrics.get("kept_layers")
            layers = nemo.architecture_of(checkpoint).num_layers
            pairs = layer_pairs(cfg, kept, student.num_layers, layers)
        return cls(checkpoint, pairs)


def _require_fit(cfg: Config, cache: TeacherCache, source: Input, data: Input) -> None:
    """Refuses a cache of other text or settings; a cache of this run is checked before it runs.

    Raises:
        RecipeError: They differ.
    """
    if source.manifest.input_content.get("data") != data.manifest.content():
        raise RecipeError(
            f"the teacher in {source.directory} was cached for other text.",
            "give both stages the same data, and run the one that caches again",
        )
    for name in ("seq_length", "temperature", "top_k"):
        ours, cached = getattr(cfg, name), getattr(cache.index, name)
        if ours not in (None, cached):
            raise RecipeError(
                f"{name}={ours}, but the teacher in {source.directory} was cached at {cached}.",
                f"set stages.{cfg.stage}.{name}={cached}",
            )


@dataclass(frozen=True)
class Objective:
    """What is minimised: terms in the order of ``TERMS``, how they add up, whom they are from."""

    weights: Mapping[str, float]
    teacher: Teacher = Teacher()
    logits: LogitsLoss = field(default_factory=LogitsLoss)
    hidden_loss: str = "cosine"
    dynamic: bool = False

    @classmethod
    def of(cls, cfg: Config, inputs: Inputs, student: Architecture) -> Objective:
        """The objective of a distillation."""
        weights = {name: getattr(cfg, f"{name}_weight") for name in TERMS}
        chunk = None if cfg.loss_chunk_mb is None else cfg.loss_chunk_mb << 20
        return cls(
            {name: weight for name, weight in weights.items() if weight},
            Teacher.of(cfg, inputs, student),
            LogitsLoss(cfg.logits_loss, cfg.temperature, cfg.jsd_beta, cfg.top_k, chunk),
            cfg.hidden_loss,
            cfg.balance == "dynamic",
        )

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The loss of a micro batch from its terms.

        Dynamic, as NeMo does it: hidden states count as much as logits, and both together as much
        as the next-token loss, whatever their sizes; the weights apply after that.
        """
        weights = self.weights
        if not self.dynamic:
            return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        first, *rest = terms
        taught = terms[first]
        if first == "kd" and "hidden" in rest:
            taught = taught + weights["hidden"] * _scaled(terms["hidden"], taught)
        if first == "lm" or "lm" not in rest:
            return weights[first] * taught
        return weights["lm"] * terms["lm"] + weights[first] * _scaled(taught, terms["lm"])


def _scaled(term: Tensor, size: Tensor) -> Tensor:
    """``term`` brought to ``size``; no gradient flows through the scale."""
    return term * (size.detach() / term.detach().clamp_min(torch.finfo(torch.float32).tiny))


class LossReduction(MegatronLossReduction):  # type: ignore[misc]
    """Masks and sums the terms of a micro batch, and keeps the step's means for logging.

    Megatron divides the gradients by the number of tokens of the global batch
    (``calculate_per_token_loss``), so that a mean is never one of means.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self._objective = objective
        self.last: dict[str, float] = {}
        """Means of the last step over all tokens of the global batch, on the last stage."""

    def forward(
        self, batch: dict[str, Tensor], forward_out: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sums [terms, batch, sequence] over a micro batch.

        Returns:
            The loss, the number of tokens it is of, and both with the terms for ``reduce``.
        """
        mask = batch["loss_mask"].float()
        sums = (forward_out * mask).flatten(1).sum(dim=1)
        terms = dict(zip(self._objective.weights, sums.unbind(), strict=True))
        loss = self._objective.total(terms)
        # Not a number in the loss must reach the gradients, where all ranks look for it.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
        tokens = mask.sum()
        report = torch.cat([tokens.view(1), loss.detach().view(1), sums.detach()])
        return loss, tokens.to(torch.int), {"report": report}

    def reduce(self, micro_batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """Means over the tokens of all micro batches and data-parallel ranks."""
        if not micro_batches:
            return torch.tensor(0.0, device=torch.cuda.current_device())
        total = torch.stack([each["report"] for each in micro_batches]).sum(dim=0)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(total, group=group)
        means = total[1:] / total[0].clamp_min(1)
        self.last = dict(zip(("loss", *self._objective.weights), means.tolist(), strict=True))
        return means[0]


class KDModel(llm.GPTModel):  # type: ignore[misc]
    """A NeMo model trained on an ``Objective``; saves and loads as the plain student.

    Args:
        student: NeMo model of the student, from its checkpoint's context.
        objective: What is minimised.
    """

    def __init__(self, student: Any, objective: Objective) -> None:
        super().__init__(adapt_config(student.config, training=True), tokenizer=student.tokenizer)
        self.__io__ = student.__io__
        self.config.calculate_per_token_loss = True
        self._objective, self._teacher = objective, objective.teacher
        self._reduction = LossReduction(objective)
        self._cached: TopK | None = None
        self.teacher_loss: float | None = None
        """The teacher's own next-token loss on the first micro batch, measured before learning."""

    @property
    def core_module(self) -> Any:
        """This rank's Megatron model without its wrappers."""
        return unwrap_model(self.module)

    @property
    def training_loss_reduction(self) -> LossReduction:
        """Reduction of training losses."""
        return self._reduction

    def share_losses(self) -> dict[str, Any]:
        """The last step's losses on every rank; only the last pipeline stage has them itself."""
        found: list[Any] = [self._reduction.last, self.teacher_loss]
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast_object_list(
                found,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        losses, self.teacher_loss = found
        known = {} if self.teacher_loss is None else {"teacher_loss": self.teacher_loss}
        return {**losses, **known}

    def without_loss_modules(self) -> AbstractContextManager[None]:
        """Leaves the learned parts of the loss out of what is loaded or saved."""
        core = self.core_module
        hide: AbstractContextManager[None] = (
            core.hide_loss_modules() if isinstance(core, mtd.DistillationModel) else nullcontext()
        )
        return hide

    def configure_model(self) -> None:
        """Builds the student, and a teacher that is not cached beside it."""
        if hasattr(self, "module"):
            return
        split_pipeline(self.config)
        core = self.config.configure_model(self.tokenizer)
        if self._teacher.checkpoint:
            core = self._with_teacher(core, self._teacher.checkpoint)

        def losses(core: Any, labels: Tensor, logits: Tensor) -> Tensor:
            if core.training:
                return self._token_losses(core, labels, logits)
            return _next_token_loss(logits, labels)

        core.compute_language_model_loss = MethodType(losses, core)
        self.module = core

    def _with_teacher(self, student: Any, checkpoint: Path) -> Any:
        """Student and teacher as one ModelOpt ``DistillationModel`` that runs both."""
        config = adapt_config(nemo.restore_model(checkpoint).config, training=True)
        for name in SHARED_SETTINGS:
            setattr(config, name, getattr(self.config, name))
        split_pipeline(config)
        # Not the student's: initialisation is also what marks a weight as tensor-parallel, and a
        # gradient norm without those marks counts one rank's half of them.
        config.perform_initialization = False
        weights = str(checkpoint / nemo.WEIGHTS)
        links = {"tokenizer": self.tokenizer, "trainer": self.trainer}
        settings = {
            "teacher_model": (teacher_provider, [config, weights], links),
            "criterion": self._hidden_losses(student, config),
            "loss_balancer": mtd.StaticLossBalancer(1.0),  # demanded; ``Objective`` adds up
        }
        core = mtd.convert(student, mode=[("kd_loss", settings)])
        adjust_distillation_model_for_mcore(core, distill_cfg=DistillationConfig())
        teacher = core.teacher_model
        teacher.compute_language_model_loss = MethodType(lambda _, labels, logits: logits, teacher)
        core.forward = MethodType(_forward_both, core)
        return core

    def _hidden_losses(self, student: Any, teacher: Any) -> dict[tuple[str, str], HiddenLoss]:
        """One loss for all pairs of layers, by the modules' names on this pipeline stage."""
        if not self._teacher.pairs or not parallel_state.is_pipeline_last_stage():
            return {}
        loss = HiddenLoss(
            self._objective.hidden_loss,
            self.config.hidden_size,
            teacher.hidden_size,
            sequence_parallel=self.config.sequence_parallel,
            dtype=self.config.params_dtype,
        )
        first = self.config.num_layers - len(student.decoder.layers) + 1
        split = pipeline_split(teacher.num_layers, teacher.pipeline_model_parallel_size)
        teacher_first = teacher.num_layers - split[-1] + 1
        return {
            (f"decoder.layers.{ours - first}", f"decoder.layers.{theirs - teacher_first}"): loss
            for ours, theirs in self._teacher.pairs
        }

    def data_step(self, dataloader_iter: Any) -> dict[str, Any]:
        """A micro batch on this rank's device; what a cached teacher says where the loss is."""
        found = next(dataloader_iter)
        batch: dict[str, Any] = super().data_step(iter([found]))
        if parallel_state.is_pipeline_last_stage():
            samples = found[0] if isinstance(found, tuple) else found
            for name in ("teacher_indices", "teacher_log_probs"):
                if name in samples:
                    batch[name] = samples[name].cuda(non_blocking=True)
        return batch

    def forward_step(self, batch: dict[str, Any]) -> Tensor:
        """Runs the model on a batch; a cached teacher comes with the batch."""
        if (indices := batch.get("teacher_indices")) is not None:
            log_probs = batch["teacher_log_probs"]
            # From [batch, sequence, k] to Megatron's order of tokens.
            self._cached = TopK(*(t.transpose(0, 1).flatten(0, 1) for t in (indices, log_probs)))
        output: Tensor = super().forward_step(batch)
        return output

    def _token_losses(self, core: Any, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses [terms, batch, sequence] of logits [sequence, batch, vocabulary/tp]."""
        if self.teacher_loss is None and self._teacher.checkpoint:
            self._check_teacher(core.teacher_logits, labels)
        rows = []
        if "kd" in self._objective.weights:
            teacher = self._cached or core.teacher_logits.flatten(0, 1)
            loss, group = self._objective.logits, nemo.tensor_group()
            flat = distillation_loss(logits.flatten(0, 1), teacher, loss, group, True)
            rows.append(flat.view(logits.shape[:2]).t())
        if "hidden" in self._objective.weights:
            rows.append(self._hidden_loss(core, labels))
        if "lm" in self._objective.weights:
            rows.append(_next_token_loss(logits, labels))
        core.teacher_logits = None
        return torch.stack(rows)

    def _hidden_loss(self, core: Any, labels: Tensor) -> Tensor:
        """Mean over the pairs of layers, [batch, sequence]."""
        losses = core.compute_kd_loss(skip_balancer=True)
        mean = torch.stack(list(losses.values())).mean(dim=0)
        if not self.config.sequence_parallel:
            return mean
        # Each rank has a part of the sequence; the sum over ranks of parts in place is the whole,
        # and Megatron's gives each rank back the gradient of its own part.
        rank, length = parallel_state.get_tensor_model_parallel_rank(), mean.shape[1]
        before, after = rank * length, labels.shape[1] - (rank + 1) * length
        padded = torch.nn.functional.pad(mean, (before, after))
        whole: Tensor = reduce_from_tensor_model_parallel_region(padded)
        return whole

    def _check_teacher(self, logits: Tensor, labels: Tensor) -> None:
        """Measures the teacher's own loss before anything is learnt from it."""
        loss = _next_token_loss(logits, labels).mean().item()
        require_better_than_chance(loss, self.config.vocab_size)
        self.teacher_loss = loss

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads the student; past ``nn.Module``, whose walk would demand the teacher's weights."""
        names = {name.replace("module.", ""): value for name, value in state_dict.items()}
        return self.core_module.load_state_dict(names, *args, **kwargs)


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss [batch, sequence] of logits [sequence, batch, vocabulary/tp]."""
    flat = token_cross_entropy(logits.flatten(0, 1), labels.t().flatten(), nemo.tensor_group())
    return flat.view(logits.shape[:2]).t().contiguous()


def _forward_both(core: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Forward pass of teacher and student; replaces NeMo's, which drops the teacher's logits.

    Between pipeline stages both hidden states travel as one tensor.
    """
    if core.training:
        for pair in core._layers_to_loss:
            for layer in pair:
                layer._intermediate_output = None  # left behind by a validation
        with torch.no_grad():
            core.teacher_model.eval()
            taught = core.teacher_model(*args, **kwargs)
        core.teacher_logits = taught
    with core.only_student_forward():
        learnt: Tensor = type(core).forward(core, *args, **kwargs)
    if core.training and not parallel_state.is_pipeline_last_stage():
        return torch.cat([learnt, taught], dim=-1)
    return learnt
