"""Compares losses on logits, and their gradients, with definitions in float64 and autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipes.core.compiled import compilation
from recipes.core.errors import RecipeError
from recipes.distillation.losses import (
    LogitsLoss,
    LossTargets,
    _chunk_losses,
    combined_loss,
    distillation_loss,
    token_cross_entropy,
)
from recipes.distillation.settings import LOGITS_LOSSES
from recipes.distillation.vocabulary import CHUNK_BYTES, TopK, top_k
from recipes.planning.workload import LOSS_BUFFERS, TOP_K_LOSS_BUFFERS
from tests.support.losses import loss_by_definition
from tests.support.ranks import run_ranks

TOKENS, VOCABULARY = 111, 101
CHUNK = 4 * VOCABULARY * 16
"""Bytes of a chunk of 16 rows in float32. ``TOKENS`` rows are 6 such chunks and one of 15 rows."""
LABELS = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))
EACH_LOSS = pytest.mark.parametrize("divergence", LOGITS_LOSSES)
EACH_TOP = pytest.mark.parametrize("top", [None, 7, VOCABULARY])
"""No top-k; a top-k whose tail is all other tokens; and a top-k of all tokens, without a tail."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes chunks so small that the tests' logits have several of them."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", CHUNK)


def make_logits(seed: int, scale: float = 3.0) -> Tensor:
    """Returns random logits [TOKENS, VOCABULARY] with a standard deviation of ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(TOKENS, VOCABULARY, dtype=torch.float64, generator=generator)


def loss_and_gradient(
    loss: Callable[..., Tensor], logits: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """Computes the losses per token of logits, and the gradient of the losses' weighted sum.

    About a third of the weights are 0, as in a loss mask. ``others`` are arguments of ``loss``.
    """
    values = torch.rand(2, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    weights = values[0] * (values[1] > 0.3)
    logits = logits.clone().requires_grad_()
    losses = loss(logits, *others)
    (losses * weights.to(losses.dtype)).sum().backward()
    assert logits.grad is not None
    return losses.detach(), logits.grad


def require_definition(
    student: Tensor,
    teacher: Tensor,
    loss: LogitsLoss,
    dtype: torch.dtype = torch.float32,
    atol: float = 1e-5,
    gradient: tuple[float, float] = (1e-4, 1e-6),
) -> None:
    """Compares the KD loss of logits in ``dtype`` with its definition in float64.

    ``atol`` is the absolute tolerance of losses. ``gradient`` has the relative and the absolute
    tolerance of the gradient of the losses' weighted sum, by the student's logits.
    """
    student, teacher = student.to(dtype), teacher.to(dtype)
    losses, loss_gradient = loss_and_gradient(distillation_loss, student, teacher, loss)
    exact = student.double(), teacher.double()
    expected, expected_gradient = loss_and_gradient(loss_by_definition, *exact, loss)
    assert (losses.dtype, loss_gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=atol)
    rtol, gradient_atol = gradient
    gradients = (loss_gradient.double(), expected_gradient)
    torch.testing.assert_close(*gradients, rtol=rtol, atol=gradient_atol)


@EACH_LOSS
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@EACH_TOP
def test_values_and_gradients_equal_the_definition(
    divergence: str, temperature: float, top: int | None
) -> None:
    for beta in (1e-3, 0.3, 0.5) if divergence == "jsd" else (0.5,):
        loss = LogitsLoss(divergence, temperature, beta, top)
        require_definition(make_logits(2), make_logits(1), loss)


@EACH_LOSS
@EACH_TOP
def test_bfloat16_logits_round_gradients_but_not_losses(divergence: str, top: int | None) -> None:
    # Random logits would have ties after rounding, so the top-k would not be unique. These levels
    # are distinct in bfloat16, too. Each token has them in a random order.
    levels = torch.arange(VOCABULARY, dtype=torch.float64) / 8 - 6
    order = torch.rand(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(1)).argsort(1)
    student, loss = make_logits(2), LogitsLoss(divergence, 2.0, top_k=top)
    require_definition(student, levels[order], loss, torch.bfloat16, gradient=(1.5e-2, 1e-6))


@EACH_LOSS
@EACH_TOP
def test_extreme_logits_stay_finite_and_exact(divergence: str, top: int | None) -> None:
    student, teacher = (80 * make_logits(seed).sign() for seed in (2, 1))  # all are 80 or -80
    # Makes the teacher's logits distinct, so that there is only one top-k.
    teacher = teacher - torch.arange(VOCABULARY) / 64
    for temperature in (1.0, 0.5):
        loss = LogitsLoss(divergence, temperature, top_k=top)
        require_definition(student, teacher, loss, atol=1e-4, gradient=(1e-4, 1e-4))


@EACH_LOSS
def test_a_cached_top_k_equals_a_computed_one(divergence: str) -> None:
    loss = LogitsLoss(divergence, 2.0, top_k=7)
    teacher = make_logits(1).float()
    cached = top_k(teacher, 7, 2.0)
    assert cached.indices.dtype == torch.int64
    student = make_logits(2).float()
    losses, gradient = loss_and_gradient(distillation_loss, student, cached, loss)
    expected, expected_gradient = loss_and_gradient(distillation_loss, student, teacher, loss)
    assert torch.equal(losses, expected)
    assert torch.equal(gradient, expected_gradient)


def test_samples_of_the_tail_are_unbiased() -> None:
    """The mean over samples equals the loss over the whole vocabulary, and so does its gradient.

    All rows have the same logits. Row r draws three tokens of the tail, at the quantiles q/3,
    (q + 1)/3 and (q + 2)/3 with q = (r + 0.5) / rows. All draws together cover the tail evenly.
    """
    draws, rows, loss = 3, 20_000, LogitsLoss(temperature=2.0)
    teacher, student = make_logits(1)[:1], make_logits(2)[:1]
    offsets = (torch.arange(rows) + 0.5) / rows
    quantiles = (offsets[:, None] + torch.arange(draws)) / draws
    repeated_teacher = teacher.float().expand(rows, -1)
    cached = top_k(repeated_teacher, 7, loss.temperature, quantiles=quantiles)
    assert cached.draws is not None
    # No draw is one of the top-k.
    assert not (cached.draws[:, :, None] == cached.indices[:, None]).any()
    exact_logits = student.clone().requires_grad_()
    expected = loss_by_definition(exact_logits, teacher, loss)
    expected.sum().backward()
    assert exact_logits.grad is not None
    means = []  # mean loss and mean gradient, first with draws and then without
    for source in (cached, TopK(cached.indices, cached.log_probs)):
        logits = student.float().expand(rows, -1).clone().requires_grad_()
        losses = distillation_loss(logits, source, loss)
        losses.sum().backward()
        assert logits.grad is not None
        means.append((losses.double().mean(), logits.grad.double().mean(dim=0)))
    (sampled_loss, sampled_gradient), (_, biased_gradient) = means
    exact_gradient = exact_logits.grad[0]
    torch.testing.assert_close(sampled_loss, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sampled_gradient, exact_gradient, rtol=0, atol=2e-4)
    bias = (biased_gradient - exact_gradient).abs().max()
    assert bias > 2e-2, "without draws the gradient is biased"
    # Other divergences refuse draws. ``map`` cuts the tensors to one row, as the student has.
    with pytest.raises(RecipeError, match="use forward_kl"):
        distillation_loss(student.float(), cached.map(lambda t: t[:1]), LogitsLoss("jsd"))


def test_a_tiny_tail_is_exact() -> None:
    """The tail's probability is too small to be computed as 1 - Σ top-k, even in float64."""
    logits = make_logits(1)
    logits[:, 3] += 90  # token 3 is the top-k, and all other tokens are the tail
    cached = top_k(logits.float(), 1, 1.0)
    tail = logits.float().double().log_softmax(-1)
    tail[:, 3] = -torch.inf
    assert (cached.indices == 3).all()
    log_tail = cached.log_probs[:, -1].double()  # the last column is for the tail
    torch.testing.assert_close(log_tail, tail.logsumexp(-1), rtol=1e-6, atol=0)


