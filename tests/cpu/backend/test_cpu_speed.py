"""Speed patches give the same gradients, norms and checkpoints as the functions they replace."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nemo_convert import nemo
from recipes.backend import SPEED_PATCH_NAMES, cpu_speed, without_cuda
from recipes.backend.adamw import pending_scale
from recipes.backend.cpu_speed import SPEED_PATCHES, speed_patches
from recipes.backend.without_cuda import enable

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="active only without CUDA")


class Tied(nn.Module):
    """Uses the weight ``tied`` twice, like a tied embedding.

    Uses the weight ``optional`` only if ``all_weights`` is true.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Parameter(torch.randn(5, 5, dtype=torch.bfloat16))
        # Megatron sets this on tied embeddings.
        self.tied.zero_out_wgrad = True  # type: ignore[attr-defined]
        self.optional = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor, all_weights: bool) -> torch.Tensor:
        hidden = x @ self.tied @ self.tied.t()
        return (hidden * self.optional if all_weights else hidden).square().sum()


Wrap = Callable[..., Any]
Batch = tuple[torch.Tensor, bool]
"""A micro-batch: the arguments ``x`` and ``all_weights`` of ``Tied.forward``."""


@pytest.fixture
def wrap() -> Iterator[Wrap]:
    """A function that wraps a new ``Tied`` in Megatron's DDP. All speed patches are applied.

    The function's arguments are fields of ``DistributedDataParallelConfig``.
    """
    enable()
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    nemo.initialize(nemo.Parallelism())
    torch.manual_seed(1)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)

    def wrap_model(**settings: bool) -> Any:
        return DistributedDataParallel(config, DistributedDataParallelConfig(**settings), Tied())

    with speed_patches(SPEED_PATCHES):
        yield wrap_model


def apply_pending_scale(gradient: Any) -> torch.Tensor:
    """Returns the gradient in float32, multiplied by its pending scale, if it has one."""
    return gradient.float() * (pending_scale(gradient) or 1.0)  # type: ignore[no-any-return]


