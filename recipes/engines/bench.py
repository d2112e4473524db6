"""Measuring contenders in turn, and what their figures say beside the roofline. Torch-free.

Every contender is a process of its own, so that memory is its own. They take turns request by
request (A B A B …), so that a change of the machine's speed hits all alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.core.processes import cores
from recipes.engines import trtllm_bench
from recipes.engines.results import BenchmarkRow, Speedup
from recipes.engines.timing import Timing, random_prompts, spread
from recipes.planning.roofline import (
    Machine,
    RequestShape,
    Storage,
    decode_seconds,
    prefill_seconds,
)

ENGINE_ROLES = ("teacher", "student")
BASELINE = "transformers"


@dataclass(frozen=True)
class Contender:
    """One model in one form."""

    role: str
    backend: str
    precision: str
    model: Path
    """What is loaded: an engine, or a Hugging Face folder."""
    folder: Path
    """Hugging Face folder of the same model."""
    architecture: Architecture
    group_size: int | None = None
    tensor_parallel_size: int = 1

    @property
    def storage(self) -> Storage:
        """How weights and KV cache are kept while it runs."""
        return Storage(self.precision, self.group_size, kv_bytes(self.backend, self.precision))

    def disk_bytes(self) -> int:
        """Size of what is loaded."""
        return sum(file.stat().st_size for file in self.model.rglob("*") if file.is_file())


def kv_bytes(backend: str, precision: str) -> int:
    """Bytes of a value in the KV cache, where nothing else was asked for."""
    if precision == "fp32":
        return 4
    return 1 if backend == "openvino" else 2  # OpenVINO's own default is an 8-bit cache


@dataclass
class ContenderMeasurements:
    """What a contender has shown so far."""

    load_seconds: float = 0.0
    peak_memory_bytes: int = 0
    timings: dict[RequestShape, list[Timing]] = field(default_factory=lambda: defaultdict(list))


class Worker(Protocol):
    """What measures one contender."""

    measured: ContenderMeasurements

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Continues one batch of prompts."""

    def __enter__(self) -> Self:
        """Returns itself."""

    def __exit__(self, *_: object) -> None:
        """Ends what it started."""


