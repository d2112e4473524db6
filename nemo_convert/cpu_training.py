"""Gradients and optimizer of a training on a CPU, in the place of Megatron's, with their results.

Megatron's are made for CUDA's kernels, and for ranks of which each has a part. ``cpu_backend`` says
where these stand, and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import embedding
from torch.optim.adamw import adamw

BLOCK = 1 << 22
"""Elements of a gradient that are made float32 at a time."""


def with_cuda_type_names(original: Any) -> Any:
    """Names parameter types as CUDA would while the mixed-precision optimizer compares strings."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        type_of = Tensor.type
        Tensor.type = lambda tensor: type_of(tensor).replace("torch.", "torch.cuda.", 1)  # type: ignore[assignment,method-assign]
        try:
            original(self, *args, **kwargs)
        finally:
            Tensor.type = type_of  # type: ignore[method-assign]

    return __init__


def of_its_own(original: Any) -> Any:
    """Leaves each weight's gradient to memory of its own, where no other rank adds to it.

    A buffer of all gradients takes memory from a training's first moment to its last. A gradient
    alone takes what its layer's activations leave, and is gone before the next step makes others.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        settings = self.ddp_config
        self.shared = (
            self.data_parallel_group.size() * settings.num_distributed_optimizer_instances > 1
            or self.gradient_scaling_factor != 1
            or not settings.use_distributed_optimizer
        )
        if not self.shared:
            self.grad_data.untyped_storage().resize_(0)

    return __init__


def in_shards(original: Any) -> Any:
    """Takes a buffer of one rank as its shard, also one that has no memory."""

    def shard_buffer(buffer: Tensor, ranks: int) -> Any:
        return original(buffer, ranks) if ranks > 1 else [buffer]

    return shard_buffer


def begin_gradients(original: Any) -> Any:
    """Lets go of the gradients of the step before, where Megatron fills them with zeros."""

    def zero_grad_buffer(self: Any) -> None:
        original(self)
        self.unwritten = set(self.params_with_grad)
        for weight in _in_no_buffer(self):
            weight.main_grad = None

    return zero_grad_buffer


def write_first_gradient(original: Any) -> Any:
    """Takes a weight's first gradient of a step as it is, where Megatron adds it to zeros."""

    def make_hook(self: Any, weight: Any) -> Any:
        hook = original(self, weight)
        # Of an embedding that is the head, too; it has every gradient added, as CUDA's sums need.
        weight.tied = getattr(weight, "zero_out_wgrad", False)
        weight.zero_out_wgrad = False

        def write(*unused: Any) -> None:
            if weight.grad is not None:
                first = weight in self.unwritten
                if first and weight.main_grad is None:
                    weight.main_grad = weight.grad
                elif first:
                    weight.main_grad.copy_(weight.grad)
                elif self.ddp_config.grad_reduce_in_fp32:
                    weight.main_grad = weight.main_grad.float()
                self.unwritten.discard(weight)
                weight.grad_added_to_main_grad = first  # so that Megatron adds those that follow
            hook(*unused)

        return write

    return make_hook


class _Embedding(torch.autograd.Function):
    """Rows [..., width] of a weight [vocabulary, width], with a sparse gradient of those rows.

    What the places of a token say is added in float32, and rounded once.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, ids: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return embedding(ids, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        [ids], [grad] = ctx.saved_tensors, grads
        rows, row_of = ids.unique(return_inverse=True)
        sums = torch.zeros(len(rows), grad.shape[-1])
        sums.index_add_(0, row_of.flatten(), grad.flatten(0, -2).float())
        known = {"is_coalesced": True, "check_invariants": True}
        return None, torch.sparse_coo_tensor(rows[None], sums.to(grad.dtype), ctx.shape, **known)


def few_rows(original: Any) -> Any:
    """Makes a sparse gradient of an embedding that is the head, too, where one rank has all of it.

    A dense one is as large as the vocabulary, to be filled with zeros and added to the head's.
    """

    def forward(self: Any, ids: Tensor) -> Any:
        split = self.tp_group.size() > 1 or self.reduce_scatter_embeddings
        if split or not getattr(self.weight, "tied", False):
            return original(self, ids)
        return _Embedding.apply(ids, self.weight)

    return forward


def end_gradients(original: Any) -> Any:
    """Gives what has no gradient zeros, and gradients that ranks add up float32."""

    def finish_grad_sync(self: Any, *args: Any) -> None:
        among_ranks = torch.distributed.get_world_size() > 1
        for weight in _in_no_buffer(self):
            if weight in self.unwritten:
                weight.main_grad = torch.zeros_like(weight)
            if among_ranks and self.ddp_config.grad_reduce_in_fp32:
                weight.main_grad = weight.main_grad.float()
            self.unwritten.discard(weight)
        for weight in self.unwritten:
            weight.main_grad.zero_()
        self.unwritten = set()
        original(self, *args)

    return finish_grad_sync


def _in_no_buffer(parts: Any) -> Iterator[Any]:
    """Weights whose gradients are in memory of their own."""
    for buffer in (*parts.buffers, *getattr(parts, "expert_parallel_buffers", ())):
        if not buffer.shared:
            yield from buffer.params


def scale_each(original: Any) -> Any:
    """Notes what gradients are to be multiplied by, for the update to do as it reads them."""

    def scale_gradients(self: Any, factor: float) -> None:
        if self.shared:
            original(self, factor)
        else:
            for weight in self.params:
                _multiply(weight.main_grad, factor)

    return scale_gradients


def _factor(gradient: Any) -> float:
    """What a gradient is still to be multiplied by."""
    return getattr(gradient, "factor", 1.0)


def _multiply(gradient: Any, factor: float) -> None:
    gradient.factor = _factor(gradient) * factor


def handed_on(original: Any) -> Any:
    """Leaves gradients to the optimizer alone, in the type that they have.

    Megatron gives it copies in float32, and keeps its own until the next step.
    """

    def copy_model_grads_to_main_grads(self: Any) -> None:
        if any(buffer.shared for buffer in self.buffers):
            original(self)
            return
        weights = chain(*self.model_float16_groups, *self.model_fp32_groups)
        updated = chain(*self.shard_fp32_from_float16_groups, *self.shard_fp32_groups)
        for weight, main in zip(weights, updated, strict=True):
            if main.dtype != weight.dtype:
                main.grad_dtype = None  # any
            main.grad = weight.main_grad.view(-1)
            main.grad.factor = _factor(weight.main_grad)
            weight.main_grad = None

    return copy_model_grads_to_main_grads


def among_several(original: Any) -> Any:
    """Leaves what is in its place already, as all of a buffer is in a group of one."""

    def collective(output: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs["group"].size() > 1:
            return original(output, tensor, *args, **kwargs)
        assert output.data_ptr() == tensor.data_ptr(), "a group of one has all of the buffer"
        return None

    return collective


def norm_of_all(original: object) -> Any:
    """The norm of gradients of any type, with what they are still to be multiplied by."""

    def l2_norm(size: int, unused: Tensor, gradients: Any, *args: object) -> tuple[Tensor, None]:
        squares = [_factor(g) ** 2 * _square(g) for one in gradients for g in one]
        return torch.tensor([math.sqrt(math.fsum(squares))]), None

    return l2_norm


def _square(gradient: Tensor) -> float:
    """The sum of squares in float32, block by block; PyTorch's norm of bfloat16 is slower."""
    blocks = (block.float() for block in gradient.view(-1).split(BLOCK))
    return math.fsum(torch.dot(block, block).item() for block in blocks)