def expected_gradients(model: nn.Module, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Returns each weight's gradient: plain PyTorch's gradients, summed over batches in float32."""
    sums = {name: torch.zeros(weight.shape) for name, weight in model.named_parameters()}
    for x, all_weights in batches:
        plain = Tied()
        plain.load_state_dict(model.state_dict())
        plain(x, all_weights).backward()
        for name, weight in plain.named_parameters():
            sums[name] += 0 if weight.grad is None else weight.grad.float()
    return sums


@needs_no_cuda
@pytest.mark.parametrize(
    ("micro_batches", "distributed", "overlap"),
    [
        # Without overlap. In two cases, no micro-batch uses the optional weight.
        *product([[True], [True, True], [False, True], [False], []], [True, False], [False]),
        # With overlap.
        ([True], True, True),
        # Megatron requires here that the last micro-batch uses all weights.
        ([False, True], True, True),
    ],
)
def test_each_step_has_its_own_gradients(
    wrap: Wrap, micro_batches: list[bool], distributed: bool, overlap: bool
) -> None:
    """A step's gradients are the scaled float32 sum over its micro-batches only.

    ``micro_batches`` says of each micro-batch whether it uses the optional weight.
    """
    settings = {"use_distributed_optimizer": distributed, "overlap_grad_reduce": overlap}
    wrapped = wrap(grad_reduce_in_fp32=True, **settings)
    for _ in range(2):  # two steps
        batches = [
            (torch.randn(3, 5, dtype=torch.bfloat16), all_weights) for all_weights in micro_batches
        ]
        expected = expected_gradients(wrapped.module, batches)
        wrapped.zero_grad_buffer()
        for number, (x, all_weights) in enumerate(batches):
            for group in wrapped.bucket_groups:
                group.is_last_microbatch = number == len(batches) - 1
            wrapped(x, all_weights).backward()
        wrapped.finish_grad_sync()
        wrapped.scale_gradients(0.5)
        for name, weight in wrapped.module.named_parameters():
            assert torch.equal(apply_pending_scale(weight.main_grad), expected[name] / 2)
            weight.main_grad.fill_(7)  # must not reach the next step


@needs_no_cuda
def test_gradients_of_a_single_rank_reach_the_optimizer_without_a_copy(wrap: Wrap) -> None:
    """With one rank, Megatron's gradient buffer is freed. The optimizer gets autograd's tensors."""
    wrapped = wrap(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    [buffer] = wrapped.buffers
    assert buffer.grad_data.untyped_storage().nbytes() == 0
    wrapped.zero_grad_buffer()
    assert {weight.main_grad for weight in buffer.params} == {None}
    wrapped(torch.randn(3, 5, dtype=torch.bfloat16), True).backward()
    assert {weight.main_grad.dtype for weight in buffer.params} == {torch.bfloat16}
    wrapped.finish_grad_sync()
    wrapped.scale_gradients(0.5)
    weights = list(buffer.params)
    gradients = [weight.main_grad for weight in weights]
    main_weights = [nn.Parameter(weight.detach().float().flatten()) for weight in weights]
    # The attributes of Megatron's distributed optimizer that the patch reads.
    optimizer = SimpleNamespace(
        buffers=[buffer],
        model_float16_groups=[weights],
        model_fp32_groups=[],
        shard_fp32_from_float16_groups=[main_weights],
        shard_fp32_groups=[],
    )
    # ``pytest.fail`` replaces Megatron's function, which must not be called.
    cpu_speed._hand_over_gradients(pytest.fail)(optimizer)
    assert {weight.main_grad for weight in weights} == {None}
    for main_weight, gradient in zip(main_weights, gradients, strict=True):
        assert main_weight.grad is not None
        assert main_weight.grad.data_ptr() == gradient.data_ptr()
        assert main_weight.grad.dtype == torch.bfloat16
        assert pending_scale(main_weight.grad) == 0.5


@needs_no_cuda
def test_a_forked_checkpoint_writer_has_the_tensors_that_its_parent_freed(wrap: Wrap) -> None:
    """The fixture ``wrap`` applies the patch that frees them."""
    from megatron.core.dist_checkpointing.strategies.async_utils import (
        AsyncRequest,
        TemporalAsyncCaller,
    )

    receiver, sender = multiprocessing.Pipe(duplex=False)
    buckets = [torch.arange(3), torch.arange(4)]

    def write(rank: int, tensors: list[torch.Tensor]) -> None:
        sender.send([tensor.tolist() for tensor in tensors])

    caller = TemporalAsyncCaller()
    caller.schedule_async_call(AsyncRequest(write, (0, buckets), []))
    assert buckets == [None, None]  # freed in this process
    assert receiver.recv() == [[0, 1, 2], [0, 1, 2, 3]]
    assert caller.is_current_async_call_done(blocking=True)
    # A rank that has nothing to write makes such a request. It must not fail.
    caller.schedule_async_call(AsyncRequest(None, (), []))


@pytest.mark.parametrize(("ranks", "calls"), [(1, 0), (2, 1)])
def test_a_gather_in_a_group_of_one_rank_is_skipped(ranks: int, calls: int) -> None:
    """With one rank, the shard must be the whole buffer. A shard in other memory is an error.

    ``calls`` is the expected number of gathers that are not skipped.
    """
    gathered, buffer = list[torch.Tensor](), torch.arange(4.0)
    group = SimpleNamespace(size=lambda: ranks)
    gather = cpu_speed._skip_single_rank_gather(lambda output, *_, **__: gathered.append(output))
    gather(buffer.view(-1), buffer, group=group, async_op=True)
    assert len(gathered) == calls
    if ranks == 1:
        with pytest.raises(AssertionError, match="whole buffer"):
            gather(torch.empty(4), buffer, group=group)


@needs_no_cuda
@pytest.mark.parametrize("has_pending_scale", [True, False])
def test_gradients_are_clipped_to_the_norm(
    has_pending_scale: bool, wrap: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of three parameters has no gradient. The others have 4 elements of 1.5 each."""
    from megatron.core.optimizer import optimizer

    monkeypatch.setattr(cpu_speed, "BLOCK", 3)  # two blocks per gradient
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    for parameter, dtype in zip(parameters[1:], (torch.bfloat16, torch.float32), strict=True):
        parameter.grad_dtype = None  # else PyTorch refuses a bfloat16 gradient here
        parameter.grad = torch.full((4,), 3.0 if has_pending_scale else 1.5, dtype=dtype)
        if has_pending_scale:
            parameter.grad.pending_scale = 0.5  # type: ignore[attr-defined]

    def norm() -> float:
        gradients = [p.grad for p in parameters if p.grad is not None]
        group = torch.distributed.group.WORLD
        return float(optimizer.get_grad_norm_fp32(gradients, grad_stats_parallel_group=group))

    assert norm() == pytest.approx(math.sqrt(8 * 1.5**2))
    optimizer.clip_grad_by_total_norm_fp32(parameters, max_norm=1.5, total_norm=norm())
    # Without a pending scale, clipping rounds the bfloat16 gradient once more.
    tolerance = 1e-4 if has_pending_scale else 5e-3
    assert norm() == pytest.approx(1.5, rel=tolerance)
    # The norm is below this limit, so there is nothing to clip.
    optimizer.clip_grad_by_total_norm_fp32(parameters, max_norm=9.0, total_norm=norm())
    assert norm() == pytest.approx(1.5, rel=tolerance)
    parameters[1].grad[2] = math.nan
    assert math.isnan(norm())


@needs_no_cuda
def test_tensor_types_have_cuda_names_only_while_the_optimizer_is_built() -> None:
    """Megatron's optimizer accepts a parameter only if its type has a CUDA name."""
    names_in_constructor = []

    class Optimizer:
        def __init__(self) -> None:
            names_in_constructor.append(torch.zeros(1, dtype=torch.bfloat16).type())

    patched_init = without_cuda._name_cuda_types(Optimizer.__init__)
    patched_init(Optimizer.__new__(Optimizer))
    assert names_in_constructor == ["torch.cuda.BFloat16Tensor"]
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_no_speed_patch_is_active_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    from megatron.core.distributed import DistributedDataParallel

    assert set(SPEED_PATCH_NAMES) == SPEED_PATCHES.keys()  # so all patches are checked
    before = DistributedDataParallel._make_backward_post_hook
    with speed_patches(SPEED_PATCH_NAMES):
        assert DistributedDataParallel._make_backward_post_hook is before
