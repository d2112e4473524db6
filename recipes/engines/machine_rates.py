"""What the machine can do at best: matrix products and copies, by timing them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.functional import linear

from nemo_convert.architecture import Architecture
from recipes.engines.results import MachineRates, TrainingRates
from recipes.planning.hardware import cpuinfo

REPEATS, FEWEST = 5, 3
ENOUGH = 0.5
"""Seconds after which nothing is repeated again: a type that the processor has not takes long."""
TOKENS = 1024
"""Rows of the matrix product that FLOP/s are measured with."""
ALONE = 0.8
"""Share of its threads' time that a measurement must have had to be kept."""
COPY_BYTES = 1 << 28
"""Well beyond any cache."""


def best_seconds(
    work: Callable[[], object],
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = REPEATS,
) -> float:
    """Shortest of several runs, after one that warms up; other programs only make it longer.

    As many as asked for, or as few as ``FEWEST`` if they take ``ENOUGH``.
    """

    def run() -> float:
        began = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    run()
    found = [run()]
    while len(found) < repeats and (len(found) < FEWEST or sum(found) < ENOUGH):
        found.append(run())
    return min(found)


def own_seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """The same in CPU time, of all threads together."""
    return best_seconds(work, device, time.process_time, 3 * REPEATS)


def linear_rate(
    tokens: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> float:
    """FLOP/s of a linear layer [tokens, inputs] → [tokens, outputs]."""
    x = torch.randn(tokens, inputs, dtype=dtype, device=device)
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
    return 2 * tokens * inputs * outputs / best_seconds(lambda: linear(x, weight), device)


def copy_rate(device: str = "cpu", seconds: Callable[..., float] = best_seconds) -> float:
    """Bytes per second of a copy, each byte counted as read and as written."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source), device)


def processor_name(device: str = "cpu") -> str:
    """Name of the GPU, or of the CPU as Linux gives it."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    for line in cpuinfo().splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


LAYERS, COPIES = 30, 2
"""Of the embedded teacher, and how many are multiplied in turn, so that no cache holds them."""
LAYER = ((576, 960), (576, 576), (576, 3072), (1536, 576))
"""Inputs and outputs of a layer's products."""
HEAD, PARTS = (576, 6144), 8
"""The same of a part of the head, and its parts."""


def _products(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Callable[[], None]:
    """A distillation's products of linear layers: a teacher's forward, a student's, and its back.

    On a processor with AMX those of the way back are half as fast as those forward.
    """
    made = [
        [torch.randn(*shape, dtype=dtype) for shape in ((TOKENS, i), (o, i), (TOKENS, o))]
        for i, o in shapes
    ]

    def step() -> None:
        for x, weight, grad in made:
            x @ weight.t()
            x @ weight.t()
            grad @ weight
            grad.t() @ x

    return step


def _flops(shapes: Sequence[tuple[int, int]]) -> int:
    """Of their products."""
    return sum(4 * 2 * TOKENS * inputs * outputs for inputs, outputs in shapes)


def _training_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a thread in a distillation's products, where all threads are at work.

    In a step each of them finds its matrices in memory; one that is repeated alone finds them in a
    cache, and with AMX is twice as fast. Threads share more than memory there: two do not reach
    twice what one does.
    """
    smallest = min(LAYER)
    if (once := own_seconds(_products([smallest], dtype))) > ENOUGH:
        return _flops([smallest]) / once
    layer = own_seconds(_products(LAYER * COPIES, dtype)) / COPIES
    part = own_seconds(_products([HEAD], dtype))
    return (LAYERS * _flops(LAYER) + PARTS * _flops([HEAD])) / (LAYERS * layer + PARTS * part)


def training_rates(threads: int) -> tuple[TrainingRates, bool]:
    """Rates that trainings are planned with, and whether nothing else ran on the threads' cores.

    By the time that the threads had themselves: of what other programs took, little counts.
    """
    with _threads(threads):
        began, used = time.perf_counter(), time.process_time()
        bfloat16, float32 = (
            threads * _training_rate(dtype) for dtype in (torch.bfloat16, torch.float32)
        )
        copied = threads * copy_rate(seconds=own_seconds)
        had = time.process_time() - used
        alone = had > ALONE * threads * (time.perf_counter() - began)
    return TrainingRates(bfloat16, float32, copied), alone


def measure(arch: Architecture, threads: int, device: str = "cpu") -> MachineRates:
    """Rates of a model's feed-forward layer and of memory."""
    shape = (TOKENS, arch.hidden_size, arch.ffn_hidden_size)
    with _threads(threads):
        return MachineRates(
            cpu=processor_name(device),
            threads=threads,
            flops_per_second={
                f"{dtype}".removeprefix("torch."): linear_rate(*shape, dtype, device)
                for dtype in (torch.float32, torch.bfloat16)
            },
            bytes_per_second=copy_rate(device),
        )
