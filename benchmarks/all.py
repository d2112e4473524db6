"""Repeats the short benchmarks, appends them to ``history.jsonl``, and reports regressions.

    python -m benchmarks.all [--only convert prepare distill tasks]

Each measurement is the ratio of this repository's time to that of a baseline, which does the same
work in the same run. Above 1, the baseline is faster. A ratio regressed if it grew by more than the
spread of its repeats since the last entry of the same processor and number of cores. Times are CPU
time, except for distillation, where they are wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from statistics import median

from benchmarks import convert, distill, prepare, tasks
from benchmarks.distill import Shape, run_method
from benchmarks.launching import make_inputs, model_folder, run_main
from recipes.core.files import REPO_ROOT
from recipes.core.processes import cores
from recipes.core.screen import plain_table, screen
from recipes.core.versions import git_sha
from recipes.planning.hardware import BFLOAT16_FLAGS, cpu_profile, cpuinfo

HISTORY = REPO_ROOT / "benchmarks" / "history.jsonl"
REPEATS = 3
STEPS = Shape(steps=8, micro_batch=4, seq_length=256)
TEXT_BYTES = 2_000_000
TASKS = ("sciq", "piqa", "arc_easy", "lambada_openai", "mmlu")
ITEMS = 10


@dataclass(frozen=True)
class Measurement:
    """Seconds of each repeat, and of each repeat of the baseline."""

    name: str
    baseline: str
    seconds: Sequence[float]
    baseline_seconds: Sequence[float]


@dataclass(frozen=True)
class Entry:
    """A line of the history."""

    figure: str
    baseline: str
    seconds: float
    """Median of the repeats."""
    ratio: float
    """Seconds divided by those of the baseline; median of the repeats."""
    spread: float
    """Highest minus lowest ratio of the repeats."""
    repeats: int
    commit: str | None
    date: str
    processor: str
    cores: int


def conversion(model: Path) -> Iterator[Measurement]:
    """Measures the conversion in both directions, and its verification."""
    baseline, *others = convert.SIDES
    runs = {
        side: [run["cpu_seconds"] for run in side_runs]
        for side, side_runs in convert.run_sides(model, REPEATS).items()
    }
    for side in others:
        yield Measurement(f"convert {side}", baseline, runs[side], runs[baseline])


def preparation(model: Path) -> Iterator[Measurement]:
    """Measures the preparation of text in one process."""
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.jsonl"
        prepare.write_text(text, TEXT_BYTES)
        runs = [prepare.measure(text, model, 1) for _ in range(REPEATS)]
    yield Measurement(
        "prepare",
        "its tokenizer alone",
        [run.cpu_seconds for run in runs],
        [run.tokenizer_seconds for run in runs],
    )


def distillation(model: Path) -> Iterator[Measurement]:
    """Measures training steps of the embedded model's student. ``model`` is not used."""
    bfloat16 = cpu_profile("precision") == "bf16-mixed"
    baseline, *others = "loop-bf16" if bfloat16 else "loop-fp32", "nemo", "nemo-cached"
    run_dir, tokens = make_inputs(), STEPS.micro_batch * STEPS.seq_length
    seconds = {
        name: [tokens / s for s in distill.speeds(run_method(name, STEPS, run_dir), STEPS)]
        for name in (baseline, *others)
    }
    for name in others:
        yield Measurement(f"distill {name}", baseline, seconds[name], seconds[baseline])


def evaluation(model: Path) -> Iterator[Measurement]:
    """Measures five tasks, with one subject of MMLU. The baseline is lm-eval's model in float32."""
    answers = tasks.measure(tasks.Settings(model, TASKS, ITEMS, parts=1, repeats=REPEATS))
    seconds = {
        side: [sum(repeat) for repeat in zip(*(a.seconds for a in by_task.values()), strict=True)]
        for side, by_task in answers.items()
    }
    baseline = seconds.pop(tasks.BASELINE)
    for side, repeats in seconds.items():
        yield Measurement(f"tasks {side}", tasks.BASELINE, repeats, baseline)


SCRIPTS: dict[str, Callable[[Path], Iterable[Measurement]]] = {
    "convert": conversion,
    "prepare": preparation,
    "distill": distillation,
    "tasks": evaluation,
}


def processor_type() -> str:
    """Returns the processor's name, model and bfloat16 instructions."""
    facts = dict(line.split(":", 1) for line in cpuinfo().splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = BFLOAT16_FLAGS & {*facts.get("flags", facts.get("Features", "")).split()}
    names = [facts.get("model name", "unknown"), facts.get("model", ""), *sorted(flags)]
    return ", ".join(filter(None, names))


def entry(measurement: Measurement, commit: str | None) -> Entry:
    """Makes the history's entry of a measurement."""
    seconds, baseline_seconds = measurement.seconds, measurement.baseline_seconds
    ratios = [a / b for a, b in zip(seconds, baseline_seconds, strict=True)]
    return Entry(
        measurement.name,
        measurement.baseline,
        round(median(seconds), 3),
        round(median(ratios), 3),
        round(max(ratios) - min(ratios), 3),
        len(ratios),
        commit,
        datetime.now(UTC).date().isoformat(),
        processor_type(),
        cores(),
    )


def read_history(path: Path) -> list[Entry]:
    """Reads all entries, the oldest first."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Entry(**json.loads(line)) for line in lines]


def main() -> None:
    """Measures, appends to the history, and fails if a ratio regressed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--model", help="Hugging Face folder or source; default: SmolLM2")
    parser.add_argument("--history", type=Path, default=HISTORY)
    args = parser.parse_args()
    commit, comparable = git_sha(), attrgetter("figure", "baseline", "processor", "cores")
    last = {comparable(line): line for line in read_history(args.history)}
    table = plain_table("", "measurement", "baseline", "seconds", "ratio", "spread", "before", "")
    regressions = 0
    for name in args.only:
        for measurement in SCRIPTS[name](model_folder(args.model)):
            new = entry(measurement, commit)
            with args.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(new)) + "\n")
            before = last.get(comparable(new))
            regressed = before is not None and (
                new.ratio - before.ratio > max(new.spread, before.spread)
            )
            regressions += regressed
            table.add_row(
                new.figure,
                new.baseline,
                f"{new.seconds:.2f}",
                f"{new.ratio:.3f}",
                f"{new.spread:.3f}",
                f"{before.ratio:.3f} ({before.commit})" if before else "",
                "regressed" if regressed else "",
            )
    screen().print(table)
    if regressions:
        sys.exit(f"{regressions} measurements regressed")


if __name__ == "__main__":
    run_main("benchmarks.all")
