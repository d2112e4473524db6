"""Loads one model and times batches, in its own process, so that its memory can be measured.

``bench.CpuWorker`` starts this module as ``python -m recipes.engines.bench_worker``. The process
writes the loading time to standard output. Then it reads batches of requests, one per line, such as
``{"prompts": [[5, 6], [7, 8]], "new_tokens": 32}``. It answers each line with the batch's timing
and the peak memory. Only the baseline, transformers, needs torch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from recipes.core.processes import die_with_parent, peak_memory_bytes
from recipes.engines.openvino import Pipeline, disable_telemetry
from recipes.engines.timing import Generation, Timing


class Transformers:
    """Runs the baseline: a transformers model in eager mode and float32."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        from nemo_convert.hf import load_causal_lm

        torch.set_num_threads(threads)
        self._model = load_causal_lm(folder)

    def generate(self, tokens: list[list[int]], new_tokens: int) -> Generation:
        """Continues prompts [batch, sequence] greedily by exactly ``new_tokens`` tokens."""
        import torch

        with torch.inference_mode():
            prompts = torch.tensor(tokens)
            start = time.perf_counter()
            output = self._model(prompts, use_cache=True, logits_to_keep=1)
            generated = [output.logits[:, -1:].argmax(-1)]  # tensors [batch, 1]
            first_seconds = time.perf_counter() - start
            for _ in range(new_tokens - 1):
                output = self._model(
                    generated[-1], past_key_values=output.past_key_values, use_cache=True
                )
                generated.append(output.logits[:, -1:].argmax(-1))
            timing = Timing(first_seconds, time.perf_counter() - start)
        return Generation(torch.cat(generated, dim=1).tolist(), timing)


def import_library(backend: str) -> None:
    """Imports a backend's libraries in advance, so that the loading time excludes imports."""
    names = ["openvino_genai"] if backend == "openvino" else ["torch", "transformers.models.auto"]
    for name in names:
        importlib.import_module(name)


def serve(model: Pipeline | Transformers, answers: TextIO) -> None:
    """Reads batches from standard input until it ends, and writes one answer for each.

    Raises ``ValueError`` if the model generated another number of tokens than requested.
    """
    for line in sys.stdin:
        request = json.loads(line)
        generation = model.generate(request["prompts"], request["new_tokens"])
        lengths = {len(tokens) for tokens in generation.tokens}
        if lengths != {request["new_tokens"]}:
            raise ValueError(
                f"expected {request['new_tokens']} new tokens in each sequence, got {lengths}"
            )
        answer = {"timing": asdict(generation.timing), "peak_memory_bytes": peak_memory_bytes()}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Loads an OpenVINO engine or the baseline, reports the loading time, and serves batches."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    die_with_parent()
    disable_telemetry()
    # Answers go to a copy of standard output, which is a pipe to ``measure_speed``. Standard output
    # itself becomes standard error, so that the output of libraries goes to the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import_library(args.backend)
    start = time.perf_counter()
    model: Pipeline | Transformers
    if args.backend == "openvino":
        model = Pipeline(args.model, args.threads)
    else:
        model = Transformers(args.model, args.threads)
    print(json.dumps({"load_seconds": time.perf_counter() - start}), file=answers, flush=True)
    serve(model, answers)


if __name__ == "__main__":
    main()