def clip_by_norm(original: object) -> Any:
    """Megatron's limit, of which only what gradients are to be multiplied by is noted."""

    def clip(
        parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False
    ) -> None:
        scale = max_norm / (total_norm + 1.0e-6)
        if scale < 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    _multiply(parameter.grad, scale)

    return clip


class _Whole:
    """One kind of an optimizer's state as if it were in one tensor; a slice is a weight's own."""

    def __init__(self, states: dict[int, dict[str, Tensor]], kind: str) -> None:
        self._states, self._kind = states, kind

    def __getitem__(self, place: slice) -> Tensor:
        return self._states[place.start][self._kind].detach().flatten()


def state_in_place(original: Any) -> Any:
    """Gives a checkpoint the optimizer's state itself where one rank has all of it.

    Megatron gathers it into the host's memory, which takes three copies. On a CPU that is where the
    model is; what writes a checkpoint is forked, so it sees the state as it was.
    """

    def get_parameter_state_dp_zero(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.data_parallel_group.size() > 1:
            return original(self, *args, **kwargs)
        found: dict[Any, Any] = {"buckets_coalesced": True}
        for number, (buffer, ranges) in enumerate(zip(self.buffers, self.gbuf_ranges, strict=True)):
            states = {
                place[0]: self._get_main_param_and_optimizer_states(weight)
                for weight, place in buffer.param_index_map.items()
            }
            kinds = {kind: _Whole(states, kind) for kind in ("param", "exp_avg", "exp_avg_sq")}
            [dtype] = ranges
            found[number] = {dtype: {**kinds, "numel_unpadded": buffer.numel_unpadded}}
        return found

    return get_parameter_state_dp_zero


def with_its_writer(original: Any) -> Any:
    """Leaves what a checkpoint copies to the process that writes it, which is forked with it.

    Megatron holds it until all is on the disk, though it asks for no more than its length.
    """

    def schedule_async_call(self: Any, request: Any) -> None:
        original(self, request)
        if request.async_fn is not None:
            _, buckets, *_ = request.async_fn_args
            buckets[:] = [None] * len(buckets)

    return schedule_async_call


def fused(original: Any) -> Any:
    """Makes AdamW what TransformerEngine's is: fused, and with a group's number of steps in it.

    The fused kernel is 5 times as fast. PyTorch has a number of steps for each weight instead,
    with which Megatron's distributed optimizer cannot load its reshardable state. And it wants
    gradients that are float32 and scaled, which here they come to be block by block.
    """

    class FusedAdamW(original):  # type: ignore[misc]
        def __setstate__(self, state: dict[str, Any]) -> None:
            torch.optim.Optimizer.__setstate__(self, state)  # AdamW's looks for steps of weights

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for weight in group["params"]:
                    if weight.grad is not None:
                        _update(weight, self.state[weight], group)
                        weight.grad = None

    return FusedAdamW


def _update(weight: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """One step of a weight from its gradient, which it may overwrite, and its two means."""
    assert weight.grad is not None
    if not state:
        state.update({kind: torch.zeros_like(weight) for kind in ("exp_avg", "exp_avg_sq")})
    divisor = torch.tensor(1 / _factor(weight.grad))
    whole = (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])
    for block, gradient, mean, square in zip(*(t.view(-1).split(BLOCK) for t in whole)):
        adamw(
            [block],
            [gradient.float()],
            [mean],
            [square],
            [],
            [torch.tensor(group["step"] - 1.0)],
            fused=True,
            grad_scale=divisor,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
