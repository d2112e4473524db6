"""What replaces Megatron's gradients and optimizer on a CPU has their results."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.adamw import AdamW  # not from torch.optim, where it may have been replaced

from nemo_convert import cpu_backend, cpu_training, nemo

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="active only without CUDA")


class Two(nn.Module):
    """A weight that is used twice, as a tied embedding is, and one that is not used each time."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(5, 5, dtype=torch.bfloat16))
        self.both.zero_out_wgrad = True  # type: ignore[attr-defined]
        self.one = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor, whole: bool) -> torch.Tensor:
        once = x @ self.both @ self.both.t()
        return (once * self.one if whole else once).square().sum()


Wrap = Callable[..., Any]


@pytest.fixture
def wrap() -> Wrap:
    """Wraps the two weights as Megatron does, with some settings."""
    cpu_backend.enable()
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    nemo.initialize(nemo.Parallelism())
    torch.manual_seed(1)
    shape = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)

    def wrapped(**settings: bool) -> Any:
        return DistributedDataParallel(shape, DistributedDataParallelConfig(**settings), Two())

    return wrapped


@needs_no_cuda
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("micro_batches", [[True], [True, True], [False, True], [False], []])
def test_a_steps_gradients_are_its_own(wrap: Wrap, micro_batches: list[bool], own: bool) -> None:
    """Of every step, whatever the step before left: the first as it is, the others added.

    Added in float32, and all scaled in the end.
    """
    wrapped = wrap(grad_reduce_in_fp32=True, use_distributed_optimizer=own)
    model = wrapped.module
    for _ in range(2):
        batches = [(torch.randn(3, 5, dtype=torch.bfloat16), whole) for whole in micro_batches]
        expected = {name: torch.zeros(weight.shape) for name, weight in model.named_parameters()}
        for x, whole in batches:
            used = dict(model.named_parameters()) if whole else {"both": model.both}
            plain = Two()
            plain.load_state_dict(model.state_dict())
            plain(x, whole).backward()
            for name in used:
                expected[name] += dict(plain.named_parameters())[name].grad.float()
        wrapped.zero_grad_buffer()
        for x, whole in batches:
            wrapped(x, whole).backward()
        wrapped.finish_grad_sync()
        wrapped.scale_gradients(0.5)
        for name, weight in model.named_parameters():
            found = weight.main_grad.float() * cpu_training._factor(weight.main_grad)
            assert torch.equal(found, expected[name] / 2)
            weight.main_grad.fill_(7)  # what must not be left in the step that follows


@needs_no_cuda
def test_gradients_of_one_rank_take_no_memory_before_they_are_made(wrap: Wrap) -> None:
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
    expected = [weight.main_grad for weight in weights]
    updated = [nn.Parameter(weight.detach().float().flatten()) for weight in weights]
    optimizer = SimpleNamespace(
        buffers=[buffer],
        model_float16_groups=[weights],
        model_fp32_groups=[],
        shard_fp32_from_float16_groups=[updated],
        shard_fp32_groups=[],
    )
    cpu_training.handed_on(pytest.fail)(optimizer)
    assert {weight.main_grad for weight in weights} == {None}
    for main, grad in zip(updated, expected, strict=True):
        assert main.grad is not None
        assert main.grad.data_ptr() == grad.data_ptr()
        assert main.grad.dtype == torch.bfloat16
        assert cpu_training._factor(main.grad) == 0.5


