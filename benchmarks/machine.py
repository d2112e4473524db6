"""What the machine can do: products of a model's shapes at best, a training's, and copies.

Started as ``python -m benchmarks.machine``, in a process of its own like every contender.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from recipes.engines.machine_rates import copy_rate, linear_rate, training_rates


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
    rates["training"] = asdict(training_rates(torch.get_num_threads())[0])
    args.out.write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
