"""Loads one model in a process of its own and times what it is asked to, so that memory is its own.

Started by ``measure_speed`` as ``python -m recipes.engines.bench_worker --backend B --model DIR``.
It says on standard output how long loading took, then reads one request a line, ``{"batch_size": …,
"prompt_tokens": …, "new_tokens": …, "seed": …}``, and answers each with its seconds. Between
requests it only waits, so several of them can be measured in turn.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from recipes.core.processes import die_with_parent, peak_memory_bytes
from recipes.engines.openvino import Pipeline, without_telemetry
from recipes.engines.timing import Timing

FIRST_ORDINARY_TOKEN = 3
"""Prompts are random tokens; the lowest ids are special ones in most vocabularies."""


class Transformers:
    """The baseline: a transformers model in eager mode and float32, driven token by token."""

    def __init__(self, folder: Path) -> None:
        from nemo_convert.hf import load_causal_lm

        self._model = load_causal_lm(folder)

    @torch.inference_mode()
    def generate(self, tokens: torch.Tensor, new_tokens: int) -> tuple[list[list[int]], Timing]:
        """Continues prompts [batch, sequence] greedily by exactly ``new_tokens`` tokens."""
        began = time.perf_counter()
        output = self._model(tokens, use_cache=True, logits_to_keep=1)
        step = output.logits[:, -1:].argmax(-1)
        first = time.perf_counter() - began
        written = [step]
        for _ in range(new_tokens - 1):
            output = self._model(step, past_key_values=output.past_key_values, use_cache=True)
            step = output.logits[:, -1:].argmax(-1)
            written.append(step)
        total = time.perf_counter() - began
        return torch.cat(written, dim=1).tolist(), Timing(first, total)


def import_library(backend: str) -> None:
    """Imports what loading needs, so that the time of loading is the model's."""
    importlib.import_module(
        "openvino_genai" if backend == "openvino" else "transformers.models.auto"
    )


def load(backend: str, folder: Path, threads: int) -> Any:
    """Something with ``generate``."""
    torch.set_num_threads(threads)
    return Pipeline(folder, threads) if backend == "openvino" else Transformers(folder)


def prompts(request: dict[str, int], vocabulary: int) -> torch.Tensor:
    """Random tokens [batch, sequence], other ones for every seed: engines remember prompts."""
    generator = torch.Generator().manual_seed(request["seed"])
    shape = (request["batch_size"], request["prompt_tokens"])
    return torch.randint(FIRST_ORDINARY_TOKEN, vocabulary, shape, generator=generator)


def serve(model: Any, vocabulary: int, answers: TextIO) -> None:
    """Answers requests until there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        written, timing = model.generate(prompts(request, vocabulary), request["new_tokens"])
        lengths = {len(tokens) for tokens in written}
        if lengths != {request["new_tokens"]}:
            raise ValueError(f"asked for {request['new_tokens']} tokens, got {lengths}")
        answer = {
            "first_seconds": timing.first_seconds,
            "total_seconds": timing.total_seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Loads, says so, and serves."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    die_with_parent()
    without_telemetry()
    # Libraries print to standard output; what is printed there from now on goes to the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import_library(args.backend)
    began = time.perf_counter()
    model = load(args.backend, args.model, args.threads)
    print(json.dumps({"load_seconds": time.perf_counter() - began}), file=answers, flush=True)
    serve(model, args.vocabulary, answers)


if __name__ == "__main__":
    main()
