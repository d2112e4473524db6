"""Patches that reduce the time or memory of training on a CPU. Results change by rounding at most.

Patches of gradients have an effect only with one rank. Patches of gathers and optimizer state have
an effect only with one data-parallel rank. ``stages.distill.cpu_speed_patches=[]`` disables all
patches. ``python -m benchmarks.distill --only nemo-cached-compiled without-NAME`` measures what the
set ``NAME`` saves; see benchmarks/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from recipes.backend.adamw import BLOCK, MOMENTS, pending_scale, scale_gradient
from recipes.backend.device import device
from recipes.backend.patches import Patch, applied, replace_with

BUFFERS = "megatron.core.distributed.param_and_grad_buffer"
OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"


def speed_patches(names: Iterable[str]) -> AbstractContextManager[None]:
    """Applies these sets of ``SPEED_PATCHES`` in a ``with`` block. On CUDA, applies none."""
    on_cpu = device() == "cpu"
    return applied(patch for name in names for patch in SPEED_PATCHES[name] if on_cpu)


class _CompletedCollective:
    """Handle of a collective operation that was skipped."""

    def wait(self) -> None:
        """Returns at once."""


def _unshare_gradients(original: Any) -> Any:
    """Frees Megatron's float32 buffer of all gradients if the gradients are unshared.

    Unshared means that no other rank adds to a gradient. The optimizer can then read and free
    autograd's own tensor instead of the buffer. Megatron would never free the buffer.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        self.unshared = (
            torch.distributed.get_world_size() == 1
            # ``_hand_over_gradients`` patches only this optimizer.
            and self.ddp_config.use_distributed_optimizer
            # ``_skip_reduction`` also skips the multiplication by this factor.
            and self.gradient_scaling_factor == 1
        )
        for weight in self.params:
            weight.has_unshared_gradient = self.unshared
        if self.unshared:  # frees the memory, but keeps the tensor object
            self.grad_data.untyped_storage().resize_(0)

    return __init__


def _drop_gradients(original: Any) -> Any:
    """Drops unshared gradients when a step starts. Megatron would fill the buffer with zeros."""

    def reset(self: Any) -> None:
        if not self.unshared:
            original(self)
            return
        for weight in self.params:
            weight.main_grad = None

    return reset


def _keep_first_gradient(original: Any) -> Any:
    """Stores a parameter's first gradient in a step. Megatron would add this gradient to zeros."""

    def _make_backward_post_hook(self: Any, weight: Any) -> Any:
        hook = original(self, weight)
        if not weight.has_unshared_gradient:
            return hook
        weight.zero_out_wgrad = False  # else the hook would add the gradient once more

        def keep_or_add(*hook_args: Any) -> None:
            if weight.grad is not None:
                if weight.main_grad is None:
                    weight.main_grad = weight.grad
                else:
                    if self.ddp_config.grad_reduce_in_fp32:
                        weight.main_grad = weight.main_grad.float()
                    # Adding in place is safe: no other tensor shares the storage of ``main_grad``.
                    weight.main_grad.add_(weight.grad)
                weight.grad_added_to_main_grad = True
            hook(*hook_args)

        return keep_or_add

    return _make_backward_post_hook


def _skip_reduction(original: Any) -> Any:
    """Skips the reduction of unshared gradients.

    Parameters without a gradient get zeros, as in Megatron's buffer, because later functions read
    the gradient of every parameter.
    """

    def start_grad_sync(self: Any) -> None:
        weights = [weight for bucket in self.buckets for weight in bucket.params_list]
        if not weights[0].has_unshared_gradient:  # equal for all weights of a buffer
            original(self)
            return
        for weight in weights:
            if weight.main_grad is None:
                weight.main_grad = torch.zeros_like(weight)
        if self.ddp_config.overlap_grad_reduce:
            self.grad_reduce_handle = _CompletedCollective()  # Megatron calls its ``wait``

    return start_grad_sync


