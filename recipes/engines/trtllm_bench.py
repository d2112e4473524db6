"""``trtllm-bench``: its command line, its data and its report."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError
from recipes.engines.tensorrt_llm import LLM_OPTIONS
from recipes.engines.timing import Contender, RequestShape, Timing, Worker

DATASET, REPORT = "dataset.jsonl", "report.json"
SAMPLE_SECONDS = 0.2
MEBIBYTE = 1 << 20


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
        (self._scratch / DATASET).write_text(dataset(prompts, new_tokens), encoding="utf-8")
        report = self._scratch / REPORT
        report.unlink(missing_ok=True)
        start = time.monotonic()
        with _MemoryWatch() as watch:
            argv = command(self._contender, shape, self._scratch)
            done = subprocess.run(argv, check=False)
        seconds = time.monotonic() - start
        if done.returncode or not report.is_file():
            raise RecipeError(
                f"trtllm-bench ended with status {done.returncode} and no usable report; its "
                "messages are in the stage's log.",
                "python launch/run.py logs run_dir=DIR shows them",
            )
        timing = parse_report(report.read_text(encoding="utf-8"), shape)
        self.load_seconds = seconds - timing.total_seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, watch.peak)
        return timing


def dataset(prompts: list[list[int]], new_tokens: int) -> str:
    """Returns the requests, one JSON object a line."""
    requests = (
        {"task_id": number, "input_ids": ids, "output_tokens": new_tokens}
        for number, ids in enumerate(prompts)
    )
    return "".join(f"{json.dumps(request)}\n" for request in requests)


def command(contender: Contender, shape: RequestShape, scratch: Path) -> list[str]:
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


def parse_report(text: str, shape: RequestShape) -> Timing:
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


def used_memory(listing: str) -> int:
    """Sums the output of ``nvidia-smi --query-gpu=memory.used`` over all GPUs, in bytes."""
    return sum(int(line) for line in listing.split() if line.isdigit()) * MEBIBYTE


class _MemoryWatch:
    """Samples the GPUs' memory in use in a thread."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._stop.wait(SAMPLE_SECONDS):
            listing = subprocess.run(query, capture_output=True, text=True, check=False).stdout
            self.peak = max(self.peak, used_memory(listing))

    def __enter__(self) -> _MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
