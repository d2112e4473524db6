"""Measures models' speed, and the student's speed-up over the teacher. Does not import torch.

Each model runs in its own process, so that its memory can be measured. The models take turns
request by request, so that a change of the machine's speed affects all models equally.
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
from recipes.core.files import folder_bytes
from recipes.core.metrics import MetricsLog
from recipes.core.processes import cores, die_with_parent
from recipes.engines.results import BenchmarkRow, Speedup
from recipes.engines.tensorrt_llm import LLM_OPTIONS, VERSION, launcher
from recipes.engines.timing import (
    RequestShape,
    TimedModel,
    Timing,
    Worker,
    random_prompts,
    spread,
)
from recipes.planning.roofline import Roofline, decode_seconds, prefill_seconds

ENGINE_ROLES = ("teacher", "student")
DATASET, REPORT = "dataset.jsonl", "report.json"
"""Input and output files of ``trtllm-bench``."""
SAMPLE_SECONDS = 0.2
"""Time between two samples of GPU memory."""


class CpuWorker(Worker):
    """Runs one model in its own process, with the module ``bench_worker``."""

    def __init__(self, model: TimedModel, threads: int, module: str) -> None:
        self._name = f"{model.role} in {model.backend}"
        command = [sys.executable, "-m", module, "--backend", model.backend]
        command += ["--model", str(model.path), "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.load_seconds = self._read_answer()["load_seconds"]

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Sends one batch to the process, and waits for its timing."""
        request = {"prompts": prompts, "new_tokens": new_tokens}
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._read_answer()
        self.peak_memory_bytes = answer["peak_memory_bytes"]
        return Timing(**answer["timing"])

    def _read_answer(self) -> dict[str, Any]:
        """Reads one JSON line from the process. Raises ``RecipeError`` if the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RecipeError(
                f"the process that measures the {self._name} ended with status {status}; its "
                "messages are in the stage's log",
                "if it ran out of memory, use smaller batches, an engine of lower precision, or in "
                "measure_speed baseline=false",
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


class TensorRtLlmWorker(Worker):
    """Starts ``trtllm-bench`` for every batch. Each start loads the engine again."""

    needs_warm_up = False  # ``trtllm-bench`` has its own warm-up

    def __init__(self, model: TimedModel, scratch: Path) -> None:
        self._model, self._scratch = model, scratch / model.role

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Continues one batch of prompts; sets ``load_seconds`` and ``peak_memory_bytes``.

        ``load_seconds`` is the time outside the requests: imports, loading and warm-up.
        ``peak_memory_bytes`` includes the memory that TensorRT-LLM reserves for the KV cache, which
        is most of the GPU's memory. Raises ``RecipeError`` if ``trtllm-bench`` failed, or if its
        report is not about this batch.
        """
        shape = RequestShape(len(prompts), len(prompts[0]), new_tokens)
        self._scratch.mkdir(parents=True, exist_ok=True)
        (self._scratch / DATASET).write_text(trtllm_dataset(prompts, new_tokens), encoding="utf-8")
        report = self._scratch / REPORT
        report.unlink(missing_ok=True)
        start = time.monotonic()
        with gpu_memory_samples() as samples:
            command = [*launcher(), *trtllm_command(self._model, shape, self._scratch)]
            completed = subprocess.run(command, check=False, preexec_fn=die_with_parent)
        seconds = time.monotonic() - start
        if completed.returncode or not report.is_file():
            raise RecipeError(
                f"trtllm-bench ended with status {completed.returncode} or without a report; its "
                "messages are in the stage's log",
                "python launch/run.py logs run_dir=DIR shows them",
            )
        timing = parse_trtllm_report(report.read_text(encoding="utf-8"), shape)
        self.load_seconds = seconds - timing.total_seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, *samples)
        return timing


def trtllm_dataset(prompts: list[list[int]], new_tokens: int) -> str:
    """Returns requests in the format of ``trtllm-bench``: one JSON object per line."""
    requests = (
        {"task_id": number, "input_ids": ids, "output_tokens": new_tokens}
        for number, ids in enumerate(prompts)
    )
    return "".join(f"{json.dumps(request)}\n" for request in requests)