def _defer_scaling(original: Any) -> Any:
    """Defers the scaling of unshared gradients until ``FusedAdamW`` reads them."""

    def scale_gradients(self: Any, factor: float) -> None:
        if not self.unshared:
            original(self, factor)
            return
        for weight in self.params:
            if pending_scale(weight.main_grad) is None:
                weight.main_grad.pending_scale = 1.0
            scale_gradient(weight.main_grad, factor)

    return scale_gradients


def _hand_over_gradients(original: Any) -> Any:
    """Hands unshared gradients to the optimizer without converting them.

    Megatron would give float32 copies to the optimizer and keep the originals until the next step.
    """

    def _copy_model_grads_to_main_grads(self: Any) -> None:
        if not all(buffer.unshared for buffer in self.buffers):
            original(self)
            return
        # With one rank, the optimizer's shard of a weight is the whole weight.
        weights = chain(*self.model_float16_groups, *self.model_fp32_groups)
        main_weights = chain(*self.shard_fp32_from_float16_groups, *self.shard_fp32_groups)
        for weight, main_weight in zip(weights, main_weights, strict=True):
            if main_weight.dtype != weight.dtype:
                main_weight.grad_dtype = None  # else PyTorch refuses a bfloat16 gradient here
            main_weight.grad = weight.main_grad.view(-1)
            # The attribute tells FusedAdamW to convert the gradient block by block.
            main_weight.grad.pending_scale = _scale_of(weight.main_grad)
            weight.main_grad = None

    return _copy_model_grads_to_main_grads


def _scale_of(gradient: Tensor) -> float:
    """Returns the gradient's pending scale; 1 if scaling is not deferred."""
    scale = pending_scale(gradient)
    return 1.0 if scale is None else scale


def _norm_with_pending_scales(original: Any) -> Any:
    """Computes the joint norm of gradients of any dtype, after multiplying by pending scales."""

    # Has the signature of Apex's kernel. Callers ignore the second result.
    def l2_norm(
        chunk_size: int, overflow: Tensor, tensor_lists: Any, *args: Any
    ) -> tuple[Tensor, None]:
        squares = [
            _scale_of(gradient) ** 2 * _sum_of_squares(gradient)
            for gradients in tensor_lists
            for gradient in gradients
        ]
        return torch.tensor([math.sqrt(math.fsum(squares))]), None

    return l2_norm


def _sum_of_squares(gradient: Tensor) -> float:
    """Sums squares in float32, block by block. PyTorch's norm is slower and rounds in bfloat16."""
    blocks = (block.float() for block in gradient.view(-1).split(BLOCK))
    return math.fsum(torch.dot(block, block).item() for block in blocks)


