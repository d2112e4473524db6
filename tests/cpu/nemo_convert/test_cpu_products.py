"""Products of linear layers in halves: what they are, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_convert import cpu_backend, cpu_products
from nemo_convert.cpu_products import product

ROWS, INPUTS, OUTPUTS = (64, 8), 512, 515
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="active only without CUDA")


class Products(TorchDispatchMode):
    """Columns of every product that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.columns.append(args[1].shape[1])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is timed, on two threads, where halves take four fifths of the time."""
    found = []

    def seconds(work: Callable[[Tensor, Tensor], Tensor], *args: Tensor) -> float:
        found.append(work.__name__)
        return 4.0 if work is cpu_products._in_halves else 5.0

    monkeypatch.setattr(cpu_products, "_halved", {})
    monkeypatch.setattr(cpu_products, "_seconds", seconds)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield found
    torch.set_num_threads(before)


def operands(dtype: torch.dtype = torch.bfloat16, rows: tuple[int, ...] = ROWS) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(*shape).to(dtype) for shape in ((*rows, INPUTS), (OUTPUTS, INPUTS))]


@pytest.mark.parametrize(("clearly", "columns"), [(0.85, [258, 257]), (0.75, [515])])
def test_halves_are_taken_where_they_are_clearly_faster(
    timed: list[str], monkeypatch: pytest.MonkeyPatch, clearly: float, columns: list[int]
) -> None:
    """Each shape is timed once; the product is the same to the rounding of its type."""
    monkeypatch.setattr(cpu_products, "CLEARLY", clearly)
    x, weight = operands()
    for _ in range(2):
        with Products() as seen:
            found = product(x, weight.t())
        assert seen.columns == columns
        torch.testing.assert_close(found, x @ weight.t())
    assert timed == ["_in_halves", "matmul"]
    product(x, weight.t().contiguous())  # as a layer's way back reads it: another kernel
    assert len(timed) == 4


def test_other_products_are_left_alone(timed: list[str]) -> None:
    """In float32, small ones, and those of one thread."""
    x, weight = operands(torch.float32)
    torch.testing.assert_close(product(x, weight.t()), x @ weight.t())
    x, weight = operands(rows=(10, 8))
    product(x, weight.t())
    torch.set_num_threads(1)
    x, weight = operands()
    product(x, weight.t())
    assert not timed


@needs_no_cuda
def test_a_layer_of_megatron_has_its_products_and_gradients(timed: list[str]) -> None:
    """To the rounding of bfloat16."""
    cpu_backend.enable()
    from megatron.core.tensor_parallel import layers

    x, weight = (each.requires_grad_() for each in operands())
    bias = torch.ones(OUTPUTS, dtype=torch.bfloat16)
    settings = dict.fromkeys(
        ("gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel"), False
    )
    grads = []
    for linear in (
        lambda: layers.linear_with_grad_accumulation_and_async_allreduce(
            input=x, weight=weight, bias=bias, tp_group=None, **settings
        ),
        lambda: torch.nn.functional.linear(x, weight, bias),
    ):
        made = linear()
        grads.append((made, *torch.autograd.grad(made.square().sum(), (x, weight))))
    for found, expected in zip(*grads, strict=True):
        assert (found - expected).abs().max() < 0.01 * expected.abs().max()
    assert timed == ["_in_halves", "matmul"] * 2  # forward, and back to its input
    frozen = layers.linear_with_frozen_weight(
        input=x, weight=weight.detach(), bias=None, tp_group=None, **settings
    )
    [grad] = torch.autograd.grad(frozen.sum(), (x,))
    torch.testing.assert_close(grad, weight.sum(dim=0).expand(x.shape))


@pytest.mark.parametrize("split", ["allreduce_dgrad", "sequence_parallel"])
def test_what_ranks_share_is_megatrons(split: str) -> None:
    settings = {"allreduce_dgrad": False, "sequence_parallel": False, "bias": None, split: True}

    def megatrons(*args: Any, **kwargs: Any) -> object:
        return args, kwargs

    megatrons.warned = False  # type: ignore[attr-defined]  # as it looks for in its name's function
    linear = cpu_products.alone(megatrons)
    x, weight = operands()
    assert linear(x, weight, **settings) == ((x, weight), settings)
    assert linear.warned is False
