"""Compares ``evaluate_tasks`` to lm-eval's own model: time, and every answer.

    python -m benchmarks.tasks [--model FOLDER_OR_SOURCE] [--tasks NAME ...] [--limit N]

lm-eval gives both the same items, in float32 and in bfloat16, each side in a process of its own,
one after the other. Time is CPU time of all threads without loading, the shortest of the repeats.
``equal`` counts items with the same score, ``nats apart`` is the largest difference of a
log-likelihood.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean

import numpy as np
from rich.table import Table

from benchmarks.launching import model_folder, run_child, run_main
from recipes.core.files import write_json
from recipes.core.screen import screen
from recipes.evaluation.results import Item
from recipes.planning.hardware import cpu_profile

TASKS = ("sciq", "piqa", "arc_easy", "hellaswag", "lambada_openai", "mmlu")
SHOTS = {"mmlu": 5}
"""As in ``conf/tasks/full.yaml``."""
BATCH = 8
"""Batch size of lm-eval's model."""
BASELINE = "lm-eval, float32"
SIDES = {
    BASELINE: (False, "32"),
    "lm-eval, bfloat16": (False, "bf16-mixed"),
    "packed, float32": (True, "32"),
    "packed, bfloat16": (True, "bf16-mixed"),
}
"""Whether a side is ours, and its precision."""


@dataclass(frozen=True)
class Answers:
    """A side's answers to a task."""

    seconds: list[float]
    """Of each repeat."""
    metric: str
    items: list[Item]

    @property
    def scores(self) -> list[float]:
        """The task's metric of each item."""
        return [item.metrics[self.metric] for item in self.items]

    def equal(self, other: Answers) -> int:
        """Counts items with the same score."""
        return sum(one == another for one, another in zip(self.scores, other.scores, strict=True))

    def largest_difference(self, other: Answers) -> float:
        """Returns the largest difference of a continuation's log-likelihood, in nats."""
        pairs = zip(self.items, other.items, strict=True)
        return max(float(np.abs(_likelihoods(a) - _likelihoods(b)).max()) for a, b in pairs)


def _likelihoods(item: Item) -> np.ndarray:
    """Returns the log-likelihood of every continuation: the first of each pair of a response."""
    pairs: np.ndarray = np.array(item.response, dtype=float).reshape(-1, 2)
    return pairs.T[0]


def answer_all(side: str, model: Path, args: argparse.Namespace) -> dict[str, Answers]:
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
        lm: HFLM = packed_lm.PackedLM(loaded, tokenizer, args.pack_tokens, lambda done, total: None)
    else:
        lm = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=BATCH)
    answers = {}
    for task in packed_lm.load_tasks(args.tasks, "pypi", SHOTS):
        some = replace(task, parts=dict(islice(task.parts.items(), args.parts)))
        seconds = []
        for _ in range(args.repeats):
            start = time.process_time()
            items = packed_lm.answer(lm, some, args.limit, seed=1234)
            seconds.append(time.process_time() - start)
        answers[task.name] = Answers(seconds, task.metric, items)
    return answers


def run_side(side: str, options: Sequence[str]) -> dict[str, Answers]:
    """Runs a side in a process of its own."""
    by_task = run_child("benchmarks.tasks", *options, f"--side={side}")
    return {
        task: Answers(**{**answers, "items": [Item(**item) for item in answers["items"]]})
        for task, answers in by_task.items()
    }


def measure(options: Sequence[str]) -> dict[str, dict[str, Answers]]:
    """Runs every side whose precision this machine supports, one after the other."""
    types = ("32", cpu_profile("precision"))
    return {side: run_side(side, options) for side, (_, p) in SIDES.items() if p in types}


def draw(sides: Mapping[str, Mapping[str, Answers]]) -> Table:
    """Makes the table: the sides of each task, then the sums over all tasks."""
    table = Table(
        "task", "items", "model", "CPU s", "times as fast", "score", "equal", "nats apart"
    )
    baseline = sides[BASELINE]
    for task, expected in baseline.items():
        for side, by_task in sides.items():
            one = by_task[task]
            table.add_row(
                task,
                f"{len(one.items)}",
                side,
                f"{min(one.seconds):.2f}",
                f"{min(expected.seconds) / min(one.seconds):.2f}",
                f"{mean(one.scores):.4f}",
                f"{one.equal(expected)}",
                f"{one.largest_difference(expected):.4f}",
            )
    whole = {
        side: sum(min(one.seconds) for one in by_task.values()) for side, by_task in sides.items()
    }
    for side, seconds in whole.items():
        table.add_row("all", "", side, f"{seconds:.1f}", f"{whole[BASELINE] / seconds:.2f}")
    return table


def main() -> None:
    """Measures all sides, or one as a child."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks")
    parser.add_argument("--model", help="Hugging Face folder or source; default: SmolLM2")
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
        answers = answer_all(args.side, model, args)
        write_json(args.out, {task: asdict(one) for task, one in answers.items()})
        return
    screen().print(draw(measure(sys.argv[1:])))


if __name__ == "__main__":
    run_main(main)