def _skip_single_rank_gather(original: Any) -> Any:
    """Skips the all-gather of parameters in a group of one rank.

    Input and output are then the same buffer, which gloo would copy onto itself.
    """

    def all_gather(output: Tensor, shard: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs["group"].size() > 1:
            return original(output, shard, *args, **kwargs)
        same_memory = output.data_ptr() == shard.data_ptr()
        assert same_memory, "with one rank, the input of a gather must be the whole buffer"
        return None

    return all_gather


class _Concatenation:
    """One optimizer state, such as ``exp_avg``, of all parameters, without a copy in one tensor.

    Can be sliced like a flat tensor, but a slice must be the range of one parameter. Megatron
    requests no other slices. ``states`` maps the position of a parameter's first element to the
    parameter's state.
    """

    def __init__(self, states: dict[int, Tensor]) -> None:
        self._states = states

    def __getitem__(self, elements: slice) -> Tensor:
        return self._states[elements.start].detach().flatten()


def _share_optimizer_state(original: Any) -> Any:
    """Gives a checkpoint the optimizer's own tensors. Megatron would copy them three times.

    The forked process that writes the checkpoint sees the state at the time of the fork.
    """

    def get_parameter_state_dp_zero(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.data_parallel_group.size() > 1:
            return original(self, *args, **kwargs)
        result: dict[Any, Any] = {"buckets_coalesced": True}
        for index, (buffer, ranges) in enumerate(zip(self.buffers, self.gbuf_ranges, strict=True)):
            states = {
                start: self._get_main_param_and_optimizer_states(weight)
                for weight, (start, *_) in buffer.param_index_map.items()
            }
            tensors = {
                name: _Concatenation({start: state[name] for start, state in states.items()})
                for name in ("param", *MOMENTS)
            }
            [dtypes] = ranges  # the only key: dtypes of the buffer's parameters and gradients
            result[index] = {dtypes: {**tensors, "numel_unpadded": buffer.numel_unpadded}}
        return result

    return get_parameter_state_dp_zero


def _release_buckets(original: Any) -> Any:
    """Frees this process's copies of weights once a forked process writes the checkpoint.

    Megatron would keep the copies, in lists called buckets, until the checkpoint is written. After
    the fork, this process needs only the number of buckets.
    """

    def schedule_async_call(self: Any, request: Any) -> None:
        original(self, request)
        if request.async_fn is not None:
            _, buckets, *_ = request.async_fn_args
            # Megatron holds this list, so its elements are replaced in place.
            buckets[:] = [None] * len(buckets)

    return schedule_async_call


SPEED_PATCHES: dict[str, tuple[Patch, ...]] = {
    "unshared_gradients": tuple(  # saves 13% of a step and 0.8 GB
        Patch(target, "gradients of a single rank are not reduced", fingerprint, replace)
        for target, fingerprint, replace in (
            (f"{BUFFERS}:_ParamAndGradBuffer.__init__", "351bb840492a", _unshare_gradients),
            (f"{BUFFERS}:_ParamAndGradBuffer.reset", "ad271bc659a5", _drop_gradients),
            (f"{BUFFERS}:_ParamAndGradBuffer.scale_gradients", "fccbc1058068", _defer_scaling),
            (
                f"{BUFFERS}:_ParamAndGradBucketGroup.start_grad_sync",
                "87b697030080",
                _skip_reduction,
            ),
            (
                "megatron.core.distributed:DistributedDataParallel._make_backward_post_hook",
                "9169a75194c2",
                _keep_first_gradient,
            ),
            (f"{OPTIMIZER}._copy_model_grads_to_main_grads", "ffcdecd38d14", _hand_over_gradients),
            (
                "megatron.core.optimizer.clip_grads:l2_norm_impl",
                "01526c55444a",
                _norm_with_pending_scales,
            ),
        )
    ),
    "attention_backward": (  # saves 10% of a step
        Patch(
            "recipes.backend.training_layers:BLOCKWISE_BACKWARD",
            "PyTorch's backward pass is slow for short sequences",
            "bool",
            replace_with(True),
        ),
    ),
    "single_rank_gather": (  # saves 13% of a step and 0.1 GB
        Patch(
            f"{BUFFERS}:dist_all_gather_func",
            "gloo copies a buffer onto itself",
            "f6341959287e",
            _skip_single_rank_gather,
        ),
    ),
    "shared_optimizer_state": (  # saves 2.3 GB
        Patch(
            f"{OPTIMIZER}.get_parameter_state_dp_zero",
            "a checkpoint copies the optimizer's state three times",
            "812c52ea4568",
            _share_optimizer_state,
        ),
    ),
    "released_buckets": (  # saves 0.14 GB
        Patch(
            "megatron.core.dist_checkpointing.strategies.async_utils:TemporalAsyncCaller.schedule_async_call",
            "copies of weights stay in memory while another process writes them",
            "7fe6223559f7",
            _release_buckets,
        ),
    ),
}
"""Sets of patches by name. Comments state the step time and peak memory that each set saves when a
student of SmolLM2-135M is trained. Remove a set that saves less than 3% and less than 100 MB."""
