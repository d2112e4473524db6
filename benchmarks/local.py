"""Whether what is left beside a hole pays for being taught alone, before the whole is distilled.

``python -m benchmarks.local`` drops layers, and lets the layer before each hole learn to give what
the teacher has behind it, from what the teacher has before: no head, no vocabulary, and no layer
waits for another (as in LLM-Streamline, arXiv:2403.19135, and the blocks of Puzzle,
arXiv:2411.19146). Then it distils this student and the one as cut, with the same windows, and the
first also for as many steps less as its lesson is worth in FLOPs. All are judged on the same text.
Each is a run of the launcher, so a killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from benchmarks.contenders import make_inputs, manifest_of, shape_of
from benchmarks.loops import BETA1, BETA2, CLIP, WEIGHT_DECAY
from benchmarks.students import (
    SUMMARY,
    Student,
    collect,
    distill,
    grouped,
    import_student,
    prune,
    schedule,
    students_of,
    summary,
)
from nemo_convert import nemo
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT
from recipes.core.screen import screen
from recipes.data.token_windows import windows
from recipes.evaluation.text_quality import load_transformers
from recipes.pruning.results import PruneResult

BATCH, WINDOW, LR = 4, 256, 3e-4
CUT, TAUGHT = "as cut", "taught"


@dataclass(frozen=True)
class Hole:
    """Layers that are missing, as the teacher counts them from 0."""

    before: int
    """The layer that learns to do their work as well."""
    behind: int
    """The first layer that is there again."""


@dataclass(frozen=True)
class Run:
    """A training of one student."""

    way: str
    steps: int
    seed: int
    pruned: Path
    out: Path


@dataclass(frozen=True, kw_only=True)
class Outcome(Student):
    """What a student came to."""

    way: str
    steps: int


def holes(kept: Sequence[int]) -> list[Hole]:
    """Where layers are missing between others that were kept.

    >>> holes([0, 1, 4, 5, 7])
    [Hole(before=1, behind=4), Hole(before=5, behind=7)]
    """
    return [Hole(a, b) for a, b in pairwise(kept) if b > a + 1]


def teach(
    teacher: PreTrainedModel, student: PreTrainedModel, kept: Sequence[int], batches: Tensor
) -> None:
    """Trains the layers before the holes, in place.

    Args:
        teacher: The whole model.
        student: It without some layers.
        kept: The teacher's numbers of the student's layers, from 0.
        batches: Tokens [steps, windows, positions].
    """
    lessons = {hole: student.model.layers[kept.index(hole.before)] for hole in holes(kept)}
    weights = [weight for layer in lessons.values() for weight in layer.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=(BETA1, BETA2), weight_decay=WEIGHT_DECAY)
    rates = get_cosine_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    for number, tokens in enumerate(batches, 1):
        states, where = states_of(teacher, tokens, max(hole.behind for hole in lessons))
        loss = torch.zeros(())
        for hole, layer in lessons.items():
            target = states[hole.behind]
            miss = (layer(states[hole.before], **where) - target).square().sum(-1)
            # By each position's own size, since the first of a window is a hundred times another.
            loss = loss + (miss / target.square().sum(-1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        print(f"{number} of {len(batches)}: {float(loss.detach()):.4f}", flush=True)


@torch.no_grad()
def states_of(
    model: PreTrainedModel, tokens: Tensor, last: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """What each layer up to ``last`` reads, and the positions that layers are told."""
    states = [model.model.embed_tokens(tokens)]
    positions = torch.arange(tokens.shape[1])[None]
    where = {"position_embeddings": model.model.rotary_emb(states[0], positions)}
    for layer in model.model.layers[:last]:
        states.append(layer(states[-1], **where))
    return states, where


def taught(base: Path, pruned: Path, out: Path, steps: int) -> Path:
    """The student of ``pruned`` with its lessons, as a stage; made once."""
    checkpoint = nemo.find_checkpoint(pruned / ARTIFACT)

    def lessons() -> PreTrainedModel:
        teacher = load_transformers(nemo.find_checkpoint(base / "import_hf" / ARTIFACT))
        student = load_transformers(checkpoint)
        text = windows(base / "prepare_data" / ARTIFACT, "train", WINDOW, steps * BATCH)
        if len(text) < steps * BATCH:
            raise RecipeError(f"there is text for {len(text)} windows only.", "lower --local-steps")
        teach(teacher, student.train(), kept_of(pruned), text.view(steps, BATCH, WINDOW))
        return student

    return import_student(lessons, checkpoint, out)


def lesson_in_steps(base: Path, pruned: Path, steps: int) -> int:
    """Steps of distillation that a lesson's FLOPs are worth."""
    whole, cut = (shape_of(stage) for stage in (base / "import_hf", pruned))
    missing = holes(kept_of(pruned))
    layer = (whole.forward_flops_per_token() - cut.forward_flops_per_token()) / (
        whole.num_layers - cut.num_layers
    )
    lesson = (missing[-1].behind + 3 * len(missing)) * layer
    return round(
        steps * lesson / (whole.forward_flops_per_token() + 3 * cut.forward_flops_per_token())
    )


def kept_of(pruned: Path) -> list[int]:
    """The layers that a student has, as the teacher counts them from 0; results count from 1."""
    return [number - 1 for number in manifest_of(pruned).result(PruneResult).kept_layers]


def outcomes(runs: Sequence[Run], base: Path, count: int) -> Iterator[Outcome]:
    """What every student came to."""
    for run, student in zip(runs, students_of(base, runs, count), strict=True):
        yield Outcome(way=run.way, steps=run.steps, **student)


def draw(found: Sequence[Outcome]) -> Table:
    """A table, the best on validation text first."""
    table = Table("student", "steps", *SUMMARY)
    for seeds in grouped(found, lambda one: (one.way, one.steps)):
        table.add_row(seeds[0].way, f"{seeds[0].steps}", *summary(seeds))
    return table


def main() -> None:
    """Runs all, and writes ``local.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run-dir", type=Path, help="with import_hf, prepare_data and score")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--local-steps", type=int, default=100, help="of 4 windows of 256 tokens")
    parser.add_argument("--steps", type=int, default=40, help="of distillation, as large")
    parser.add_argument("--windows", type=int, default=64, help="of held-out text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/local"))
    args = parser.parse_args()
    base, out = (args.run_dir or make_inputs()).resolve(), args.out.resolve()
    console = screen()
    pruned = prune(base, base / "score", out / "cut", {"target_num_layers": args.layers})
    students = {CUT: pruned, TAUGHT: taught(base, pruned, out / "taught", args.local_steps)}
    less = args.steps - lesson_in_steps(base, pruned, args.local_steps)
    runs = [
        Run(way, steps, seed, students[way], out / f"{way.replace(' ', '-')}-{steps}-{seed}")
        for seed in args.seeds
        for way, steps in ((CUT, args.steps), (TAUGHT, args.steps), (TAUGHT, less))
        if steps > 0
    ]
    for run in runs:
        distill(base, run.pruned, run.out, schedule(run.steps, run.seed))
    console.print(draw(collect(outcomes(runs, base, args.windows), out / "local.json", console)))


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error
