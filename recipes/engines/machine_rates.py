"""Measures this machine's peak rates of GEMMs and copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.functional import linear

from nemo_convert.architecture import Architecture
from recipes.engines.results import MachineRates, TrainingRates
from recipes.planning.hardware import cpuinfo

REPEATS, MIN_REPEATS = 5, 3
MAX_TOTAL_SECONDS = 0.5
"""Once the runs of an operation took this long in total, it is repeated only if it has less than
``MIN_REPEATS`` runs: GEMMs of a data type that the processor emulates may take minutes."""
TOKENS = 1024
"""Tokens of a batch: the rows of each linear layer's input."""
MIN_CPU_FRACTION = 0.8
"""A measurement is valid if its threads ran for at least this fraction of the time. In the
remaining time other programs used the cores."""
COPY_BYTES = 1 << 28
"""Much larger than any cache."""

LAYERS, MEASURED_LAYERS = 30, 2
"""Layers of SmolLM2-135M, and the number of different layers that are measured in turn, so that no
cache holds their weights."""
LAYER_SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
"""Numbers of inputs and outputs of the four linear layers of a transformer layer: QKV, attention
output, gate with up projection, and down projection."""
HEAD_SHARD_SHAPE, HEAD_SHARDS = (576, 6144), 8
"""Numbers of inputs and outputs of a shard of the output head, and the number of shards. One shard
is measured, and its time is multiplied."""


def best_seconds(
    operation: Callable[[], object],
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = REPEATS,
) -> float:
    """Returns the shortest time of several runs, after a warm-up.

    The shortest is the best estimate, because other programs can only make a run longer. There are
    ``repeats`` runs, or fewer (at least ``MIN_REPEATS``) if they take ``MAX_TOTAL_SECONDS``.
    """

    def run() -> float:
        start = clock()
        operation()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    run()
    times = [run()]
    while len(times) < repeats and (len(times) < MIN_REPEATS or sum(times) < MAX_TOTAL_SECONDS):
        times.append(run())
    return min(times)


def best_cpu_seconds(operation: Callable[[], object], device: str = "cpu") -> float:
    """Returns the shortest CPU time of several runs, summed over threads."""
    return best_seconds(operation, device, time.process_time, 3 * REPEATS)


def copy_rate(device: str = "cpu", seconds: Callable[..., float] = best_seconds) -> float:
    """Returns the bytes per second of a copy. A byte counts twice: it is read and written."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source), device)


def processor_name(device: str = "cpu") -> str:
    """Returns the name of the GPU, or Linux's name of the CPU."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    names = (line for line in cpuinfo().splitlines() if line.lower().startswith("model name"))
    return next(names, ": unknown").partition(":")[2].strip()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def _gemms(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """Returns the GEMMs of linear layers in a distillation step, and their FLOPs.

    A linear layer has four GEMMs of equal FLOPs: one in the teacher's forward pass, one in the
    student's forward pass, and two in its backward pass. They are measured together, because GEMMs
    of the backward pass are half as fast on a processor with AMX.
    """
    matrices = [
        [torch.randn(*shape, dtype=dtype) for shape in ((TOKENS, i), (o, i), (TOKENS, o))]
        for i, o in shapes
    ]

    def step() -> None:
        for x, weight, grad in matrices:
            x @ weight.t()
            x @ weight.t()
            grad @ weight
            grad.t() @ x

    return step, sum(4 * 2 * TOKENS * inputs * outputs for inputs, outputs in shapes)


def _training_rate(dtype: torch.dtype) -> float:
    """Returns the FLOP/s of a thread in a distillation's GEMMs while all threads are busy.

    Several layers alternate, because a training step reads matrices from memory. A single repeated
    GEMM would read its matrices from a cache, which is twice as fast with AMX. All threads are
    busy, because they share caches and memory: two threads do not reach twice the rate of one.
    """
    # CPU time is summed over threads, so FLOPs divided by it are the rate of one thread.
    smallest, flops = _gemms([min(LAYER_SHAPES)], dtype)
    if (seconds := best_cpu_seconds(smallest)) > MAX_TOTAL_SECONDS:
        return flops / seconds  # the processor emulates this type, so the rest would take minutes
    layers, layers_flops = _gemms(LAYER_SHAPES * MEASURED_LAYERS, dtype)
    head, head_flops = _gemms([HEAD_SHARD_SHAPE], dtype)
    repeats = LAYERS / MEASURED_LAYERS
    seconds = repeats * best_cpu_seconds(layers) + HEAD_SHARDS * best_cpu_seconds(head)
    return (repeats * layers_flops + HEAD_SHARDS * head_flops) / seconds


def training_rates(threads: int) -> tuple[TrainingRates, bool]:
    """Returns the rates for planning training runs, and whether the measurement was undisturbed.

    The measurement is disturbed if other programs used the threads' cores. Rates are measured in
    CPU time, which other programs change little.
    """
    with _threads(threads):
        start, cpu_start = time.perf_counter(), time.process_time()
        bfloat16, float32 = (
            threads * _training_rate(dtype) for dtype in (torch.bfloat16, torch.float32)
        )
        bandwidth = threads * copy_rate(seconds=best_cpu_seconds)
        cpu_seconds = time.process_time() - cpu_start
        undisturbed = cpu_seconds > MIN_CPU_FRACTION * threads * (time.perf_counter() - start)
    return TrainingRates(bfloat16, float32, bandwidth), undisturbed


def measure(arch: Architecture, threads: int, device: str = "cpu") -> MachineRates:
    """Measures the rates of the GEMMs of a model's feed-forward layer, and of copies."""

    def linear_rate(dtype: torch.dtype) -> float:
        x = torch.randn(TOKENS, arch.hidden_size, dtype=dtype, device=device)
        weight = torch.randn(arch.ffn_hidden_size, arch.hidden_size, dtype=dtype, device=device)
        flops: int = 2 * TOKENS * weight.numel()
        return flops / best_seconds(lambda: linear(x, weight), device)

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    with _threads(threads):
        return MachineRates(
            cpu=processor_name(device),
            threads=threads,
            flops_per_second={name: linear_rate(dtype) for name, dtype in types.items()},
            bytes_per_second=copy_rate(device),
        )
