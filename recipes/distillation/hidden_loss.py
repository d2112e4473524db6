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
"""What each of ``HIDDEN_LOSSES`` computes of states [s, b, h], as [s, b]."""
PROJECTION_SEED = 0
"""The projection is replicated: every rank must draw the same one."""


# ModelOpt's HiddenStateCosineLoss and MSELoss (modelopt/torch/distill/plugins/megatron.py) compute
# in the activations' type, and return a tuple that only ModelOpt's own reduction understands.
class HiddenLoss(_Loss):
    """How far the student's hidden states are from the teacher's, per token; a ``HIDDEN_LOSSES``.

    ``cosine`` is 1 - cos of the angle between them, ``mse`` the squared difference averaged over
    the teacher's hidden size. Where the sizes differ, a learned projection takes the student's to
    the teacher's; all pairs of layers share this one loss and so the projection, since all layers
    write to one residual stream with one basis. With ``sequence_parallel`` each tensor-parallel
    rank sees a part of the sequence, so Megatron must sum the projection's gradient over them
    (megatron/core/distributed/finalize_model_grads.py does it for parameters so marked).
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
            # Drawn on the CPU: a GPU's generator gives other numbers for the same seed.
            initial = torch.randn(teacher_size, student_size, generator=generator, device="cpu")
            self.projection.weight.data.copy_(initial * student_size**-0.5)
            if sequence_parallel:
                self.projection.weight.sequence_parallel = True

    def forward(
        self, student: Tensor | tuple[Tensor, ...], teacher: Tensor | tuple[Tensor, ...]
    ) -> Tensor:
        """Loss per token [b, s], float32, of hidden states [s, b, h] of any float type.

        With sequence parallelism s is this rank's part. Megatron's TransformerLayer returns
        (hidden states, context); the first item of a tuple is taken. The teacher gets no gradient.
        """
        ours = student[0] if isinstance(student, tuple) else student
        theirs = teacher[0] if isinstance(teacher, tuple) else teacher
        if self.projection is not None:
            ours = self.projection(ours.to(self.projection.weight.dtype))
        # In bfloat16 the numbers next below 1 are 1/256 apart: a cosine of 0.999 would be 1.
        ours, theirs = ours.float(), theirs.detach().float()
        return DISTANCES[self._kind](ours, theirs).t()
