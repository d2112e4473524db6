"""Preparing text: tokens a second by processes, and memory by the size of the text.

    python -m benchmarks.prepare [--model FOLDER_OR_SOURCE] [--megabytes N] [--processes 1 2]

The text is the recipes' Wikipedia summaries in JSONL, each with a number before it, so that no two
are alike, again and again until there are as many megabytes, and ten times as many. Every
measurement runs in a process of its own, one after the other. Time is without imports; memory is
the peak above what it was after them, of the process that reads, decides and writes, and what is
resident at most, libraries included, of any that tokenizes beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from benchmarks.contenders import model_folder
from benchmarks.convert import measured
from recipes.core.files import REPO_ROOT

TIMES = (1, 10)


@dataclass(frozen=True)
class Measurement:
    """One preparation."""

    tokens: int
    seconds: float
    cpu_seconds: float
    """Of the process that writes."""
    tokenizer_seconds: float
    """The same, of its tokenizer alone on the same text."""
    anonymous: float
    """Peak above the imports' memory, in bytes, of the process that writes."""
    helper: float
    """Peak resident memory, in bytes, of the largest process beside it; 0 of none."""


def write_text(path: Path, size: int) -> None:
    """Writes at least ``size`` bytes of documents, no two of them alike."""
    from omegaconf import OmegaConf

    from recipes.data.corpus import read_source

    data = OmegaConf.load(REPO_ROOT / "conf" / "data" / "wikipedia.yaml")
    texts = [document.text for document in read_source(data.sources[0], data.text_field)]
    with path.open("w", encoding="utf-8") as file:
        for number in count():
            if file.tell() >= size:
                return
            text = f"{number}. {texts[number % len(texts)]}"
            file.write(json.dumps({"text": text}) + "\n")


def prepare_once(text: Path, model: Path, processes: int, folder: Path) -> Measurement:
    """Measures a preparation in this process."""
    from recipes.core.metrics import MetricsLog
    from recipes.data import preparation
    from recipes.data.settings import PrepareDataConfig
    from recipes.data.tokenizer import load_tokenizer

    cfg = PrepareDataConfig(sources=[str(text)], processes=processes)
    tokenizer = load_tokenizer(model)
    tokenizer.encode(["a"])
    done: list[preparation.PreparationState] = []
    found = measured(
        lambda: done.append(preparation.prepare(cfg, tokenizer, folder, MetricsLog(None)))
    )
    tokens = sum(size for size, _ in done[0].sizes.values()) // 4
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    helper = children.ru_maxrss * 1024.0 if processes > 1 else 0.0
    with text.open(encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    alone = measured(lambda: tokenizer.encode(documents))
    return Measurement(
        tokens,
        found["seconds"],
        found["cpu_seconds"],
        alone["cpu_seconds"],
        found["anonymous"],
        helper,
    )


def measure(text: Path, model: Path, processes: int) -> Measurement:
    """Runs a preparation in a process of its own."""
    with tempfile.TemporaryDirectory(dir=text.parent) as folder:
        command = [sys.executable, "-m", "benchmarks.prepare", "--text", str(text)]
        done = subprocess.run(
            [*command, "--model", str(model), "--processes", str(processes), "--folder", folder],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measures all, or one as a child."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare")
    parser.add_argument("--model", help="Hugging Face folder or source; the embedded one if none")
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.text:
        [processes] = args.processes
        one = prepare_once(args.text, Path(args.model), processes, args.folder)
        print(json.dumps(asdict(one)))
        return
    model = model_folder(args.model)
    print("| text | processes | tokens/s | memory | of a helper |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for times in TIMES:
            text = Path(scratch) / f"{times}.jsonl"
            write_text(text, int(times * args.megabytes * 1e6))
            for processes in args.processes:
                one = measure(text, model, processes)
                print(
                    f"| {text.stat().st_size / 1e6:.0f} MB, {one.tokens / 1e6:.1f} M tokens "
                    f"| {processes} | {one.tokens / one.seconds:,.0f} "
                    f"| {one.anonymous / 1e6:.1f} MB | {one.helper / 1e6:.0f} MB |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