@needs_no_cuda
def test_what_ranks_add_up_is_in_float32(wrap: Wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = wrap(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped.zero_grad_buffer()
    wrapped(torch.randn(3, 5, dtype=torch.bfloat16), True).backward()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    wrapped.finish_grad_sync()
    assert {weight.main_grad.dtype for weight in wrapped.module.parameters()} == {torch.float32}


@needs_no_cuda
@pytest.mark.parametrize("settings", [{"grad_reduce_in_fp32": False}, {}])
def test_gradients_that_are_wanted_in_their_own_type_keep_it(
    wrap: Wrap, settings: dict[str, bool]
) -> None:
    wrapped = wrap(use_distributed_optimizer=True, **settings)
    wrapped.zero_grad_buffer()
    for _ in range(2):
        wrapped(torch.randn(3, 5, dtype=torch.bfloat16), False).backward()
    wrapped.finish_grad_sync()
    assert {weight.main_grad.dtype for weight in wrapped.module.parameters()} == {torch.bfloat16}


@needs_no_cuda
def test_a_writer_that_is_forked_has_what_is_let_go() -> None:
    """Megatron's own caller, whose process writes tensors that this one no longer has."""
    cpu_backend.enable()
    from megatron.core.dist_checkpointing.strategies.async_utils import (
        AsyncRequest,
        TemporalAsyncCaller,
    )

    nemo.initialize(nemo.Parallelism())
    ours, theirs = multiprocessing.Pipe(duplex=False)
    buckets = [torch.arange(3), torch.arange(4)]

    def write(rank: int, found: list[torch.Tensor]) -> None:
        theirs.send([tensor.tolist() for tensor in found])

    caller = TemporalAsyncCaller()
    caller.schedule_async_call(AsyncRequest(write, (0, buckets), []))
    assert buckets == [None, None]
    assert ours.recv() == [[0, 1, 2], [0, 1, 2, 3]]
    assert caller.is_current_async_call_done(blocking=True)
    caller.schedule_async_call(AsyncRequest(None, (), []))  # a rank that has nothing to write


@needs_no_cuda
@pytest.mark.parametrize("block", [2, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_update_is_adamws(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gradients of any type that are still to be scaled, in blocks; they are gone after it."""
    monkeypatch.setattr(cpu_training, "BLOCK", block)
    torch.manual_seed(2)
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    ours.grad_dtype = None
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.2, "eps": 1e-3}
    one = cpu_training.fused(AdamW)([ours], **settings)
    other = AdamW([theirs], **settings)
    for _ in range(3):
        gradient = torch.randn(5).to(dtype)
        theirs.grad = gradient.float() * 0.3
        cpu_training._multiply(gradient, 0.5)
        cpu_training._multiply(gradient, 0.6)
        ours.grad = gradient
        one.step()
        other.step()
        assert ours.grad is None
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert one.param_groups[0]["step"] == 3
    assert one.state[ours].keys() == {"exp_avg", "exp_avg_sq"}


@needs_no_cuda
def test_a_tied_embedding_adds_few_rows_to_the_heads_gradient() -> None:
    """Rows of one token are added in float32: in bfloat16 the many small ones would be lost."""
    torch.manual_seed(4)
    weight = nn.Parameter(torch.randn(7, 3).bfloat16())
    plain = nn.Parameter(weight.detach().float())
    ids = torch.tensor([[1, 5, 5], [1, 1, 0]])
    alone, whole = SimpleNamespace(size=lambda: 1), {"reduce_scatter_embeddings": False}
    layer = SimpleNamespace(weight=weight, tp_group=alone, **whole)
    weight.tied = True  # type: ignore[attr-defined]
    rows = cpu_training.few_rows(pytest.fail)(layer, ids)
    assert torch.equal(rows, weight[ids])
    head = torch.randn(7, 3).bfloat16()
    ((rows * 2).sum() + (weight * head).sum()).backward()
    ((plain[ids] * 2).sum() + (plain * head.float()).sum()).backward()
    assert weight.grad is not None
    assert not weight.grad.is_sparse
    assert torch.equal(weight.grad, plain.grad.bfloat16())
    weight.grad = None
    many = torch.zeros(1, 3000, dtype=torch.long)
    cpu_training.few_rows(pytest.fail)(layer, many).sum().backward()
    assert weight.grad.is_sparse
    rounded = torch.tensor(3000.0).bfloat16().item()
    assert weight.grad.to_dense()[0].tolist() == [rounded] * 3
    layer.tp_group = SimpleNamespace(size=lambda: 2)
    assert cpu_training.few_rows(lambda *_: "its own")(layer, ids) == "its own"
    layer = SimpleNamespace(weight=plain, tp_group=alone, **whole)
    assert cpu_training.few_rows(lambda *_: "its own")(layer, ids) == "its own"


@pytest.mark.parametrize(("ranks", "asked"), [(1, 0), (2, 1)])
def test_a_group_of_one_is_not_asked_for_what_it_has(ranks: int, asked: int) -> None:
    """Megatron's buffer of one rank is its own shard, in place."""
    calls, buffer = list[torch.Tensor](), torch.arange(4.0)
    group = SimpleNamespace(size=lambda: ranks)
    collective = cpu_training.among_several(lambda *args, **_: calls.append(*args[:1]))
    collective(buffer.view(-1), buffer, group=group, async_op=True)
    assert len(calls) == asked
    if ranks == 1:
        with pytest.raises(AssertionError, match="has all of the buffer"):
            collective(torch.empty(4), buffer, group=group)


@needs_no_cuda
def test_gradients_are_clipped_to_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Megatron finds and limits it, in any type, of what is still to be scaled."""
    cpu_backend.enable("torch", "megatron")
    from megatron.core.optimizer import optimizer

    nemo.initialize(nemo.Parallelism())
    monkeypatch.setattr(cpu_training, "BLOCK", 3)
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    for parameter, dtype in zip(parameters[1:], (torch.bfloat16, torch.float32), strict=True):
        parameter.grad_dtype = None
        parameter.grad = torch.full((4,), 3.0, dtype=dtype)
        cpu_training._multiply(parameter.grad, 0.5)

    def norm() -> float:
        gradients = [p.grad for p in parameters if p.grad is not None]
        group = torch.distributed.group.WORLD
        return float(optimizer.get_grad_norm_fp32(gradients, grad_stats_parallel_group=group))

    assert norm() == pytest.approx(math.sqrt(18))
    optimizer.clip_grad_by_total_norm_fp32(parameters, max_norm=1.5, total_norm=norm())
    assert norm() == pytest.approx(1.5, rel=1e-4)
    optimizer.clip_grad_by_total_norm_fp32(parameters, max_norm=9.0, total_norm=norm())
    assert norm() == pytest.approx(1.5, rel=1e-4)
    parameters[1].grad[2] = math.nan
    assert math.isnan(norm())


@needs_no_cuda
def test_type_names_are_cudas_only_while_the_optimizer_looks() -> None:
    seen = []

    class Optimizer:
        def __init__(self) -> None:
            seen.append(torch.zeros(1, dtype=torch.bfloat16).type())

    patched = cpu_training.with_cuda_type_names(Optimizer.__init__)
    patched(Optimizer.__new__(Optimizer))
    assert seen == ["torch.cuda.BFloat16Tensor"]
    assert torch.zeros(1).type() == "torch.FloatTensor"