def trtllm_command(model: TimedModel, shape: RequestShape, scratch: Path) -> list[str]:
    """Returns the command that times a batch. ``--streaming`` adds the time to the first token."""
    is_engine = model.backend == "tensorrt_llm"  # otherwise the PyTorch backend runs a checkpoint
    # An engine does not include the tokenizer, so the tokenizer comes from the model's folder.
    tokenizer_folder = model.folder if is_engine else model.path
    common = [
        *("trtllm-bench", "--model", model.folder.name, "--model_path", str(tokenizer_folder)),
        *("--workspace", str(scratch), "throughput"),
        *("--dataset", str(scratch / DATASET)),
        *("--report_json", str(scratch / REPORT)),
        *("--num_requests", str(shape.batch_size), "--concurrency", str(shape.batch_size)),
        *("--warmup", str(shape.batch_size), "--streaming"),
    ]
    if is_engine:
        return [*common, "--backend", "tensorrt", "--engine_dir", str(model.path)]
    return [
        *common,
        *("--backend", "pytorch", "--tp", str(model.tensor_parallel_size)),
        *("--max_batch_size", str(shape.batch_size)),
        *("--max_seq_len", str(shape.prompt_tokens + shape.new_tokens)),
        *("--extra_llm_api_options", str(model.path / LLM_OPTIONS)),
    ]


