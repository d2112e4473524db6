"""Measures contenders in turn and compares their speed-up with the roofline's. Torch-free.

Each contender runs in its own process, so that its memory can be measured. They take turns
request by request (A B A B …), so that a change of the machine's speed affects all alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.core.processes import cores
from recipes.engines.results import BenchmarkRow, Speedup
from recipes.engines.tensorrt_llm import LLM_OPTIONS
from recipes.engines.timing import (
    Contender,
    RequestShape,
    Timing,
    Worker,
    random_prompts,
    spread,
)
from recipes.planning.inference_cost import Roofline, decode_seconds, prefill_seconds

ENGINE_ROLES = ("teacher", "student")
BASELINE = "transformers"
DATASET, REPORT = "dataset.jsonl", "report.json"
"""Input and output of ``trtllm-bench``."""
SAMPLE_SECONDS = 0.2
MEBIBYTE = 1 << 20


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


class TensorRtLlmWorker(Worker):
    """Starts ``trtllm-bench`` for every batch, which loads the engine each time."""

    def __init__(self, contender: Contender, scratch: Path) -> None:
        self._contender, self._scratch = contender, scratch / contender.role

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Continues one batch of prompts; refuses a run without a usable report.

        ``load_seconds`` are those outside the requests: imports, loading and warm-up.
        ``peak_memory_bytes`` includes the pool of the KV cache, which takes most of a GPU.
        """
        shape = RequestShape(len(prompts), len(prompts[0]), new_tokens)
        self._scratch.mkdir(parents=True, exist_ok=True)
        (self._scratch / DATASET).write_text(trtllm_dataset(prompts, new_tokens), encoding="utf-8")
        report = self._scratch / REPORT
        report.unlink(missing_ok=True)
        start = time.monotonic()
        with gpu_memory_samples() as samples:
            argv = trtllm_command(self._contender, shape, self._scratch)
            done = subprocess.run(argv, check=False)
        seconds = time.monotonic() - start
        if done.returncode or not report.is_file():
            raise RecipeError(
                f"trtllm-bench ended with status {done.returncode} and no usable report; its "
                "messages are in the stage's log.",
                "python launch/run.py logs run_dir=DIR shows them",
            )
        timing = parse_trtllm_report(report.read_text(encoding="utf-8"), shape)
        self.load_seconds = seconds - timing.total_seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, *samples)
        return timing


def trtllm_dataset(prompts: list[list[int]], new_tokens: int) -> str:
    """Returns the requests, one JSON object a line."""
    requests = (
        {"task_id": number, "input_ids": ids, "output_tokens": new_tokens}
        for number, ids in enumerate(prompts)
    )
    return "".join(f"{json.dumps(request)}\n" for request in requests)


def trtllm_command(contender: Contender, shape: RequestShape, scratch: Path) -> list[str]:
    """Returns the command for a batch; streaming makes it report the time to first token."""
    common = [
        *("trtllm-bench", "--model", contender.folder.name, "--model_path", str(contender.folder)),
        *("--workspace", str(scratch), "throughput"),
        *("--dataset", str(scratch / DATASET)),
        *("--report_json", str(scratch / REPORT)),
        *("--num_requests", str(shape.batch_size), "--concurrency", str(shape.batch_size)),
        *("--warmup", str(shape.batch_size), "--streaming"),
    ]
    if contender.backend == "tensorrt_llm":
        return [*common, "--backend", "tensorrt", "--engine_dir", str(contender.model)]
    return [
        *common,
        *("--backend", "pytorch", "--tp", str(contender.tensor_parallel_size)),
        *("--max_batch_size", str(shape.batch_size)),
        *("--max_seq_len", str(shape.prompt_tokens + shape.new_tokens)),
        *("--extra_llm_api_options", str(contender.model / LLM_OPTIONS)),
    ]


def parse_trtllm_report(text: str, shape: RequestShape) -> Timing:
    """Reads what ``--report_json`` wrote; refuses another form or other requests."""
    try:
        report: dict[str, Any] = json.loads(text)
        requests, performance = report["request_info"], report["performance"]
        first = report["streaming_metrics"]["avg_ttft_ms"]
        total = performance["total_latency_ms"]
        measured = (
            requests["num_requests"],
            round(requests["avg_input_length"]),
            round(requests["avg_output_length"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"trtllm-bench wrote a report of another form: {type(error).__name__}: {error}",
            "use the pinned release; streaming_metrics needs --streaming",
        ) from error
    expected = (shape.batch_size, shape.prompt_tokens, shape.new_tokens)
    if measured != expected:
        raise RecipeError(
            f"trtllm-bench measured (requests, input, output) {measured}, not {expected}.",
            "use the pinned release",
        )
    return Timing(first / 1000, total / 1000)


@contextmanager
def gpu_memory_samples() -> Iterator[list[int]]:
    """Samples the bytes in use on all GPUs together, in a thread, until the context ends."""
    samples, stop = [0], threading.Event()
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            listing = subprocess.run(query, capture_output=True, text=True, check=False).stdout
            samples.append(sum(int(n) for n in listing.split() if n.isdigit()) * MEBIBYTE)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def cpu_threads() -> int:
    """Returns the number of threads that the launcher gives to a process."""
    return int(os.environ.get("OMP_NUM_THREADS") or cores())


def start_worker(scratch: Path, threads: int, contender: Contender) -> Worker:
    """Starts the worker of a contender; ``trtllm-bench`` may write to ``scratch``."""
    if contender.backend.startswith("tensorrt_llm"):
        return TensorRtLlmWorker(contender, scratch)
    from recipes.engines import bench_worker  # imported so that the fingerprint covers it

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
    timings: dict[tuple[RequestShape, int], list[Timing]] = {}
    with ExitStack() as stack:
        pairs = [(contender, stack.enter_context(start(contender))) for contender in contenders]
        for shape in shapes:
            for _ in range(repetitions + 1):
                for number, (contender, worker) in enumerate(pairs):
                    prompts = random_prompts(shape, contender.architecture.vocab_size, seed=done)
                    timing = worker.generate(prompts, shape.new_tokens)
                    timings.setdefault((shape, number), []).append(timing)
                done += 1
                log.progress("measure", done, total)
    # Workers measure their memory while they generate, so it is complete only now.
    return [
        _row(*pairs[number], shape, measured[1:]) for (shape, number), measured in timings.items()
    ]


def _row(
    contender: Contender, worker: Worker, shape: RequestShape, timings: Sequence[Timing]
) -> BenchmarkRow:
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
