"""Measures contenders in turn and compares their speed-up with the roofline's. Torch-free.

Each contender runs in a process of its own, so that its memory can be measured. They take turns
request by request (A B A B …), so that a change of the machine's speed affects all alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.core.processes import cores
from recipes.engines.results import BenchmarkRow, Speedup
from recipes.engines.timing import (
    Contender,
    RequestShape,
    Timing,
    Worker,
    random_prompts,
    spread,
)
from recipes.engines.trtllm_bench import TensorRtLlmWorker
from recipes.planning.inference_cost import Roofline, decode_seconds, prefill_seconds

ENGINE_ROLES = ("teacher", "student")
BASELINE = "transformers"


class CpuWorker(Worker):
    """A process that holds one model; see ``bench_worker``."""

    def __init__(self, contender: Contender, threads: int, module: str) -> None:
        self._name = f"{contender.role} in {contender.backend}"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", module, "--backend", contender.backend),
                *("--model", str(contender.model), "--threads", str(threads)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.load_seconds = self._answer()["load_seconds"]

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Continues one batch of prompts."""
        request = {"prompts": prompts, "new_tokens": new_tokens}
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._answer()
        self.peak_memory_bytes = answer["peak_memory_bytes"]
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

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def cpu_threads() -> int:
    """Threads that the launcher gives to a process."""
    return int(os.environ.get("OMP_NUM_THREADS") or cores())


def start_worker(scratch: Path, threads: int, contender: Contender) -> Worker:
    """Starts what runs a contender; ``trtllm-bench`` may write to ``scratch``."""
    if contender.backend.startswith("tensorrt_llm"):
        return TensorRtLlmWorker(contender, scratch)
    from recipes.engines import bench_worker  # imported, so that it is fingerprinted

    return CpuWorker(contender, threads, bench_worker.__name__)


def measure(
    contenders: Sequence[Contender],
    shapes: Sequence[RequestShape],
    repetitions: int,
    start: Callable[[Contender], Worker],
    log: MetricsLog,
) -> list[BenchmarkRow]:
    """Measures contenders on shapes, in turn; a first round of each shape warms up."""
    total, done = len(shapes) * (repetitions + 1), 0
    timings: list[list[list[Timing]]] = [[[] for _ in contenders] for _ in shapes]
    with ExitStack() as stack:
        workers = [stack.enter_context(start(contender)) for contender in contenders]
        for shape, of_shape in zip(shapes, timings, strict=True):
            for _ in range(repetitions + 1):
                for contender, worker, own in zip(contenders, workers, of_shape, strict=True):
                    prompts = random_prompts(shape, contender.architecture.vocab_size, seed=done)
                    own.append(worker.generate(prompts, shape.new_tokens))
                done += 1
                log.progress("measure", done, total)
    return [
        row(contender, worker, shape, own[1:])
        for shape, of_shape in zip(shapes, timings, strict=True)
        for contender, worker, own in zip(contenders, workers, of_shape, strict=True)
    ]


def row(
    contender: Contender, worker: Worker, shape: RequestShape, timings: Sequence[Timing]
) -> BenchmarkRow:
    """Summarises one contender on one shape."""
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
        peak_memory_bytes=worker.peak_memory_bytes,
        load_seconds=round(worker.load_seconds, 3),
        disk_bytes=contender.disk_bytes(),
    )


def speedups(
    rows: Sequence[BenchmarkRow],
    contenders: Sequence[Contender],
    roofline: Callable[[Contender], Roofline],
) -> list[Speedup]:
    """Compares student and teacher in each backend, and their rooflines.

    ``prefill`` is the ratio of the median times to the first token, ``decode`` that of tokens per
    second after it. Where a measured ratio is below the roofline's, something other than FLOPs and
    bytes takes time.
    """
    models = {(one.backend, one.role): one for one in contenders}
    teachers = {(row.backend, row.setting): row for row in rows if row.role == "teacher"}
    backends = list(dict.fromkeys(one.backend for one in contenders))
    students = [row for row in rows if row.role == "student"]
    results = []
    for fast in sorted(students, key=lambda row: backends.index(row.backend)):
        slow = teachers[fast.backend, fast.setting]
        shape = RequestShape(fast.batch_size, fast.prompt_tokens, fast.new_tokens)
        prefill, decode = [], []
        for role in ENGINE_ROLES:
            one = models[fast.backend, role]
            model, bound = (one.architecture, fast.batch_size), (one.storage, roofline(one))
            prefill.append(prefill_seconds(*model, fast.prompt_tokens, *bound))
            decode.append(decode_seconds(*model, shape.context, *bound))
        results.append(
            Speedup(
                backend=fast.backend,
                precision=fast.precision,
                batch_size=shape.batch_size,
                prompt_tokens=shape.prompt_tokens,
                prefill=slow.time_to_first_token_ms.median / fast.time_to_first_token_ms.median,
                prefill_roofline=prefill[0] / prefill[1],
                decode=fast.decode_tokens_per_second.median / slow.decode_tokens_per_second.median,
                decode_roofline=decode[0] / decode[1],
            )
        )
    return results
