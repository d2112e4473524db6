"""Conversion beside transformers' own load-and-save: time, memory, and ratios.

    python -m benchmarks.convert [--model FOLDER_OR_SOURCE] [--repeats N]

Every side runs in a process of its own, in turn, and the best time and lowest peak of the repeats
count. Time is without imports, memory above what it was after them. ``resident`` is the peak of all
memory, with pages of mapped files, which the system can drop at any time; ``anonymous`` is without
them. ``verify`` is the gate after a conversion: both models, one after the other in float32, their
logits, and every weight.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BASELINE = "transformers"
SIDES = (BASELINE, "to-nemo", "to-hf", "verify")


def work_of(side: str, folder: Path, scratch: Path) -> Callable[[], object]:
    """What a side does, with everything imported."""
    if side == BASELINE:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        def load_and_save() -> None:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
            model.save_pretrained(scratch / "copy")
            AutoTokenizer.from_pretrained(folder).save_pretrained(scratch / "copy")

        return load_and_save
    from nemo.collections import llm  # noqa: F401

    from nemo_convert import convert, nemo, parity, streaming  # noqa: F401

    nemo.initialize(nemo.Parallelism())
    checkpoint = scratch / "model.nemo"
    return {
        "to-nemo": lambda: convert.to_nemo(folder, checkpoint),
        "to-hf": lambda: convert.to_hf(checkpoint, scratch / "back"),
        "verify": lambda: parity.compare(folder, checkpoint).require("benchmark"),
    }[side]


def memory() -> dict[str, int]:
    """This process' memory in bytes, now."""
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    names = {"anonymous": "RssAnon", "resident": "VmRSS"}
    return {ours: int(fields[theirs].split()[0]) << 10 for ours, theirs in names.items()}


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of a piece of work, and how far memory rose above what it was."""
    before = memory()
    peak = dict(before)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for name, value in memory().items():
                peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        work()
    finally:
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
    return {"seconds": seconds, **{name: peak[name] - before[name] for name in peak}}


def run_side(side: str, folder: Path, scratch: Path) -> dict[str, float]:
    """Runs a side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.convert", "--side", side]
    done = subprocess.run(
        [*command, "--model", str(folder), "--scratch", str(scratch)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare_sides(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """The best of each side's figures over the repeats."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as scratch:
            for side in SIDES:
                runs[side].append(run_side(side, folder, Path(scratch)))
                os.sync()  # what one side leaves to be written must not slow down the next
    return {
        side: {name: min(run[name] for run in found) for name in found[0]}
        for side, found in runs.items()
    }


def table(results: dict[str, dict[str, float]], size: int) -> str:
    """The figures as text, beside the checkpoint's size and the baseline's time."""
    rows = [
        f"{'':14}{'seconds':>9}{'x baseline':>12}{'resident':>12}{'x size':>8}{'anonymous':>13}"
    ]
    for side, found in results.items():
        slower = found["seconds"] / results[BASELINE]["seconds"]
        rows.append(
            f"{side:14}{found['seconds']:9.2f}{slower:12.2f}{found['resident'] / 1e6:9.0f} MB"
            f"{found['resident'] / size:8.2f}{found['anonymous'] / 1e6:10.0f} MB"
        )
    return "\n".join([f"checkpoint: {size / 1e6:.0f} MB", *rows])


def main() -> None:
    """Measures all sides, or one as a child."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert")
    parser.add_argument("--model", help="Hugging Face folder or source; the embedded one if none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        result: Any = measured(work_of(args.side, Path(args.model), args.scratch))
        print(json.dumps(result))
        return
    from omegaconf import OmegaConf

    from nemo_convert.hf import resolve
    from recipes.core.files import REPO_ROOT

    embedded = OmegaConf.load(REPO_ROOT / "conf" / "model" / "smollm2_135m.yaml").hf_path
    folder = resolve(args.model or embedded)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(table(compare_sides(folder, args.repeats), size))


if __name__ == "__main__":
    main()
