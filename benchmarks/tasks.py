"""Benchmarks as ``evaluate_tasks`` asks them, beside lm-eval's own model: time, and every answer.

    python -m benchmarks.tasks [--model FOLDER_OR_SOURCE] [--tasks NAME ...] [--limit N]

Both are asked the same items by lm-eval, in float32 and in bfloat16, each side in a process of its
own, in turn. Time is CPU time of all threads, from the first prompt to the last metric, without
loading; best of the repeats. Items are equal where the task's metric is; beside it stands how far
log-likelihoods are apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean

import numpy as np
from rich.table import Table

from benchmarks.contenders import execute, model_folder
from recipes.core.files import write_json
from recipes.core.screen import screen
from recipes.evaluation.results import Item
from recipes.planning.hardware import cpu_profile

TASKS = ("sciq", "piqa", "arc_easy", "hellaswag", "lambada_openai", "mmlu")
SHOTS = {"mmlu": 5}
"""As in ``conf/tasks/full.yaml``."""
BATCH = 8
"""Sequences that lm-eval's model reads at once."""
BASELINE = "lm-eval, float32"
SIDES = {
    BASELINE: (False, "32"),
    "lm-eval, bfloat16": (False, "bf16-mixed"),
    "packed, float32": (True, "32"),
    "packed, bfloat16": (True, "bf16-mixed"),
}
"""Whether it is ours, and its precision."""


@dataclass(frozen=True)
class Answered:
    """What a side made of a task."""

    seconds: list[float]
    """Of each repeat."""
    metric: str
    items: list[Item]

    @property
    def scores(self) -> list[float]:
        """The task's metric of each item."""
        return [item.metrics[self.metric] for item in self.items]

    def equal(self, other: Answered) -> int:
        """Items with the same score."""
        return sum(one == another for one, another in zip(self.scores, other.scores, strict=True))

    def apart(self, other: Answered) -> float:
        """Largest difference of a continuation's log-likelihood, in nats."""
        pairs = zip(self.items, other.items, strict=True)
        return max(float(np.abs(_likelihoods(a) - _likelihoods(b)).max()) for a, b in pairs)


def _likelihoods(item: Item) -> np.ndarray:
    """Of every continuation; a response is pairs of that and whether it is the greedy one."""
    pairs: np.ndarray = np.array(item.response, dtype=float).reshape(-1, 2)
    return pairs.T[0]


def answer_all(side: str, model: Path, args: argparse.Namespace) -> dict[str, Answered]:
    """Answers every task in this process."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recipes.core.precision import dtype_of
    from recipes.evaluation import packed_lm

    ours, precision = SIDES[side]
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype_of(precision), trust_remote_code=False
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if ours:
        asked: HFLM = packed_lm.PackedLM(
            loaded, tokenizer, args.pack_tokens, lambda done, total: None
        )
    else:
        asked = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=BATCH)
    found = {}
    for task in packed_lm.load_tasks(args.tasks, "pypi", SHOTS):
        some = replace(task, parts=dict(islice(task.parts.items(), args.parts)))
        seconds = []
        for _ in range(args.repeats):
            began = time.process_time()
            items = packed_lm.answer(asked, some, args.limit, seed=1234)
            seconds.append(time.process_time() - began)
        found[task.name] = Answered(seconds, task.metric, items)
    return found


def run_side(side: str, options: Sequence[str]) -> dict[str, Answered]:
    """Runs a side in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "answers.json"
        command = [sys.executable, "-m", "benchmarks.tasks", *options]
        execute([*command, f"--side={side}", f"--out={out}"])
        found = json.loads(out.read_text(encoding="utf-8"))
    return {
        task: Answered(**{**answered, "items": [Item(**item) for item in answered["items"]]})
        for task, answered in found.items()
    }


def measure(options: Sequence[str]) -> dict[str, dict[str, Answered]]:
    """Every side that this machine has products for, one after the other."""
    types = ("32", cpu_profile("precision"))
    return {side: run_side(side, options) for side, (_, p) in SIDES.items() if p in types}


def draw(sides: Mapping[str, Mapping[str, Answered]]) -> Table:
    """A table, lm-eval's own first in each task; last, all tasks together."""
    table = Table(
        "task", "items", "model", "CPU s", "times as fast", "score", "equal", "nats apart"
    )
    baseline = sides[BASELINE]
    for task, expected in baseline.items():
        for side, found in sides.items():
            one = found[task]
            table.add_row(
                task,
                f"{len(one.items)}",
                side,
                f"{min(one.seconds):.2f}",
                f"{min(expected.seconds) / min(one.seconds):.2f}",
                f"{mean(one.scores):.4f}",
                f"{one.equal(expected)}",
                f"{one.apart(expected):.4f}",
            )
    whole = {side: sum(min(one.seconds) for one in of.values()) for side, of in sides.items()}
    for side, seconds in whole.items():
        table.add_row("all", "", side, f"{seconds:.1f}", f"{whole[BASELINE] / seconds:.2f}")
    return table


def main() -> None:
    """Measures all sides, or one as a child."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks")
    parser.add_argument("--model", help="Hugging Face folder or source; the embedded one if none")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--limit", type=int, default=40, help="items of each part of a task")
    parser.add_argument("--parts", type=int, default=3, help="of a task that has several (mmlu)")
    parser.add_argument("--pack-tokens", type=int, default=512, help="of a pass of ours")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = model_folder(args.model)
    if args.side:
        found = answer_all(args.side, model, args)
        write_json(args.out, {task: asdict(answered) for task, answered in found.items()})
        return
    screen().print(draw(measure(sys.argv[1:])))


if __name__ == "__main__":
    main()
