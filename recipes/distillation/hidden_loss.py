"""Distillation losses on hidden states: cosine and mean squared error, with a projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.modules.loss import _Loss

DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda ours, theirs: 1 - cosine_similarity(ours, theirs, dim=-1),
    "mse": lambda ours, theirs: (ours - theirs).square().mean(dim=-1),
}
"""The function of each of ``HIDDEN_LOSSES``: hidden states [s, b, h] to distances [s, b]."""
PROJECTION_SEED = 0
"""Seed of the projection, which every rank must initialise equally."""


# ModelOpt's HiddenStateCosineLoss and MSELoss (modelopt/torch/distill/plugins/megatron.py) compute
# in the activations' type, and return a tuple that only ModelOpt's own reduction understands.
class HiddenLoss(_Loss):
    """Distance of the student's hidden states from the teacher's, per token.

    ``cosine`` is 1 - cos of the angle between them, ``mse`` the mean squared difference over the
    teacher's hidden size. If the sizes differ, a learned projection maps the student's states to
    the teacher's size. All pairs of layers share this module and its projection, because all layers
    write to one residual stream with one basis. With ``sequence_parallel`` each tensor-parallel
    rank has a part of the sequence, so the projection is marked for Megatron to sum its gradient
    over the ranks (``megatron/core/distributed/finalize_model_grads.py``).
    """

    projection: nn.Linear | None

    def __init__(
        self,
        kind: str,
        student_size: int,
        teacher_size: int,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._kind = kind
        self.projection = None
        if student_size != teacher_size:
            self.projection = nn.Linear(student_size, teacher_size, bias=False, dtype=dtype)
            generator = torch.Generator().manual_seed(PROJECTION_SEED)
            # Initialised on the CPU: a GPU's generator has other numbers for the same seed.
            initial = torch.randn(teacher_size, student_size, generator=generator, device="cpu")
            self.projection.weight.data.copy_(initial * student_size**-0.5)
            if sequence_parallel:
                self.projection.weight.sequence_parallel = True

    def forward(
        self, student: Tensor | tuple[Tensor, ...], teacher: Tensor | tuple[Tensor, ...]
    ) -> Tensor:
        """Computes the loss per token [b, s], float32, of hidden states [s, b, h] of any type.

        With sequence parallelism s is this rank's part. Megatron's TransformerLayer returns
        (hidden states, context), of which the first is used. The teacher gets no gradient.
        """
        ours = student[0] if isinstance(student, tuple) else student
        theirs = teacher[0] if isinstance(teacher, tuple) else teacher
        if self.projection is not None:
            ours = self.projection(ours.to(self.projection.weight.dtype))
        # In bfloat16 the numbers below 1 are 1/256 apart, so a cosine of 0.999 would be 1.
        ours, theirs = ours.float(), theirs.detach().float()
        return DISTANCES[self._kind](ours, theirs).t()