class CpuWorker:
    """A process that holds one model; see ``bench_worker``."""

    def __init__(self, contender: Contender, threads: int, module: str) -> None:
        self._name = f"{contender.role} in {contender.backend}"
        command = [sys.executable, "-m", module]
        options = {
            "backend": contender.backend,
            "model": contender.model,
            "threads": threads,
        }
        self._process = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.measured = ContenderMeasurements(load_seconds=self._answer()["load_seconds"])

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Continues one batch of prompts."""
        request = {"prompts": prompts, "new_tokens": new_tokens}
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._answer()
        self.measured.peak_memory_bytes = answer["peak_memory_bytes"]
        return Timing(**answer["timing"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RecipeError(
                f"the process that measures the {self._name} ended with status {status}; its "
                "messages are in the stage's log.",
                "if it was killed for memory, use smaller batch_sizes or baseline=false",
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


class TensorRtLlm:
    """``trtllm-bench``, which loads the engine anew for every batch."""

    def __init__(self, contender: Contender, scratch: Path) -> None:
        self._scratch = scratch / contender.role
        self._target = trtllm_bench.Target(
            contender.backend,
            contender.model,
            contender.folder,
            contender.tensor_parallel_size,
        )
        self.measured = ContenderMeasurements()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Continues one batch of prompts."""
        requests = trtllm_bench.Requests(prompts, new_tokens)
        run = trtllm_bench.run(self._target, requests, self._scratch)
        self.measured.load_seconds = run.load_seconds
        self.measured.peak_memory_bytes = max(
            self.measured.peak_memory_bytes, run.peak_memory_bytes
        )
        return run.timing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left running."""


def cpu_threads() -> int:
    """Threads that the launcher gives to a process."""
    return int(os.environ.get("OMP_NUM_THREADS") or cores())


def start_worker(scratch: Path, threads: int, contender: Contender) -> Worker:
    """What measures a contender; ``trtllm-bench`` may write to ``scratch``."""
    if contender.backend.startswith("tensorrt_llm"):
        return TensorRtLlm(contender, scratch)
    from recipes.engines import bench_worker  # so that fingerprints know its code

    return CpuWorker(contender, threads, bench_worker.__name__)


def measure(
    contenders: Sequence[Contender],
    shapes: Sequence[RequestShape],
    repetitions: int,
    start: Callable[[Contender], Worker],
    log: MetricsLog,
) -> list[BenchmarkRow]:
    """Measures contenders on shapes; a first round of each shape warms up and is dropped."""
    total, done = len(shapes) * (repetitions + 1), 0
    with ExitStack() as stack:
        workers = [(c, stack.enter_context(start(c))) for c in contenders]
        for number, shape in enumerate(shapes):
            for repetition in range(repetitions + 1):
                seed = number * (repetitions + 1) + repetition
                for contender, worker in workers:
                    prompts = random_prompts(shape, contender.architecture.vocab_size, seed)
                    timing = worker.generate(prompts, shape.new_tokens)
                    if repetition:
                        worker.measured.timings[shape].append(timing)
                done += 1
                log.progress("measure", done, total)
        return [
            row(contender, worker.measured, shape)
            for shape in shapes
            for contender, worker in workers
        ]


def row(contender: Contender, measured: ContenderMeasurements, shape: RequestShape) -> BenchmarkRow:
    """One contender on one shape."""
    timings = measured.timings[shape]
    return BenchmarkRow(
        role=contender.role,
        backend=contender.backend,
        precision=contender.precision,
        batch_size=shape.batch_size,
        prompt_tokens=shape.prompt_tokens,
        new_tokens=shape.new_tokens,
        time_to_first_token_ms=spread(1000 * t.first_seconds for t in timings),
        decode_tokens_per_second=spread(t.decode_rate(shape) for t in timings),
        throughput_tokens_per_second=spread(t.throughput(shape) for t in timings),
        peak_memory_bytes=measured.peak_memory_bytes,
        load_seconds=round(measured.load_seconds, 3),
        disk_bytes=contender.disk_bytes(),
    )


def speedups(
    rows: Sequence[BenchmarkRow],
    contenders: Sequence[Contender],
    machine: Callable[[Contender], Machine],
) -> list[Speedup]:
    """How much faster the student is than the teacher, and how much the machine would allow.

    ``prefill`` compares the medians of the time to the first token, ``decode`` those of tokens a
    second after it; each beside the ratio of the two models' rooflines. Where the measured figure
    is the smaller one, something other than FLOPs and bytes takes the time.
    """
    models = {(one.backend, one.role): one for one in contenders}
    teachers = {(row.backend, row.setting): row for row in rows if row.role == "teacher"}
    backends = list(dict.fromkeys(one.backend for one in contenders))
    students = [row for row in rows if row.role == "student"]
    found = []
    for fast in sorted(students, key=lambda row: backends.index(row.backend)):
        slow = teachers[fast.backend, fast.setting]
        shape = RequestShape(fast.batch_size, fast.prompt_tokens, fast.new_tokens)
        pair = [models[fast.backend, role] for role in ENGINE_ROLES]
        found.append(
            Speedup(
                backend=fast.backend,
                precision=fast.precision,
                batch_size=shape.batch_size,
                prompt_tokens=shape.prompt_tokens,
                prefill=slow.time_to_first_token_ms.median / fast.time_to_first_token_ms.median,
                prefill_roofline=_bound(prefill_seconds, pair, shape, machine),
                decode=fast.decode_tokens_per_second.median / slow.decode_tokens_per_second.median,
                decode_roofline=_bound(decode_seconds, pair, shape, machine),
            )
        )
    return found


def _bound(
    seconds: Callable[[Architecture, RequestShape, Storage, Machine], float],
    pair: Sequence[Contender],
    shape: RequestShape,
    machine: Callable[[Contender], Machine],
) -> float:
    """The ratio of two models' times by roofline."""
    slow, fast = (seconds(one.architecture, shape, one.storage, machine(one)) for one in pair)
    return slow / fast
