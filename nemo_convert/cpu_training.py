"""Gradients and optimizer of a training on a CPU, in the place of Megatron's, with their results.

Megatron's are made for CUDA's kernels, and for ranks of which each has a part. ``cpu_backend`` says
where these stand, and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def with_cuda_type_names(original: Any) -> Any:
    """Names parameter types as CUDA would while the mixed-precision optimizer compares strings."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        type_of = torch.Tensor.type
        torch.Tensor.type = lambda tensor: type_of(tensor).replace("torch.", "torch.cuda.", 1)  # type: ignore[assignment,method-assign]
        try:
            original(self, *args, **kwargs)
        finally:
            torch.Tensor.type = type_of  # type: ignore[method-assign]

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

    def shard_buffer(buffer: torch.Tensor, ranks: int) -> Any:
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
        weight.zero_out_wgrad = False  # has every gradient added, for sums that are fused on CUDA

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


def end_gradients(original: Any) -> Any:
    """Gives gradients the type that they are wanted in, and what has none zeros."""

    def finish_grad_sync(self: Any, *args: Any) -> None:
        for weight in _in_no_buffer(self):
            if weight in self.unwritten:
                weight.main_grad = torch.zeros_like(weight)
            if self.ddp_config.grad_reduce_in_fp32:
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
    """Scales gradients where they are."""

    def scale_gradients(self: Any, factor: float) -> None:
        if self.shared:
            original(self, factor)
        else:
            for weight in self.params:
                weight.main_grad *= factor

    return scale_gradients


def handed_on(original: Any) -> Any:
    """Leaves gradients to the optimizer alone, which lets go of them when it has used them."""

    def copy_model_grads_to_main_grads(self: Any) -> None:
        original(self)
        for weight in _in_no_buffer(self):
            weight.main_grad = None

    return copy_model_grads_to_main_grads


def among_several(original: Any) -> Any:
    """Leaves what is in its place already, as all of a buffer is in a group of one."""

    def collective(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs["group"].size() > 1:
            return original(output, tensor, *args, **kwargs)
        assert output.data_ptr() == tensor.data_ptr(), "a group of one has all of the buffer"
        return None

    return collective


def clip_by_norm(original: object) -> Any:
    """The same arithmetic as Megatron's, without its CUDA tensor type assertion."""

    def clip(
        parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False
    ) -> None:
        scale = max_norm / (total_norm + 1.0e-6)
        if scale < 1.0:
            for parameter in parameters if isinstance(parameters, list) else [parameters]:
                gradient = parameter.decoupled_grad if use_decoupled_grad else parameter.grad
                if gradient is not None:
                    gradient.mul_(scale)

    return clip


class _Whole:
    """One kind of an optimizer's state as if it were in one tensor; a slice is a weight's own."""

    def __init__(self, states: dict[int, dict[str, torch.Tensor]], kind: str) -> None:
        self._states, self._kind = states, kind

    def __getitem__(self, place: slice) -> torch.Tensor:
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
    with which Megatron's distributed optimizer cannot load its reshardable state.
    """

    class FusedAdamW(original):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"fused": True, **kwargs})

        def __setstate__(self, state: dict[str, Any]) -> None:
            torch.optim.Optimizer.__setstate__(self, state)  # AdamW's looks for steps of weights

        def step(self, closure: Any = None) -> Any:
            known = [
                (self.state[weight], float(group.get("step", 0)))
                for group in self.param_groups
                for weight in group["params"]
                if weight in self.state
            ]
            for state, steps in known:
                state["step"] = torch.tensor(steps)
            loss = super().step(closure)
            for state in self.state.values():
                state.pop("step", None)
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for weight in group["params"]:
                    weight.grad = None
            return loss

    return FusedAdamW
