"""Measures speed and memory of text preparation for several process counts and text sizes.

    python -m benchmarks.prepare [--model FOLDER_OR_SOURCE] [--megabytes N] [--processes 1 2]

Two texts are prepared: N megabytes of Wikipedia summaries, and ten times as many. Each summary is
used several times, with a different number in front, so that all documents differ. Every
measurement runs in its own process. Times exclude imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks.convert import run_and_measure
from benchmarks.launching import call_in_process, model_folder, run_main
from recipes.core.files import REPO_ROOT

SIZE_FACTORS = (1, 10)
"""Sizes of the two texts, as multiples of ``--megabytes``."""


@dataclass(frozen=True)
class PreparationRun:
    """Measurements of one preparation; memory in bytes."""

    tokens: int
    """Tokens of all splits."""
    seconds: float
    main_memory: float
    """Peak anonymous memory of the main process, minus its memory after imports."""
    tokenizer_memory: float
    """Peak resident memory of the largest tokenizer process; 0 if there is none."""


def write_text(path: Path, size: int) -> None:
    """Writes one document per line, as JSON, until the file has at least ``size`` bytes."""
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


def prepare_once(text: Path, model: Path, processes: int, folder: Path) -> PreparationRun:
    """Measures one preparation of a text by ``prepare_data``, in this process.

    ``processes`` is the number of processes that tokenize.
    """
    from recipes.core.metrics import MetricsLog
    from recipes.data.corpus import TOKEN_BYTES
    from recipes.data.preparation import prepare
    from recipes.data.settings import PrepareDataConfig
    from recipes.data.tokenizer import load_tokenizer

    cfg = PrepareDataConfig(sources=[str(text)], processes=processes)
    tokenizer = load_tokenizer(model)
    tokenizer.encode(["a"])  # the first call initialises the tokenizer
    main_process = run_and_measure(lambda: prepare(cfg, tokenizer, folder, MetricsLog(None)))
    corpus_bytes = sum(path.stat().st_size for path in folder.glob("*.bin"))  # of all splits
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    # With one process, the main process tokenizes. ``ru_maxrss`` is in KiB.
    tokenizer_memory = children.ru_maxrss * 1024.0 if processes > 1 else 0.0
    return PreparationRun(
        tokens=corpus_bytes // TOKEN_BYTES,
        seconds=main_process["seconds"],
        main_memory=main_process["anonymous"],
        tokenizer_memory=tokenizer_memory,
    )


def measure(text: Path, model: Path, processes: int) -> PreparationRun:
    """Calls ``prepare_once`` in a child process, with a temporary folder."""
    with tempfile.TemporaryDirectory(dir=text.parent) as folder:
        args = text, model, processes, Path(folder)
        run: PreparationRun = call_in_process("benchmarks.prepare:prepare_once", *args)
    return run


def main() -> None:
    """Reads the command line, measures, and prints the table row by row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare")
    parser.add_argument("--model", help="Hugging Face folder or source; default: SmolLM2")
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    model = model_folder(args.model)
    print(
        "| text | processes | tokens/s | memory | memory of a tokenizer process |\n"
        "|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for factor in SIZE_FACTORS:
            text = Path(scratch) / f"{factor}.jsonl"
            write_text(text, int(factor * args.megabytes * 1e6))
            for processes in args.processes:
                run = measure(text, model, processes)
                print(
                    f"| {text.stat().st_size / 1e6:.0f} MB, {run.tokens / 1e6:.1f} M tokens "
                    f"| {processes} | {run.tokens / run.seconds:,.0f} "
                    f"| {run.main_memory / 1e6:.1f} MB | {run.tokenizer_memory / 1e6:.0f} MB |",
                    flush=True,
                )


if __name__ == "__main__":
    run_main("benchmarks.prepare")
