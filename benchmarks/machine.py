"""What the machine can do at best: matrix products of a model's shapes, and copies.

Started as ``python -m benchmarks.machine``, in a process of its own like every contender.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

REPEATS = 5
COPY_BYTES = 1 << 28
"""Well beyond any cache."""


def best_seconds(work: Callable[[], Any]) -> float:
    """Shortest of several runs, after one that warms up; other programs only make it longer."""
    work()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def linear_rate(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
    """FLOP/s of a linear layer [tokens, inputs] → [tokens, outputs]."""
    x, weight = torch.randn(tokens, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    return 2 * tokens * inputs * outputs / best_seconds(lambda: linear(x, weight))


def copy_rate() -> float:
    """Bytes per second of a copy, each byte counted as read and as written."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / best_seconds(lambda: target.copy_(source))


def main() -> None:
    """Measures and writes the rates."""
    parser = argparse.ArgumentParser()
    for size in ("tokens", "hidden", "ffn", "vocabulary"):
        parser.add_argument(f"--{size}", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    layers = {"feed-forward": args.ffn, "vocabulary": args.vocabulary}
    rates: dict[str, Any] = {
        f"{dtype}".removeprefix("torch."): {
            name: linear_rate(args.tokens, args.hidden, outputs, dtype)
            for name, outputs in layers.items()
        }
        for dtype in (torch.float32, torch.bfloat16)
    }
    rates["copy_bytes_per_second"] = copy_rate()
    args.out.write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