def test_cross_entropy_equals_torch() -> None:
    logits = make_logits(3, 20.0)
    reference = partial(torch.nn.functional.cross_entropy, reduction="none")
    losses, gradient = loss_and_gradient(token_cross_entropy, logits.float(), LABELS)
    expected, expected_gradient = loss_and_gradient(reference, logits, LABELS)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


@EACH_LOSS
@pytest.mark.parametrize("top", [None, 7])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_combined_loss_is_the_weighted_sum(
    divergence: str, top: int | None, temperature: float
) -> None:
    loss = LogitsLoss(divergence, temperature, top_k=top)
    student, teacher = make_logits(2).float(), make_logits(1).float()
    targets = LossTargets(teacher, LABELS, (0.5, 3.0))  # weights of the KD loss and the LM loss
    total, gradient = loss_and_gradient(lambda x: combined_loss(x, targets, loss)[0], student)
    expected, expected_gradient = loss_and_gradient(
        lambda x: 0.5 * distillation_loss(x, teacher, loss) + 3 * token_cross_entropy(x, LABELS),
        student,
    )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    terms = distillation_loss(student, teacher, loss), token_cross_entropy(student, LABELS)
    torch.testing.assert_close(combined_loss(student, targets, loss)[1], torch.stack(terms))


def test_a_second_backward_is_refused() -> None:
    student = make_logits(2).float().requires_grad_()
    losses = distillation_loss(student, make_logits(1).float(), LogitsLoss()).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward()


