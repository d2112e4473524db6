"""The NeMo model that is trained: a student, and optionally a live teacher.

A live teacher runs in every training step. A cached teacher's logits are read from files instead.
The student's ``compute_language_model_loss`` is replaced by a function that computes the losses on
logits. ModelOpt's ``DistillationModel`` runs a live teacher, and computes the loss on hidden
states. ``KDModel`` returns losses [1 + terms, batch, sequence]: the weighted sum, then each term.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import modelopt.torch.distill as mtd
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from nemo.collections import llm
from nemo.collections.llm.modelopt.distill.utils import (
    DistillationConfig,
    adjust_distillation_model_for_mcore,
)
from nemo.utils.model_utils import unwrap_model
from torch import Tensor, nn

from nemo_convert import nemo
from nemo_convert.pipeline import last_stage_layers
from recipes.backend.device import device
from recipes.backend.local_layers import adapt_config
from recipes.backend.patches import Patch, apply_to, replace_with
from recipes.distillation.data import TEACHER_PREFIX
from recipes.distillation.losses import (
    LogitsLoss,
    LossTargets,
    combined_loss,
    distillation_loss,
    token_cross_entropy,
)
from recipes.distillation.objective import HiddenLoss, LossReduction, Objective
from recipes.distillation.vocabulary import TopK
from recipes.evaluation.predictions import require_better_than_chance

LANGUAGE_MODEL_LOSS = (
    "megatron.core.models.common.language_module.language_module:"
    "LanguageModule.compute_language_model_loss"
)
LOSS_HASH = "01ec0b6356cd"
"""Fingerprint of the source of ``LANGUAGE_MODEL_LOSS``. A patch refuses another source."""
MODELOPT_FORWARD = "modelopt.torch.distill.distillation_model:DistillationModel.forward"
SHARED_SETTINGS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
    "context_parallel_size",
    "expert_model_parallel_size",
    "params_dtype",
    "pipeline_dtype",
    "autocast_dtype",
    "bf16",
    "fp16",
    "fp32_residual_connection",
    "deallocate_pipeline_outputs",
    "calculate_per_token_loss",
    "attention_backend",
)
"""Settings that are copied from the student's config to the teacher's. NeMo copies fewer, and would
run a float32 teacher with a bfloat16 student."""


class KDModel(llm.GPTModel):  # type: ignore[misc]
    """A NeMo model that is trained on an ``Objective``. Checkpoints have only the student."""

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__(adapt_config(student.config, training=True), tokenizer=student.tokenizer)
        self.__io__ = student.__io__  # NeMo's record of how to build the model, without the losses
        self.config.calculate_per_token_loss = True
        self._objective, self._teacher = objective, objective.teacher
        self._reduction = LossReduction(objective)
        # The validation loss is the LM loss alone. A KL is only measured, so its weight is 0.
        kl_weight = {"kd": 0.0} if self._teacher.runs_in_validation else {}
        self._validation_reduction = LossReduction(Objective({"lm": 1.0, **kl_weight}))
        self._cached_top_k: TopK | None = None
        """A cached teacher's top-k tokens of the current micro batch."""
        self._loss_mask: Any = None
        """Mask [batch, sequence] of the current micro batch: 1 for tokens in the loss, else 0."""
        self.teacher_loss: float | None = None
        """The teacher's LM loss on the first micro batch with unmasked tokens."""
        self.skipped_steps = 0
        """Number of steps that were skipped because of a gradient that is not finite."""

    @property
    def core_module(self) -> Any:
        """Returns this rank's Megatron model without the wrappers for mixed precision and DDP."""
        return unwrap_model(self.module)

    @property
    def training_loss_reduction(self) -> LossReduction:
        """Returns the reduction of training losses."""
        return self._reduction

    @property
    def validation_loss_reduction(self) -> LossReduction:
        """Returns the reduction of validation losses: LM, and the KL if a teacher runs."""
        return self._validation_reduction

    def validation_batch(self) -> tuple[float, dict[str, float]]:
        """Returns the last validation batch's number of unmasked tokens, and mean loss by name."""
        reduction = self._validation_reduction
        tokens, means = _from_last_stage([reduction.last_tokens, reduction.last_means])
        return tokens, means

    def share_losses(self) -> dict[str, Any]:
        """Broadcasts the last step's losses from the last pipeline stage to all stages.

        Returns:
            The means of ``LossReduction.last_means``, and ``teacher_loss`` if it was measured.
        """
        reduction = self._reduction
        # Rank 0 logs the losses and saves ``finite_means``, but can be on another pipeline stage.
        losses, reduction.finite_means, self.teacher_loss = _from_last_stage(
            [reduction.last_means, reduction.finite_means, self.teacher_loss]
        )
        teacher_loss = {} if self.teacher_loss is None else {"teacher_loss": self.teacher_loss}
        return {**losses, **teacher_loss}

    def without_loss_modules(self) -> AbstractContextManager[None]:
        """Returns a context in which the model lacks the parameters of the loss."""
        if isinstance(self.core_module, mtd.DistillationModel):
            return self.core_module.hide_loss_modules()  # type: ignore[no-any-return]
        return nullcontext()

    def configure_model(self) -> None:
        """Builds the student, and a live teacher if there is one."""
        if hasattr(self, "module"):  # already built
            return
        nemo.split_pipeline(self.config)
        core = self.config.configure_model(self.tokenizer)
        if self._teacher.checkpoint:
            core = self._with_teacher(core, self._teacher.checkpoint)

        def compute_losses(core: nn.Module, labels: Tensor, logits: Tensor) -> Tensor:
            if core.training:
                return self._token_losses(core, labels, logits)
            lm_loss = _lm_loss(logits, labels)
            if not self._teacher.runs_in_validation:
                return torch.stack([lm_loss, lm_loss])  # the total, and its only term
            # Validation always measures the forward KL at temperature 1, as evaluation and healing
            # do. The KD loss of training may be another divergence.
            student, teacher = logits.flatten(0, 1), core.teacher_logits.flatten(0, 1)
            kl = distillation_loss(student, teacher, LogitsLoss(), nemo.tensor_group())
            return torch.stack([lm_loss, lm_loss, kl.view(logits.shape[:2]).t()])  # total, LM, KL

        reason = "training minimises the losses of the recipe"
        apply_to(core, Patch(LANGUAGE_MODEL_LOSS, reason, LOSS_HASH, replace_with(compute_losses)))
        self.module = core

    def _with_teacher(self, student: nn.Module, checkpoint: Path) -> Any:
        """Combines student and teacher in a ModelOpt ``DistillationModel`` that runs both."""
        config = adapt_config(nemo.restore_model(checkpoint).config, training=True)
        for name in SHARED_SETTINGS:
            setattr(config, name, getattr(self.config, name))
        nemo.split_pipeline(config)
        # The teacher needs no initialisation, because its weights are loaded. The student's weights
        # are loaded later, too, but initialisation marks them as tensor-parallel. Without these
        # marks, the gradient norm would count only one rank's shard of a weight.
        config.perform_initialization = False
        settings = {
            # ModelOpt calls the function with these arguments.
            "teacher_model": (_load_teacher, [config, self.tokenizer, checkpoint], {}),
            "criterion": self._hidden_losses(config),
            # ModelOpt requires a balancer. It is not used, since ``Objective`` has the weights.
            "loss_balancer": mtd.StaticLossBalancer(1.0),
        }
        core = mtd.convert(student, mode=[("kd_loss", settings)])
        adjust_distillation_model_for_mcore(core, distill_cfg=DistillationConfig())
        teacher = core.teacher_model
        reason = "the teacher returns its logits instead of a loss"
        return_logits = replace_with(lambda core, labels, logits: logits)
        apply_to(teacher, Patch(LANGUAGE_MODEL_LOSS, reason, LOSS_HASH, return_logits))
        core.runs_in_validation = self._teacher.runs_in_validation
        reason = "NeMo's forward pass drops the teacher's logits"
        apply_to(core, Patch(MODELOPT_FORWARD, reason, "5a571efc433c", replace_with(_forward_both)))
        return core

    def _hidden_losses(self, teacher_config: Any) -> dict[tuple[str, str], HiddenLoss]:
        """Maps each pair (student's layer name, teacher's layer name) to the loss on hidden states.

        All pairs share one loss module. Only the last pipeline stage has pairs.
        """
        if not self._teacher.pairs or not parallel_state.is_pipeline_last_stage():
            return {}
        loss = HiddenLoss(
            self._objective.hidden_loss,
            self.config.hidden_size,
            teacher_config.hidden_size,
            sequence_parallel=self.config.sequence_parallel,
            dtype=self.config.params_dtype,
        )
        # Pairs count layers from 1 over all stages. Layer names count from 0 on this stage.
        student_first, teacher_first = (
            last_stage_layers(config.num_layers, config.pipeline_model_parallel_size).start
            for config in (self.config, teacher_config)
        )
        return {
            (
                f"decoder.layers.{student_layer - student_first}",
                f"decoder.layers.{teacher_layer - teacher_first}",
            ): loss
            for student_layer, teacher_layer in self._teacher.pairs
        }

    def data_step(self, dataloader_iter: Any) -> dict[str, Any]:
        """Returns a micro batch. The last pipeline stage also gets a cached teacher's tensors."""
        loaded = next(dataloader_iter)
        batch: dict[str, Any] = super().data_step(iter([loaded]))  # only NeMo's own tensors
        if parallel_state.is_pipeline_last_stage():
            # A loader of Lightning may return (batch, batch index, loader index).
            samples = loaded[0] if isinstance(loaded, tuple) else loaded
            for name in samples:
                if name.startswith(TEACHER_PREFIX):
                    batch[name] = samples[name].to(device(), non_blocking=True)
        return batch

    def forward_step(self, batch: dict[str, Any]) -> Tensor:
        """Stores the micro batch's mask and cached top-k for the loss, then runs the model."""
        self._loss_mask = batch.get("loss_mask")  # only the last pipeline stage has it
        cached = {
            name.removeprefix(TEACHER_PREFIX): tensor
            for name, tensor in batch.items()
            if name.startswith(TEACHER_PREFIX)
        }
        if cached:
            # From [batch, sequence, k] to [sequence · batch, k], the order of Megatron's logits.
            self._cached_top_k = TopK(**cached).map(lambda t: t.transpose(0, 1).flatten(0, 1))
        output: Tensor = super().forward_step(batch)
        return output

    def _token_losses(self, core: nn.Module, labels: Tensor, logits: Tensor) -> Tensor:
        """Computes losses [1 + terms, batch, sequence] of logits [sequence, batch, vocabulary/tp].

        The first row is the weighted total, which training minimises. The other rows are the terms,
        without gradients. ``LossReduction`` computes their means.
        """
        if self.teacher_loss is None and self._teacher.checkpoint:
            self._check_teacher(core.teacher_logits, labels)
        weights, terms = self._reduction.weights(), {}
        total = logits.new_zeros(labels.shape, dtype=torch.float32)
        if "kd" in weights:
            lm_labels = labels if "lm" in weights else None
            kd_lm_weights = weights["kd"], weights.get("lm", 0)
            total, kd_loss, lm_loss = self._kd_and_lm_losses(core, logits, lm_labels, kd_lm_weights)
            terms = {"kd": kd_loss, "lm": lm_loss}  # without labels, ``lm_loss`` is 0 and unused
        elif "lm" in weights:
            terms["lm"] = _lm_loss(logits, labels, reuse_logits=True)
            total = weights["lm"] * terms["lm"]
        if "hidden" in weights:
            terms["hidden"] = self._hidden_loss(core, labels)
            total = total + weights["hidden"] * terms["hidden"]
        core.teacher_logits = None  # frees memory
        return torch.stack([total, *(terms[name].detach() for name in weights)])

    def _kd_and_lm_losses(
        self, core: nn.Module, logits: Tensor, labels: Tensor | None, weights: tuple[float, float]
    ) -> tuple[Tensor, ...]:
        """Returns three losses [batch, sequence]: the weighted sum of KD and LM, then KD, then LM.

        ``weights`` are the weights of KD and LM, in this order. Without labels the LM loss is 0.
        """
        targets = LossTargets(
            self._cached_top_k or core.teacher_logits.flatten(0, 1),
            None if labels is None else labels.t().flatten(),
            weights,
        )
        kd_settings, group = self._objective.logits, nemo.tensor_group()
        # The gradient may overwrite the logits, since nothing reads them after the loss.
        flat = logits.flatten(0, 1)
        total, kd_and_lm = combined_loss(flat, targets, kd_settings, group, reuse_logits=True)
        return tuple(row.view(logits.shape[:2]).t() for row in (total, *kd_and_lm))

    def _hidden_loss(self, core: nn.Module, labels: Tensor) -> Tensor:
        """Computes the mean hidden loss over the pairs of layers, [batch, sequence]."""
        losses = core.compute_kd_loss(skip_balancer=True)
        mean = torch.stack(list(losses.values())).mean(dim=0)
        if not self.config.sequence_parallel:
            return mean
        # Each rank has the losses of a contiguous shard of the sequence. Each shard is padded with
        # zeros to the whole sequence, and the results are added over the ranks. In the backward
        # pass, a rank gets only the gradient of the shard that it has.
        rank, length = parallel_state.get_tensor_model_parallel_rank(), mean.shape[1]
        before, after = rank * length, labels.shape[1] - (rank + 1) * length
        padded = torch.nn.functional.pad(mean, (before, after))
        whole: Tensor = reduce_from_tensor_model_parallel_region(padded)
        return whole

    def _check_teacher(self, logits: Tensor, labels: Tensor) -> None:
        """Stores the teacher's mean LM loss on a micro batch that has unmasked tokens.

        Raises:
            RecipeError: The loss is near that of a uniform guess.
        """
        tokens = self._loss_mask.sum().item()
        if not tokens:
            return
        loss = (_lm_loss(logits, labels) * self._loss_mask).sum().item() / tokens
        require_better_than_chance(loss, self.config.vocab_size)
        self.teacher_loss = loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the number of skipped steps, and the means that dynamic weights depend on."""
        checkpoint["loss_sizes"] = self._reduction.finite_means
        checkpoint["skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads what ``on_save_checkpoint`` saved."""
        self._reduction.finite_means = checkpoint.get("loss_sizes", {})
        self.skipped_steps = checkpoint.get("skipped_steps", 0)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads the student only; ``nn.Module`` would require the teacher's weights."""
        # Removes the prefixes of wrappers, which ``core_module`` does not have.
        state = {name.replace("module.", ""): value for name, value in state_dict.items()}
        return self.core_module.load_state_dict(state, *args, **kwargs)


