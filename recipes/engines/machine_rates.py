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
"""Number of measured runs of an operation, and the least number if the operation is slow."""
MAX_TOTAL_SECONDS = 0.5
"""An operation is slow if its runs take this long in total. GEMMs are slow in a data type that the
processor emulates."""
TOKENS = 1024
"""Tokens of a batch: the rows of each linear layer's input."""
MIN_CPU_FRACTION = 0.8
"""A measurement is undisturbed if its threads had the cores for more than this fraction of the
time. Otherwise other programs used the cores too much."""
COPY_BYTES = 1 << 28
"""Size of the copied buffer: 256 MiB, much larger than any cache."""

LAYERS, MEASURED_LAYERS = 30, 2
"""Layers of SmolLM2-135M, and the number of layers that are measured. They run in turn, so that no
cache holds their weights. The sizes below are also those of SmolLM2-135M."""
LAYER_SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
"""Numbers of inputs and outputs of the four linear layers of a transformer layer: QKV, attention
output, gate with up projection, and down projection."""
HEAD_SHARD_SHAPE, HEAD_SHARDS = (576, 6144), 8
"""Numbers of inputs and outputs of a shard of the output head, and the number of shards. Only one
shard is measured, and its time is multiplied by the number."""


def best_seconds(
    operation: Callable[[], object],
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = REPEATS,
) -> float:
    """Returns the shortest time of ``repeats`` runs, in the seconds of ``clock``, after a warm-up.

    The shortest is the best estimate, because other programs can only make a run longer. A slow
    operation gets fewer runs, but at least ``MIN_REPEATS``. With the device ``cuda``, a run
    includes waiting for the GPU.
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
    return best_seconds(operation, device, clock=time.process_time, repeats=3 * REPEATS)


def copy_rate(device: str = "cpu", seconds: Callable[..., float] = best_seconds) -> float:
    """Returns the bytes per second of a copy. A byte counts twice: it is read and written.

    ``seconds`` is the function that times the copy: ``best_seconds`` or ``best_cpu_seconds``.
    """
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source), device)


def processor_name(device: str = "cpu") -> str:
    """Returns the name of the GPU, or Linux's name of the CPU."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    for line in cpuinfo().splitlines():
        if line.lower().startswith("model name"):  # such as "model name : AMD EPYC 7763"
            return line.partition(":")[2].strip()
    return "unknown"


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    """Sets the number of torch's threads in the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _gemms(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """Returns a function that runs the GEMMs of a distillation step, and their FLOPs.

    ``shapes`` has the numbers of inputs and outputs of each linear layer. A linear layer has four
    GEMMs of equal FLOPs. They are measured together, because on a processor with AMX the GEMMs of
    the backward pass are half as fast as those of the forward pass.
    """

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=dtype)

    matrices = [
        (matrix(TOKENS, inputs), matrix(outputs, inputs), matrix(TOKENS, outputs))
        for inputs, outputs in shapes
    ]

    def run_gemms() -> None:
        for x, weight, output_grad in matrices:
            x @ weight.t()  # the teacher's forward pass
            x @ weight.t()  # the student's forward pass
            output_grad @ weight  # gradient of the inputs
            output_grad.t() @ x  # gradient of the weight

    # Four GEMMs, with 2 FLOPs per multiply-add.
    flops = sum(4 * 2 * TOKENS * inputs * outputs for inputs, outputs in shapes)
    return run_gemms, flops


def _training_rate(dtype: torch.dtype) -> float:
    """Returns the FLOP/s of one thread in a distillation's GEMMs while all threads are busy.

    Several layers alternate, because a training step reads matrices from memory. A single repeated
    GEMM would read its matrices from a cache, which is twice as fast with AMX. All threads must be
    busy, because they share caches and memory: two threads do not reach twice the rate of one.
    """
    # CPU time is summed over threads, so FLOPs per CPU second are the rate of one thread.
    smallest_gemms, flops = _gemms([min(LAYER_SHAPES)], dtype)  # 576 by 576
    if (seconds := best_cpu_seconds(smallest_gemms)) > MAX_TOTAL_SECONDS:
        # The processor emulates this data type. Measuring all GEMMs would take minutes.
        return flops / seconds
    layer_gemms, layer_flops = _gemms(LAYER_SHAPES * MEASURED_LAYERS, dtype)
    head_gemms, head_flops = _gemms([HEAD_SHARD_SHAPE], dtype)
    repeats = LAYERS / MEASURED_LAYERS
    seconds = repeats * best_cpu_seconds(layer_gemms) + HEAD_SHARDS * best_cpu_seconds(head_gemms)
    return (repeats * layer_flops + HEAD_SHARDS * head_flops) / seconds


def training_rates(threads: int) -> tuple[TrainingRates, bool]:
    """Returns the rates for planning training runs, and whether the measurement was undisturbed.

    Disturbances by other programs change the rates little, because rates are per CPU second.
    """
    with _torch_threads(threads):
        start, cpu_start = time.perf_counter(), time.process_time()
        bfloat16 = threads * _training_rate(torch.bfloat16)
        float32 = threads * _training_rate(torch.float32)
        bandwidth = threads * copy_rate(seconds=best_cpu_seconds)
        cpu_seconds = time.process_time() - cpu_start
        available_seconds = threads * (time.perf_counter() - start)
        undisturbed = cpu_seconds > MIN_CPU_FRACTION * available_seconds
    return TrainingRates(bfloat16, float32, bandwidth), undisturbed


def measure(arch: Architecture, threads: int, device: str = "cpu") -> MachineRates:
    """Measures the rates of a copy, and of a GEMM of a model's feed-forward layer in each dtype."""

    def gemm_rate(dtype: torch.dtype) -> float:
        x = torch.randn(TOKENS, arch.hidden_size, dtype=dtype, device=device)
        weight = torch.randn(arch.ffn_hidden_size, arch.hidden_size, dtype=dtype, device=device)
        flops: int = 2 * TOKENS * weight.numel()
        return flops / best_seconds(lambda: linear(x, weight), device)

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    with _torch_threads(threads):
        return MachineRates(
            cpu=processor_name(device),
            threads=threads,
            flops_per_second={name: gemm_rate(dtype) for name, dtype in types.items()},
            bytes_per_second=copy_rate(device),
        )