class Allocations(TorchDispatchMode):
    """Records the number of elements of the largest new tensor of each type."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = {torch.float32: 0, torch.bfloat16: 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        existing = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        outputs = func(*args, **kwargs)
        for tensor in tensors(outputs):
            if tensor.untyped_storage().data_ptr() not in existing:  # the memory is new
                self.largest[tensor.dtype] = max(self.largest.get(tensor.dtype, 0), tensor.numel())
        return outputs


def tensors(tree: Any) -> list[Tensor]:
    """Returns all tensors in nested lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("trained", [True, False])
@EACH_LOSS
@pytest.mark.parametrize("top", [None, 7])
def test_no_full_size_float32_tensor_exists(
    trained: bool, divergence: str, top: int | None
) -> None:
    student = make_logits(2).bfloat16().requires_grad_(trained)
    teacher = make_logits(1).bfloat16()
    with Allocations() as allocations:
        loss = LogitsLoss(divergence, 2.0, 0.5, top)
        total, _ = combined_loss(student, LossTargets(teacher, LABELS, (1.0, 1.0)), loss)
        total = total + token_cross_entropy(student, LABELS)
        if trained:
            total.mean().backward()
    assert 0 < allocations.largest[torch.float32] <= CHUNK // 4  # a float32 has 4 bytes
    # The only bfloat16 tensor of full size is the gradient.
    assert allocations.largest[torch.bfloat16] == (TOKENS * VOCABULARY if trained else 0)


def test_bad_shapes_are_refused() -> None:
    student = make_logits(1).float()
    cached = top_k(student, 7, 1.0)
    # One column less, one token less, and one token less in the cached top-k.
    for teacher in (student[:, 1:], student[1:], TopK(cached.indices[1:], cached.log_probs[1:])):
        with pytest.raises(RecipeError, match="do not fit the student"):
            distillation_loss(student, teacher, LogitsLoss())
    with pytest.raises(RecipeError, match="from 1 to the size of the vocabulary, 101"):
        distillation_loss(student, student, LogitsLoss(top_k=VOCABULARY + 1))


