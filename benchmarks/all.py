"""Measures again what takes minutes, keeps it in ``history.jsonl``, and says what got worse.

    python -m benchmarks.all [--only convert prepare distill tasks]

A figure is how long something takes beside its baseline, which does the same work in the same run:
a ratio, above 1 where ours is slower. It is worse than the last one of the same kind of processor
and as many cores if it grew by more than either spread, the range of its repeats. Seconds are CPU
time of the process; a step of distillation, which has several, is taken by the clock.
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
from benchmarks.contenders import Shape, make_inputs, model_folder, run_contender
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
class Figure:
    """Seconds of each repeat, and of the baseline beside it."""

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
    """Over the baseline's; median of the repeats."""
    spread: float
    """Between the repeats' highest and lowest ratio."""
    repeats: int
    commit: str | None
    date: str
    processor: str
    cores: int


def conversion(model: Path) -> Iterator[Figure]:
    """Both directions and their gate."""
    baseline, *others = convert.SIDES
    runs = {
        side: [run["cpu_seconds"] for run in found]
        for side, found in convert.run_sides(model, REPEATS).items()
    }
    for side in others:
        yield Figure(f"convert {side}", baseline, runs[side], runs[baseline])


def preparation(model: Path) -> Iterator[Figure]:
    """Text, by one process."""
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.jsonl"
        prepare.write_text(text, TEXT_BYTES)
        runs = [prepare.measure(text, model, 1) for _ in range(REPEATS)]
    yield Figure(
        "prepare",
        "its tokenizer alone",
        [run.cpu_seconds for run in runs],
        [run.tokenizer_seconds for run in runs],
    )


def distillation(model: Path) -> Iterator[Figure]:
    """Steps of the embedded model's student, whatever model the others have."""
    bfloat16 = cpu_profile("precision") == "bf16-mixed"
    baseline, *others = "loop-bf16" if bfloat16 else "loop-fp32", "nemo", "nemo-cached"
    run_dir, tokens = make_inputs(), STEPS.micro_batch * STEPS.seq_length
    steps = {}
    for name in (baseline, *others):
        with tempfile.TemporaryDirectory(dir=run_dir.parent) as scratch:
            record = run_contender(name, STEPS, run_dir, Path(scratch))
        steps[name] = [tokens / speed for speed in distill.speeds(record, STEPS)]
    for name in others:
        yield Figure(f"distill {name}", baseline, steps[name], steps[baseline])


def evaluation(model: Path) -> Iterator[Figure]:
    """Some items of five tasks, with one subject of MMLU, against lm-eval's model in float32."""
    options = [f"--model={model}", f"--limit={ITEMS}", "--parts=1", f"--repeats={REPEATS}"]
    found = tasks.measure([*options, "--tasks", *TASKS])
    seconds = {
        side: [sum(each) for each in zip(*(one.seconds for one in of.values()), strict=True)]
        for side, of in found.items()
    }
    baseline = seconds.pop(tasks.BASELINE)
    for side, each in seconds.items():
        yield Figure(f"tasks {side}", tasks.BASELINE, each, baseline)


SCRIPTS: dict[str, Callable[[Path], Iterable[Figure]]] = {
    "convert": conversion,
    "prepare": preparation,
    "distill": distillation,
    "tasks": evaluation,
}


def processor_kind() -> str:
    """What tells one kind of processor from others: its name, its model and bfloat16 products."""
    facts = dict(line.split(":", 1) for line in cpuinfo().splitlines() if ":" in line)
    known = {name.strip(): value.strip() for name, value in facts.items()}
    flags = BFLOAT16_FLAGS & {*known.get("flags", known.get("Features", "")).split()}
    names = [known.get("model name", "unknown"), known.get("model", ""), *sorted(flags)]
    return ", ".join(filter(None, names))


def entry(figure: Figure, commit: str | None) -> Entry:
    """A figure as it is kept."""
    ratios = [a / b for a, b in zip(figure.seconds, figure.baseline_seconds, strict=True)]
    return Entry(
        figure.name,
        figure.baseline,
        round(median(figure.seconds), 3),
        round(median(ratios), 3),
        round(max(ratios) - min(ratios), 3),
        len(ratios),
        commit,
        datetime.now(UTC).date().isoformat(),
        processor_kind(),
        cores(),
    )


def last(found: Entry, history: Iterable[Entry]) -> Entry | None:
    """The entry before it that it compares with."""
    alike = attrgetter("figure", "baseline", "processor", "cores")
    return next((one for one in reversed([*history]) if alike(one) == alike(found)), None)


def worse(found: Entry, before: Entry) -> bool:
    """Whether it grew by more than noise."""
    return found.ratio - before.ratio > max(found.spread, before.spread)


def read_history(path: Path) -> list[Entry]:
    """All entries, the oldest first."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Entry(**json.loads(line)) for line in lines]


def main() -> None:
    """Measures, keeps, and fails where something got worse."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--model", help="Hugging Face folder or source; the embedded one if none")
    parser.add_argument("--history", type=Path, default=HISTORY)
    args = parser.parse_args()
    history, commit = read_history(args.history), git_sha()
    table = plain_table("", "figure", "baseline", "seconds", "ratio", "spread", "before", "")
    regressions = 0
    for name in args.only:
        for figure in SCRIPTS[name](model_folder(args.model)):
            found = entry(figure, commit)
            with args.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(found)) + "\n")
            before = last(found, history)
            is_worse = before is not None and worse(found, before)
            regressions += is_worse
            table.add_row(
                found.figure,
                found.baseline,
                f"{found.seconds:.2f}",
                f"{found.ratio:.3f}",
                f"{found.spread:.3f}",
                f"{before.ratio:.3f} ({before.commit})" if before else "",
                "worse" if is_worse else "",
            )
    screen().print(table)
    if regressions:
        sys.exit(f"{regressions} of them got worse")


if __name__ == "__main__":
    main()
