"""The NeMo model that distils: student and teacher as one ModelOpt ``DistillationModel``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import modelopt.torch.distill as mtd
import torch
from megatron.core import parallel_state
from modelopt.torch.distill.loss_balancers import STUDENT_LOSS_KEY
from nemo.collections.llm.modelopt.distill.model import DistillationGPTModel
from nemo.collections.llm.modelopt.distill.utils import (
    DistillationConfig,
    adjust_distillation_model_for_mcore,
    teacher_provider,
)
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from nemo_convert.cpu_backend import adapt_config
from recipes.errors import RecipeError
from recipes.kd_loss import LogitsKL, cross_entropy

OUTPUT = ("output_layer", "output_layer")
RANDOM_SHARE = 0.8
"""A teacher whose loss is above this share of ln(vocabulary) predicts little better than chance."""
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
)
"""What the teacher's config must share with the student's. NeMo copies fewer and so would run a
float32 teacher beside a bfloat16 student."""


def tensor_group() -> Any:
    """The tensor-parallel group, or ``None`` at size 1."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return None
    return parallel_state.get_tensor_model_parallel_group()


class _Sum(mtd.DistillationLossBalancer):  # type: ignore[misc]
    """Fixed weights; hands out every term on its own, which NeMo's balancer does not."""

    def __init__(self, kd_weight: float, lm_weight: float) -> None:
        super().__init__()
        self._kd_weight, self._lm_weight = kd_weight, lm_weight

    def forward(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        lm = losses.pop(STUDENT_LOSS_KEY)
        kd = torch.stack(list(losses.values())).sum()
        return {"loss": self._kd_weight * kd + self._lm_weight * lm, "kd": kd, "lm": lm}


class _LossReduction(MegatronLossReduction):  # type: ignore[misc]
    """Masks and averages the terms of a micro batch, and keeps the step's means for logging."""

    def __init__(self, model: KDModel) -> None:
        super().__init__()
        # Past nn.Module's registration: the model holds this reduction, and a cycle of modules
        # makes every recursive call on it endless.
        object.__setattr__(self, "_model", model)

    def forward(
        self, batch: dict[str, Tensor], forward_out: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the micro batch's loss and its terms."""
        if self._model.teacher_loss is None:
            self._model.check_teacher(batch["labels"])
        mask = batch["loss_mask"].float()

        def mean(values: Tensor) -> Tensor:
            return (values.float().reshape(mask.shape) * mask).sum() / mask.sum()

        losses = self._model.core_module.compute_kd_loss(
            student_loss=mean(forward_out), loss_reduction_fn=mean
        )
        # Cloned, since Megatron divides the loss by the number of micro batches in place.
        return losses["loss"], {name: loss.detach().clone() for name, loss in losses.items()}

    def reduce(self, micro_batches: list[dict[str, Tensor]]) -> Tensor:
        """Mean over micro batches and data-parallel ranks; the terms go to ``last_losses``."""
        if not micro_batches:
            return torch.tensor(0.0, device=torch.cuda.current_device())
        names = list(micro_batches[0])
        means = torch.stack([torch.stack([m[n] for m in micro_batches]).mean() for n in names])
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(means, group=group)
        means /= group.size()
        self._model.last_losses = dict(zip(names, means.tolist(), strict=True))
        return means[names.index("loss")]


class KDModel(DistillationGPTModel):  # type: ignore[misc]
    """NeMo's distillation model with our losses; saves and loads as the plain student.

    Args:
        student: NeMo model of the student, from its checkpoint's context.
        teacher: NeMo model of the teacher.
        teacher_checkpoint: Where the teacher's weights are.
        temperature: See ``LogitsKL``.
        kd_weight: Weight of the distillation term.
        lm_weight: Weight of the next-token term; 0 leaves it out.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        teacher_checkpoint: Path,
        *,
        temperature: float,
        kd_weight: float,
        lm_weight: float,
    ) -> None:
        super().__init__(
            adapt_config(student.config),
            adapt_config(teacher.config),
            teacher_ckpt_path=str(teacher_checkpoint),
            tokenizer=student.tokenizer,
        )
        self.__io__ = student.__io__
        self._temperature, self._kd_weight, self._lm_weight = temperature, kd_weight, lm_weight
        self.last_losses: dict[str, float] = {}
        self.teacher_loss: float | None = None
        self._reduction: _LossReduction | None = None

    def share_losses(self) -> None:
        """Brings the last step's losses from the last pipeline stage, which has them, to all."""
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            found: list[Any] = [self.last_losses, self.teacher_loss]
            torch.distributed.broadcast_object_list(
                found,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
            self.last_losses, self.teacher_loss = found

    def configure_model(self) -> None:
        """Builds the student, loads the teacher beside it, and attaches the losses."""
        if hasattr(self, "module"):
            return
        for name in SHARED_SETTINGS:
            setattr(self._teacher_config, name, getattr(self.config, name))
        # Not the student's: initialisation is also what marks a weight as tensor-parallel, and a
        # gradient norm without those marks counts one rank's half of them.
        self._teacher_config.perform_initialization = False
        last_stage = parallel_state.is_pipeline_last_stage()
        losses = {OUTPUT: LogitsKL(self._temperature, tensor_group())} if last_stage else {}
        teacher = (
            teacher_provider,
            [self._teacher_config, self._teacher_ckpt_path],
            {"tokenizer": self.tokenizer, "trainer": self.trainer},
        )
        settings = {
            "teacher_model": teacher,
            "criterion": losses,
            "loss_balancer": _Sum(self._kd_weight, self._lm_weight),
        }
        model = mtd.convert(
            self.config.configure_model(self.tokenizer), mode=[("kd_loss", settings)]
        )
        adjust_distillation_model_for_mcore(
            model, distill_cfg=DistillationConfig(skip_lm_loss=self._lm_weight == 0)
        )
        self.module = model

    @property
    def training_loss_reduction(self) -> _LossReduction:
        """Reduction of training losses."""
        if self._reduction is None:
            self._reduction = _LossReduction(self)
        return self._reduction

    def check_teacher(self, labels: Tensor) -> None:
        """Measures the teacher's own loss on the first batch, before anything is learnt from it.

        Raises:
            RecipeError: The teacher is no better than chance: its weights were not loaded.
        """
        logits = self.core_module.teacher_model.output_layer._intermediate_output
        logits = logits[0] if isinstance(logits, tuple) else logits
        self.teacher_loss = cross_entropy(logits, labels, tensor_group()).item()
        limit = RANDOM_SHARE * math.log(self._teacher_config.vocab_size)
        if not self.teacher_loss < limit:
            raise RecipeError(
                f"the teacher's loss on the first batch is {self.teacher_loss:.2f}; a working "
                f"model is well below {limit:.2f} (chance is {limit / RANDOM_SHARE:.2f}).",
                "its weights are damaged or of another model, or the text is not of its language",
            )