SPLIT_SCRIPT = """
import torch, torch.distributed as dist
from recipes.distillation.losses import *
from recipes.distillation.settings import LOGITS_LOSSES
from recipes.distillation.vocabulary import CHUNK_BYTES, top_k

dist.init_process_group("gloo")
group, rank, width = dist.group.WORLD, dist.get_rank(), 61  # a rank has 61 of 122 columns
torch.manual_seed(0)
student, teacher = 3 * torch.randn(37, 122), 3 * torch.randn(37, 122)
teacher[:5, width:] -= 100  # for the first 5 tokens, the whole top-k is on the first rank
labels, weights = torch.randint(122, (37,)), torch.rand(37)
columns = slice(rank * width, (rank + 1) * width)
# A chunk has 10 rows of a rank's shard, or 5 whole rows. 37 is a multiple of neither.
CHUNK_BYTES["cpu"] = 4 * width * 10


def equal_on_ranks(tensor):
    tensors = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(tensors, tensor.detach().contiguous())
    return torch.equal(*tensors)


def compare(loss):
    # Compares a loss of logits sharded over both ranks with the loss of whole rows on one rank.
    # ``loss`` maps logits and a group to losses per token; without a group, it gets whole rows.
    shard, whole = student[:, columns].clone().requires_grad_(), student.clone().requires_grad_()
    split, expected = loss(shard, group), loss(whole, None)
    for losses in (split, expected):
        (losses * weights).sum().backward()
    assert equal_on_ranks(split)
    torch.testing.assert_close(split, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shard.grad, whole.grad[:, columns], rtol=1e-4, atol=1e-6)


for divergence in LOGITS_LOSSES:
    for top in (None, 7, 100, 122):  # 100 is more than a rank has
        loss = LogitsLoss(divergence, 2.0, 0.3, top)
        compare(lambda x, g: distillation_loss(x, teacher[:, columns] if g else teacher, loss, g))
        if top:
            split = top_k(teacher[:, columns], top, 2.0, group)
            expected = top_k(teacher, top, 2.0)
            assert equal_on_ranks(split.indices) and equal_on_ranks(split.log_probs)
            assert torch.equal(split.indices, expected.indices)
            torch.testing.assert_close(split.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
            compare(lambda x, g: distillation_loss(x, split if g else expected, loss, g))
quantiles = (torch.rand(37, 1) + torch.arange(4)) / 4
split = top_k(teacher[:, columns], 7, 2.0, group, quantiles)
expected = top_k(teacher, 7, 2.0, quantiles=quantiles)
assert torch.equal(split.draws, expected.draws) and equal_on_ranks(split.draws)
torch.testing.assert_close(split.tail_entropy, expected.tail_entropy, rtol=1e-5, atol=1e-6)
loss = LogitsLoss(temperature=2.0)
compare(lambda x, g: distillation_loss(x, split if g else expected, loss, g))
compare(lambda x, g: token_cross_entropy(x, labels, g))
targets = lambda g: LossTargets(split if g else expected, labels, (0.5, 3.0))
compare(lambda x, g: combined_loss(x, targets(g), loss, g)[0])
dist.barrier()
del group  # a group that outlives destroy_process_group may abort Python at exit
dist.destroy_process_group()
"""


def test_losses_are_equal_with_the_vocabulary_split_over_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "split.py"
    script.write_text(SPLIT_SCRIPT)
    run_ranks(str(script))


@pytest.mark.parametrize("compiled", [False, True])
def test_reused_logits_give_the_same_gradient(compiled: bool) -> None:
    """With ``reuse_logits``, the loss overwrites the student's logits."""
    results = []  # losses and gradient, without and with reuse
    for reuse in (False, True):
        torch.compiler.reset()  # kernels of other tests count towards Dynamo's recompile limit
        # 64 × 64 logits are chunks of 25, 25 and 14 rows.
        student, teacher = (make_logits(seed)[:64, :64].contiguous().bfloat16() for seed in (2, 1))
        before = student.clone()
        student.requires_grad_()
        loss = LogitsLoss()
        with compilation(compiled):
            losses = distillation_loss(student, teacher, loss, reuse_logits=reuse)
            assert torch.equal(student, before) == (not reuse)
            losses.sum().backward()
        assert student.grad is not None
        results.append((losses, student.grad.clone()))
    (losses, gradient), (losses_with_reuse, gradient_with_reuse) = results
    assert torch.equal(losses, losses_with_reuse)
    assert torch.equal(gradient, gradient_with_reuse)


@EACH_LOSS
@pytest.mark.parametrize("with_labels", [False, True])
def test_planned_buffers_are_those_that_a_chunk_allocates(
    divergence: str, with_labels: bool
) -> None:
    """The loss on labels has one more buffer. The divergence of the largest 7 has smaller ones."""
    labels = LABELS if with_labels else None
    targets = LossTargets(make_logits(0).float(), labels, (1.0, 0.5))
    for top, buffers in ((None, LOSS_BUFFERS[divergence]), (7, TOP_K_LOSS_BUFFERS)):
        student, loss = make_logits(1).float(), LogitsLoss(divergence, top_k=top)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            _chunk_losses(student, targets, loss, None, True)
        allocated = peak = 0  # bytes
        for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                allocated += event.nbytes()
                peak = max(peak, allocated)
        measured = peak / student.nbytes
        # Values per row, such as the losses, take a few percent of a buffer.
        assert measured <= 1.15 * (buffers + with_labels)
        assert top or measured >= buffers + with_labels