def _from_last_stage(values: list[Any]) -> list[Any]:
    """Returns the values of the last pipeline stage, which has the losses. All stages call this."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast_object_list(
            values,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return values


def _load_teacher(config: Any, tokenizer: Any, checkpoint: Path) -> nn.Module:
    """Builds and loads this rank's shard of the teacher."""
    core: nn.Module = config.configure_model(tokenizer)
    nemo.load_weights(core, checkpoint)
    return core


def _lm_loss(logits: Tensor, labels: Tensor, reuse_logits: bool = False) -> Tensor:
    """Computes the LM loss [batch, sequence] of logits [sequence, batch, vocabulary/tp]."""
    flat = token_cross_entropy(
        logits.flatten(0, 1), labels.t().flatten(), nemo.tensor_group(), reuse_logits=reuse_logits
    )
    return flat.view(logits.shape[:2]).t().contiguous()


def _forward_both(core: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces ``DistillationModel.forward``: stores the teacher's output, runs the student.

    Returns:
        The student's output. In training, pipeline stages before the last return the hidden states
        of student and teacher, concatenated, because a stage sends one tensor to the next stage.
    """
    if core.training or core.runs_in_validation:
        for pair in core._layers_to_loss:
            for layer in pair:
                # After a validation of the student alone, a layer still has an output. ModelOpt's
                # hooks would warn about this output of an earlier forward pass.
                layer._intermediate_output = None
        with torch.no_grad():
            core.teacher_model.eval()
            teacher_output = core.teacher_model(*args, **kwargs)
        core.teacher_logits = teacher_output  # logits on the last pipeline stage
    with core.only_student_forward():
        # Only the instance is patched, so the class still has the original ``forward``.
        student_output: Tensor = type(core).forward(core, *args, **kwargs)
    if core.training and not parallel_state.is_pipeline_last_stage():
        return torch.cat([student_output, teacher_output], dim=-1)
    return student_output
