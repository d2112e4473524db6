"""Compares times and answers of ``evaluate_tasks`` with those of lm-eval's ``HFLM``.

    python -m benchmarks.tasks [--model FOLDER_OR_SOURCE] [--tasks NAME ...] [--limit N]

``evaluate_tasks`` runs models with the class ``PackedLM``, which packs several questions into one
forward pass. A side of the comparison is one of the two classes in float32 or bfloat16. The
baseline is ``HFLM`` in float32. All sides answer the same items. Each side runs in its own process,
one after the other.

Time is the CPU time of all threads in the fastest repeat, without loading the model. ``equal`` is
the number of items on which a side has the baseline's score. ``nats apart`` is the largest
difference between a side's and the baseline's log-likelihood of the same continuation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean

import numpy as np
from rich.table import Table

from benchmarks.launching import call_in_process, model_folder, run_main
from recipes.core.screen import screen
from recipes.evaluation.results import Item
from recipes.planning.hardware import cpu_profile

TASKS = ("sciq", "piqa", "arc_easy", "hellaswag", "lambada_openai", "mmlu")
SHOTS = {"mmlu": 5}
"""Few-shot examples per item, as in ``conf/tasks/full.yaml``."""
BATCH = 8
"""Batch size of ``HFLM``."""
BASELINE = "lm-eval, float32"
SIDES = {
    BASELINE: (False, "32"),
    "lm-eval, bfloat16": (False, "bf16-mixed"),
    "packed, float32": (True, "32"),
    "packed, bfloat16": (True, "bf16-mixed"),
}
"""By side: whether the side uses ``PackedLM``, and its precision."""


@dataclass(frozen=True)
class Settings:
    """Settings of all sides."""

    model: Path
    tasks: Sequence[str] = TASKS
    limit: int = 40
    """Number of items of each subtask to answer."""
    parts: int = 3
    """Number of subtasks of ``mmlu`` to answer; other tasks have only one subtask."""
    pack_tokens: int = 512
    """Tokens per forward pass of ``PackedLM``."""
    repeats: int = 1
    """How often each side answers each task."""


@dataclass(frozen=True)
class Answers:
    """A side's answers to all items of a task."""

    seconds: list[float]
    """CPU time of each repeat."""
    metric: str
    """Key of the task's score in ``Item.metrics``."""
    items: list[Item]
    """Items of the last repeat, with the side's responses."""

    @property
    def scores(self) -> list[float]:
        """The score of each item."""
        return [item.metrics[self.metric] for item in self.items]

    def count_equal(self, other: Answers) -> int:
        """Counts items that have the same score in both answers."""
        return sum(a == b for a, b in zip(self.scores, other.scores, strict=True))

    def largest_difference(self, other: Answers) -> float:
        """Returns the largest difference of log-likelihoods of the same continuation, in nats."""
        pairs = zip(self.items, other.items, strict=True)
        return max(float(np.abs(_log_likelihoods(a) - _log_likelihoods(b)).max()) for a, b in pairs)


def _log_likelihoods(item: Item) -> np.ndarray:
    """Returns the log-likelihood of every continuation that the item offers, in nats."""
    # A response has two values per continuation: its log-likelihood, and whether it is greedy.
    values: np.ndarray = np.array(item.response, dtype=float).reshape(-1, 2)
    return values[:, 0]


def answer_all(side: str, settings: Settings) -> dict[str, Answers]:
    """Returns a side's answers by task. Runs in this process."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from nemo_convert.hf import load_causal_lm
    from recipes.core.precision import dtype_name
    from recipes.evaluation import harness_tasks, packed_lm

    packed, precision = SIDES[side]
    model = load_causal_lm(settings.model, dtype_name(precision))
    tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False)
    lm: HFLM = (
        packed_lm.PackedLM(model, tokenizer, settings.pack_tokens, lambda done, total: None)
        if packed
        else HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    )
    answers = {}
    for task in harness_tasks.load_tasks(settings.tasks, "pypi", SHOTS):
        first_subtasks = dict(islice(task.subtasks.items(), settings.parts))
        shortened = replace(task, subtasks=first_subtasks)
        seconds = []
        for _ in range(settings.repeats):
            start = time.process_time()
            items = harness_tasks.answer(lm, shortened, settings.limit, seed=1234)
            seconds.append(time.process_time() - start)
        answers[task.name] = Answers(seconds, task.metric, items)
    return answers


def measure(settings: Settings) -> dict[str, dict[str, Answers]]:
    """Returns the answers by side and task, for the precisions that this processor supports."""
    # Without bfloat16 GEMMs, the processor's precision is "32", too.
    precisions = ("32", cpu_profile("precision"))
    sides = [side for side, (_, precision) in SIDES.items() if precision in precisions]
    return {side: call_in_process("benchmarks.tasks:answer_all", side, settings) for side in sides}


def draw(sides: Mapping[str, Mapping[str, Answers]]) -> Table:
    """Makes a table with a row for each task and side, then each side's time over all tasks."""
    columns = "task", "items", "model", "CPU s", "times as fast", "score", "equal", "nats apart"
    table = Table(*columns)
    for task, baseline_answers in sides[BASELINE].items():
        for side, by_task in sides.items():
            answers = by_task[task]
            table.add_row(
                task,
                str(len(answers.items)),
                side,
                f"{min(answers.seconds):.2f}",
                f"{min(baseline_answers.seconds) / min(answers.seconds):.2f}",
                f"{mean(answers.scores):.4f}",
                str(answers.count_equal(baseline_answers)),
                f"{answers.largest_difference(baseline_answers):.4f}",
            )
    totals = {
        side: sum(min(answers.seconds) for answers in by_task.values())
        for side, by_task in sides.items()
    }
    for side, seconds in totals.items():
        table.add_row("all", "", side, f"{seconds:.1f}", f"{totals[BASELINE] / seconds:.2f}")
    return table


def main() -> None:
    """Reads the command line, measures all sides and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks")
    parser.add_argument("--model", help="Hugging Face folder or source; default: SmolLM2")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--limit", type=int, default=Settings.limit, help="items of each subtask")
    parser.add_argument("--parts", type=int, default=Settings.parts, help="subtasks of mmlu")
    parser.add_argument("--pack-tokens", type=int, default=Settings.pack_tokens)
    parser.add_argument("--repeats", type=int, default=Settings.repeats)
    args = parser.parse_args()
    settings = Settings(
        model=model_folder(args.model),
        tasks=args.tasks,
        limit=args.limit,
        parts=args.parts,
        pack_tokens=args.pack_tokens,
        repeats=args.repeats,
    )
    screen().print(draw(measure(settings)))


if __name__ == "__main__":
    run_main("benchmarks.tasks")
