"""Runs operations on GPU and CPU tensors in a rehearsal; prints their errors as a JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor

attention = torch.nn.functional.scaled_dot_product_attention
Operation = Callable[["Operands"], object]
"""Calls one PyTorch operation. What the operation returns is not used."""


class Operands:
    """Operands on the GPU. The prefix ``c_`` marks equal operands on the CPU.

    Attributes:
        matrix: Shape [4, 4].
        heads: The matrix as queries, keys or values of attention [1, 1, 4, 4].
        number: Tensor without dimensions.
        index: Indices, int64 [4].
        scalar_index: One index, int64 without dimensions.
        mask: bool [4].
    """

    def __init__(self) -> None:
        self.matrix, self.c_matrix = (torch.ones(4, 4, device=d) for d in ("cuda", "cpu"))
        self.heads = self.matrix[None, None]
        self.number, self.c_number = (torch.ones((), device=d) for d in ("cuda", "cpu"))
        self.index, self.c_index = (
            torch.zeros(4, dtype=torch.int64, device=d) for d in ("cuda", "cpu")
        )
        self.scalar_index, self.c_scalar_index = (
            torch.zeros((), dtype=torch.int64, device=d) for d in ("cuda", "cpu")
        )
        self.mask, self.c_mask = (
            torch.ones(4, dtype=torch.bool, device=d) for d in ("cuda", "cpu")
        )

    def adam(self, **numbers_on_cpu: Tensor) -> None:
        """Updates one weight by the fused kernel. Its other operands are on the GPU."""
        names = ("state_steps", "grad_scale", "found_inf")
        numbers = dict.fromkeys(names, self.number) | numbers_on_cpu
        steps = [numbers.pop("state_steps")]
        # Lists of parameters, gradients, first and second moments, with one tensor each.
        lists = [[self.matrix.clone()] for _ in range(4)]
        torch._fused_adamw_(
            *lists, [], steps, lr=1e-3, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1e-8,
            amsgrad=False, maximize=False, **numbers,
        )  # fmt: skip


REFUSED: dict[str, Operation] = {
    "fused_step": lambda t: t.adam(state_steps=t.c_number),
    "fused_scale": lambda t: t.adam(grad_scale=t.c_number),
    "fused_found_inf": lambda t: t.adam(found_inf=t.c_number),
    "foreach_list": lambda t: torch._foreach_add([t.matrix], [t.c_matrix]),
    "unscale": lambda t: torch._amp_foreach_non_finite_check_and_unscale_(
        [t.matrix], t.number, t.c_number
    ),
    "index": lambda t: t.c_matrix[t.index],
    "mask": lambda t: t.c_matrix[t.mask],
    "index_put": lambda t: t.c_matrix.index_put_((t.index,), t.c_number),
    "index_put_values": lambda t: t.matrix.index_put_((t.index,), t.c_matrix),
    "index_select": lambda t: t.matrix.index_select(0, t.c_index),
    "index_select_scalar": lambda t: t.matrix.index_select(0, t.c_scalar_index),
    "index_copy": lambda t: t.matrix.index_copy_(0, t.c_index, t.matrix),
    "index_copy_scalar": lambda t: t.matrix[0].index_copy_(0, t.c_scalar_index, t.number),
    "index_add": lambda t: t.matrix.index_add_(0, t.index, t.c_matrix),
    "gather": lambda t: t.matrix[0].gather(0, t.c_scalar_index),
    "scatter": lambda t: t.matrix[0].scatter_(0, t.c_scalar_index, 1.0),
    "scatter_source": lambda t: t.matrix[0].scatter_(0, t.scalar_index, t.c_number),
    "embedding": lambda t: torch.nn.functional.embedding(t.c_scalar_index, t.matrix),
    "masked_fill_mask": lambda t: t.matrix.masked_fill_(t.c_mask, 0.0),
    "matmul": lambda t: t.matrix @ t.c_matrix,
    "addmm": lambda t: torch.addmm(t.c_number, t.matrix, t.matrix),
    "baddbmm": lambda t: torch.baddbmm(t.c_number, t.matrix[None], t.matrix[None]),
    "stack": lambda t: torch.stack([t.number, t.c_number]),
    "cross_entropy": lambda t: torch.nn.functional.cross_entropy(t.matrix[0], t.c_scalar_index),
    "add": lambda t: t.matrix + t.c_matrix,
    "add_number_of_gpu": lambda t: t.c_matrix + t.number,
    "attention": lambda t: attention(t.heads, t.heads.cpu(), t.heads.cpu()),
    "attention_mask": lambda t: attention(t.heads, t.heads, t.heads, attn_mask=t.c_matrix),
    "attention_mask_by_position": lambda t: attention(t.heads, t.heads, t.heads, t.c_matrix),
    "add_to_number": lambda t: t.c_number.add_(t.number),
    "add_out": lambda t: torch.add(t.number, t.number, out=t.c_number),
    "where_out": lambda t: torch.where(t.number > 0, t.number, t.number, out=t.c_number),
}
"""Operations on mixed devices that CUDA refuses. Some have a CPU tensor without dimensions, which
other operations accept."""
ALLOWED: dict[str, Operation] = {
    "fused": lambda t: t.adam(),
    "foreach_list": lambda t: torch._foreach_add([t.matrix], [t.matrix]),
    "foreach_number": lambda t: torch._foreach_mul_([t.matrix], t.c_number),
    "foreach_numbers": lambda t: torch._foreach_mul_([t.matrix], [t.c_number]),
    "foreach_copy": lambda t: torch._foreach_copy_([t.matrix], [t.c_matrix]),
    "unscale": lambda t: torch._amp_foreach_non_finite_check_and_unscale_(
        [t.matrix], t.number, t.number
    ),
    "index": lambda t: t.matrix[t.c_index],
    "mask": lambda t: t.matrix[t.c_mask],
    "index_put": lambda t: t.matrix.index_put_((t.c_index,), t.matrix),
    "index_put_number": lambda t: t.matrix.index_put_((t.index,), t.c_number),
    "set_item": lambda t: t.matrix.__setitem__(0, t.c_number),
    "index_fill": lambda t: t.matrix.index_fill_(0, t.index, t.c_number),
    "index_select": lambda t: t.matrix.index_select(0, t.scalar_index),
    "scatter": lambda t: t.matrix[0].scatter_(0, t.scalar_index, t.number),
    "embedding": lambda t: torch.nn.functional.embedding(t.scalar_index, t.matrix),
    "masked_fill": lambda t: t.matrix.masked_fill_(t.mask, t.c_number),
    "addmm": lambda t: torch.addmm(t.number, t.matrix, t.matrix),
    "stack": lambda t: torch.stack([t.number, t.number]),
    "add": lambda t: t.matrix + t.c_number,
    "add_number": lambda t: t.number + t.c_number,
    "add_in_place": lambda t: t.matrix.add_(t.c_number),
    "add_out": lambda t: torch.add(t.number, t.c_number, out=t.number),
    "floor_divide": lambda t: t.matrix // t.c_number,
    "divide": lambda t: t.c_number / t.matrix,
    "where": lambda t: torch.where(t.matrix > 0, t.matrix, t.c_number),
    "where_number": lambda t: torch.where(t.c_number > 0, t.matrix, t.c_number),
    "compare": lambda t: t.matrix > t.c_number,
    "clamp": lambda t: t.matrix.clamp(min=t.c_number),
    "power": lambda t: t.matrix**t.c_number,
    "lerp": lambda t: t.matrix.lerp_(t.matrix, t.c_number),
    "addcmul": lambda t: torch.addcmul(t.matrix, t.matrix, t.c_number),
    "attention": lambda t: attention(t.heads, t.heads, t.heads, attn_mask=t.matrix),
    "fill": lambda t: t.matrix.fill_(t.c_number),
    "copy": lambda t: t.matrix.copy_(t.c_matrix),
    "copy_back": lambda t: t.c_matrix.copy_(t.matrix),
}
"""Operations that CUDA accepts. Some are operations of ``REFUSED`` with all operands on the GPU.
The others have operands on both devices."""


def main() -> None:
    """Prints the errors by operation. A key is "refused NAME" or "allowed NAME"."""
    from recipes.rehearsal import fake_cuda
    from recipes.rehearsal.device import fake_tensors

    fake_cuda.install()
    errors = {}
    with fake_tensors():
        for expectation, operations in (("refused", REFUSED), ("allowed", ALLOWED)):
            for name, operation in operations.items():
                try:
                    operation(Operands())
                except Exception as error:
                    errors[f"{expectation} {name}"] = f"{type(error).__name__}: {error}"
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