def parse_trtllm_report(text: str, shape: RequestShape) -> Timing:
    """Returns the timing in the report of ``trtllm-bench`` on a batch of ``shape``.

    Raises ``RecipeError`` if the format is unknown, or if the report is about other requests.
    """
    try:
        report: dict[str, Any] = json.loads(text)
        requests, performance = report["request_info"], report["performance"]
        first_ms = report["streaming_metrics"]["avg_ttft_ms"]
        total_ms = performance["total_latency_ms"]
        measured = (
            requests["num_requests"],
            round(requests["avg_input_length"]),
            round(requests["avg_output_length"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"trtllm-bench wrote an unknown format of report: {type(error).__name__}: {error}",
            f"use release {VERSION}",
        ) from error
    expected = (shape.batch_size, shape.prompt_tokens, shape.new_tokens)
    if measured != expected:
        raise RecipeError(
            f"trtllm-bench measured (requests, input tokens, output tokens) {measured}, not "
            f"{expected}",
            f"use release {VERSION}",
        )
    return Timing(first_ms / 1000, total_ms / 1000)


@contextmanager
def gpu_memory_samples() -> Iterator[list[int]]:
    """Yields a list of memory samples, to which a thread appends until the context ends.

    A sample is the bytes in use on all visible GPUs together, minus those in use before the
    context. The first sample is 0, so that the list is never empty.
    """
    samples, stop = [0], threading.Event()
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")

    def used_bytes() -> int:
        listing = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        # One number per GPU, in MiB. A GPU that does not report its memory has a text instead.
        return sum(int(n) for n in listing.split() if n.isdigit()) * 2**20

    used_before = used_bytes()

    def append_samples() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            samples.append(used_bytes() - used_before)

    thread = threading.Thread(target=append_samples, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def cpu_threads() -> int:
    """Returns the number of threads that the launcher set for this process; if none, of cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or cores())


def start_worker(scratch: Path, threads: int, model: TimedModel) -> Worker:
    """Starts a model's worker. ``trtllm-bench`` may write to ``scratch``."""
    if model.backend.startswith("tensorrt_llm"):
        return TensorRtLlmWorker(model, scratch)
    from recipes.engines import bench_worker  # imported, so that the stage's fingerprint covers it

    return CpuWorker(model, threads, bench_worker.__name__)


def measure(
    models: Sequence[TimedModel],
    shapes: Sequence[RequestShape],
    repetitions: int,
    start: Callable[[TimedModel], Worker],
    log: MetricsLog,
) -> list[BenchmarkRow]:
    """Measures all models on all shapes. Returns a row for each shape and model.

    In each turn, each model gets one batch. Each shape has one turn that warms up the workers that
    need it, and then ``repetitions`` measured turns. ``start`` starts a model's worker.
    """
    total_turns = len(shapes) * (repetitions + 1)
    turns = 0  # finished turns of all shapes
    timings: dict[tuple[RequestShape, int], list[Timing]] = {}  # by shape and the model's index
    with ExitStack() as stack:
        pairs = [(model, stack.enter_context(start(model))) for model in models]
        for shape in shapes:
            for turn in range(repetitions + 1):
                for index, (model, worker) in enumerate(pairs):
                    if turn == 0 and not worker.needs_warm_up:
                        continue
                    # The seed is the same for all models of a turn, so they get the same prompts.
                    prompts = random_prompts(shape, model.architecture.vocab_size, seed=turns)
                    timing = worker.generate(prompts, shape.new_tokens)
                    if turn > 0:
                        timings.setdefault((shape, index), []).append(timing)
                turns += 1
                log.progress("measure", turns, total_turns)
    # Rows are made last, because a worker's peak memory is known only after its last request.
    return [
        _row(*pairs[index], shape, shape_timings)
        for (shape, index), shape_timings in timings.items()
    ]


def _row(
    model: TimedModel, worker: Worker, shape: RequestShape, timings: Sequence[Timing]
) -> BenchmarkRow:
    return BenchmarkRow(
        role=model.role,
        backend=model.backend,
        precision=model.storage.precision,
        batch_size=shape.batch_size,
        prompt_tokens=shape.prompt_tokens,
        new_tokens=shape.new_tokens,
        time_to_first_token_ms=spread(1000 * t.first_seconds for t in timings),
        decode_tokens_per_second=spread(t.decode_rate(shape) for t in timings),
        throughput_tokens_per_second=spread(t.throughput(shape) for t in timings),
        peak_memory_bytes=worker.peak_memory_bytes,
        load_seconds=round(worker.load_seconds, 3),
        disk_bytes=folder_bytes(model.path),
    )


def speedups(
    rows: Sequence[BenchmarkRow],
    models: Sequence[TimedModel],
    roofline: Callable[[TimedModel], Roofline],
) -> list[Speedup]:
    """Returns the student's speed-ups over the teacher, in the order of the backends in ``models``.

    ``roofline`` returns the machine's peak rates, which bound the speed of a model.
    """

    def roofline_seconds(model: TimedModel, row: BenchmarkRow) -> tuple[float, float]:
        """Returns the least seconds that a model needs for a row's prefill and decoding step."""
        arch, storage, rates = model.architecture, model.storage, roofline(model)
        context = RequestShape(row.batch_size, row.prompt_tokens, row.new_tokens).context
        prefill = prefill_seconds(arch, row.batch_size, row.prompt_tokens, storage, rates)
        return prefill, decode_seconds(arch, row.batch_size, context, storage, rates)

    model_of = {(model.backend, model.role): model for model in models}
    teachers = {(row.backend, row.setting): row for row in rows if row.role == "teacher"}
    backends = list(dict.fromkeys(model.backend for model in models))  # without duplicates
    students = [row for row in rows if row.role == "student"]
    results = []
    for student in sorted(students, key=lambda row: backends.index(row.backend)):
        teacher = teachers[student.backend, student.setting]
        (teacher_prefill, teacher_step), (student_prefill, student_step) = (
            roofline_seconds(model_of[student.backend, role], student) for role in ENGINE_ROLES
        )
        prefill_roofline = None if student.precision == "fp8" else teacher_prefill / student_prefill
        teacher_ms, student_ms = teacher.time_to_first_token_ms, student.time_to_first_token_ms
        teacher_rate = teacher.decode_tokens_per_second
        student_rate = student.decode_tokens_per_second
        results.append(
            Speedup(
                backend=student.backend,
                precision=student.precision,
                batch_size=student.batch_size,
                prompt_tokens=student.prompt_tokens,
                prefill=teacher_ms.median / student_ms.median,
                prefill_roofline=prefill_roofline,
                decode=student_rate.median / teacher_rate.median,
                decode_roofline=teacher_step / student_step,
            )
        )
    return results
