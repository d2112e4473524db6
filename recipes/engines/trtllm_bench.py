"""``trtllm-bench``: its command line, its data, and what its report says."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError
from recipes.engines.tensorrt_llm import LLM_OPTIONS
from recipes.engines.timing import Timing
from recipes.planning.roofline import RequestShape

SAMPLE_SECONDS = 0.2
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Target:
    """An engine as ``trtllm-bench`` wants it."""

    backend: str
    """``tensorrt_llm`` or ``tensorrt_llm_pytorch``."""
    engine: Path
    folder: Path
    """Hugging Face folder of the model: its config and tokenizer are read."""
    tensor_parallel_size: int


@dataclass(frozen=True)
class Requests:
    """A batch of prompts of one length that start together."""

    prompts: list[list[int]]
    new_tokens: int

    @property
    def shape(self) -> RequestShape:
        """Their number and lengths."""
        return RequestShape(len(self.prompts), len(self.prompts[0]), self.new_tokens)

    def dataset(self) -> str:
        """One JSON object a line."""
        return "".join(
            json.dumps({"task_id": number, "input_ids": ids, "output_tokens": self.new_tokens})
            + "\n"
            for number, ids in enumerate(self.prompts)
        )


def command(target: Target, shape: RequestShape, scratch: Path) -> list[str]:
    """One batch of requests that start together, streamed so that first tokens are timed."""
    common = [
        *("trtllm-bench", "--model", target.folder.name, "--model_path", str(target.folder)),
        *("--workspace", str(scratch), "throughput"),
        *("--dataset", str(scratch / "dataset.jsonl")),
        *("--report_json", str(scratch / "report.json")),
        *("--num_requests", str(shape.batch_size), "--concurrency", str(shape.batch_size)),
        *("--warmup", str(shape.batch_size), "--streaming"),
    ]
    if target.backend == "tensorrt_llm":
        return [*common, "--backend", "tensorrt", "--engine_dir", str(target.engine)]
    return [
        *common,
        *("--backend", "pytorch", "--tp", str(target.tensor_parallel_size)),
        *("--max_batch_size", str(shape.batch_size)),
        *("--max_seq_len", str(shape.prompt_tokens + shape.new_tokens)),
        *("--extra_llm_api_options", str(target.engine / LLM_OPTIONS)),
    ]


def parse_report(text: str, shape: RequestShape) -> Timing:
    """Reads what ``--report_json`` wrote; refuses another form or other requests."""
    try:
        report: dict[str, Any] = json.loads(text)
        requests, performance = report["request_info"], report["performance"]
        first = report["streaming_metrics"]["avg_ttft_ms"]
        total = performance["total_latency_ms"]
        found = (
            requests["num_requests"],
            round(requests["avg_input_length"]),
            round(requests["avg_output_length"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"trtllm-bench wrote a report of another form: {type(error).__name__}: {error}",
            "use the pinned release; streaming_metrics needs --streaming",
        ) from error
    wanted = (shape.batch_size, shape.prompt_tokens, shape.new_tokens)
    if found != wanted:
        raise RecipeError(
            f"trtllm-bench measured requests, input and output of {found} instead of {wanted}.",
            "use the pinned release",
        )
    return Timing(first / 1000, total / 1000)


def used_memory(listing: str) -> int:
    """Bytes in use on all GPUs, from ``nvidia-smi --query-gpu=memory.used``, a line each."""
    return sum(int(line) for line in listing.split() if line.isdigit()) * MEBIBYTE


@dataclass(frozen=True)
class BenchRun:
    """One start of ``trtllm-bench``."""

    timing: Timing
    load_seconds: float
    """From its start to its end, less the requests: imports, loading and warm-up."""
    peak_memory_bytes: int
    """Of the GPUs, the pool of the KV cache included, which takes most of what is free."""


def run(target: Target, requests: Requests, scratch: Path) -> BenchRun:
    """Measures one batch of requests; refuses a run without a usable report."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "dataset.jsonl").write_text(requests.dataset(), encoding="utf-8")
    report = scratch / "report.json"
    report.unlink(missing_ok=True)
    began = time.monotonic()
    with _MemoryWatch() as watch:
        done = subprocess.run(command(target, requests.shape, scratch), check=False)
    seconds = time.monotonic() - began
    if done.returncode or not report.is_file():
        raise RecipeError(
            f"trtllm-bench ended with status {done.returncode} and no usable report; its messages "
            "are in the stage's log.",
            "python launch/run.py logs run_dir=DIR shows them",
        )
    timing = parse_report(report.read_text(encoding="utf-8"), requests.shape)
    return BenchRun(timing, seconds - timing.total_seconds, watch.peak)


class _MemoryWatch:
    """Samples the memory in use on the GPUs while something else runs."""

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
