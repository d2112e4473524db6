"""Whether another optimizer or schedule, or averaged weights, brings more back from few tokens.

``python -m benchmarks.optimizers`` distils the student of a run in a plain loop with the recipes'
loss, once for each way; all see the same windows in the same order. Recipes have AdamW under a
cosine that ends at a tenth, so that is what the others are held against. Each student is then a run
of the launcher, which imports it, and all are judged on the same text.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from benchmarks.contenders import make_inputs
from benchmarks.loops import BETA1, BETA2, CLIP, WEIGHT_DECAY, Task, divergence, load, logits_of
from benchmarks.students import Judgement, Quality, import_student, judge, varied
from nemo_convert.nemo import find_checkpoint
from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json
from recipes.core.manifest import ARTIFACT
from recipes.core.screen import screen
from recipes.core.statistics import mean
from recipes.data.token_windows import windows

BATCH, WINDOW = 4, 256
NEXT_TOKEN = 0.2
"""Weight of the text's own loss beside the divergence, as the recipes have it."""
SECONDS = "seconds.json"


@dataclass(frozen=True)
class Way:
    """How weights change.

    Attributes:
        muon: Whether matrices but the embedding go by Muon (kellerjordan.github.io/posts/muon),
            at updates as large as AdamW's (arXiv:2502.16982).
        lr: Peak of the learning rate, reached after a tenth of the steps.
        end: Share of it that is left at the end.
        linear: Whether it falls on a line (arXiv:2502.15938), not a cosine.
        weight_decay: Decoupled.
        averaged: Share of the steps, the last ones, whose weights are averaged (arXiv:2209.14981).
    """

    muon: bool = False
    lr: float = 3e-4
    end: float = 0.1
    linear: bool = False
    weight_decay: float = WEIGHT_DECAY
    averaged: float = 0.0

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0.

        >>> [Way(lr=1, end=0, linear=True).rate(step, 12) for step in (0, 1, 6)]
        [1.0, 1.0, 0.5454545454545454]
        """
        warm = max(1, steps // 10)
        if step < warm:
            return self.lr * (step + 1) / warm
        done = (step - warm + 1) / (steps - warm + 1)
        left = 1 - done if self.linear else (1 + math.cos(math.pi * done)) / 2
        return self.lr * (self.end + (1 - self.end) * left)


WAYS = {
    "AdamW, cosine to a tenth": Way(),
    "cosine to zero": Way(end=0),
    "line to zero": Way(end=0, linear=True),
    "constant, last half averaged": Way(end=1, averaged=0.5),
    "no weight decay": Way(weight_decay=0),
    "Muon": Way(muon=True),
    "Muon from 1e-3": Way(muon=True, lr=1e-3),
}


@dataclass(frozen=True)
class Outcome:
    """What a way came to with a seed."""

    way: str
    seed: int
    seconds: float
    """CPU time of a step, the median."""
    found: Judgement


def optimizers(model: torch.nn.Module, way: Way) -> list[torch.optim.Optimizer]:
    """One for every weight; with Muon a second for what is no matrix within a layer."""
    weights = dict(model.named_parameters())
    inner = {name for name, w in weights.items() if way.muon and w.ndim == 2 and ".layers." in name}
    rest = [weight for name, weight in weights.items() if name not in inner]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            rest, lr=way.lr, betas=(BETA1, BETA2), weight_decay=way.weight_decay, fused=True
        )
    ]
    if inner:
        matrices = [weights[name] for name in weights if name in inner]
        made.append(
            torch.optim.Muon(
                matrices,
                lr=way.lr,
                weight_decay=way.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return made


def train(task: Task, way: Way) -> float:
    """Distils the student in place; median CPU seconds of a step."""
    weights, steps = list(task.student.parameters()), len(task.batches)
    of_each = optimizers(task.student, way)
    kept, count, seconds = [torch.zeros_like(weight) for weight in weights], 0, []
    for step, tokens in enumerate(task.batches):
        began = time.process_time()
        loss = back_propagate(task, tokens)
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        for optimizer in of_each:
            for group in optimizer.param_groups:
                group["lr"] = way.rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        if step >= steps * (1 - way.averaged):
            count += 1
            with torch.no_grad():
                torch._foreach_lerp_(kept, weights, 1 / count)
        seconds.append(time.process_time() - began)
        print(f"{step + 1} of {steps}: {loss:.4f}", flush=True)
    if count:
        with torch.no_grad():
            torch._foreach_copy_(weights, kept)
    return median(seconds)


def back_propagate(task: Task, tokens: Tensor) -> float:
    """Adds the gradients of a batch [windows, positions] to the student's; its mean loss."""
    logits, target = logits_of(task, tokens)
    kl = divergence(logits.flatten(0, 1), target.flatten(0, 1)) / tokens.numel()
    text = cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
    loss = kl + NEXT_TOKEN * text
    loss.backward()
    return float(loss.detach())


def shuffled(base: Path, steps: int, seed: int) -> Tensor:
    """Training windows in an order of their own, int64 [steps, windows, positions]."""
    text = windows(base / "prepare_data" / ARTIFACT, "train", WINDOW)
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))
    return text[order[: steps * BATCH]].view(steps, BATCH, WINDOW)


def make(base: Path, out: Path, way: Way, steps: int, seed: int, bfloat16: bool) -> Path:
    """The student that a way leads to, as a stage; made once."""
    side = find_checkpoint(base / "prune" / ARTIFACT)

    def trained() -> PreTrainedModel:
        task = load(base, (steps, BATCH, WINDOW), bfloat16=bfloat16)
        task = replace(task, batches=shuffled(base, steps, seed))
        seconds = train(task, way)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SECONDS, {"median": seconds})
        student: PreTrainedModel = task.student
        return student

    return import_student(trained, side, out)


def outcomes(base: Path, made: dict[tuple[str, int], Path], windows_each: int) -> Iterator[Outcome]:
    """What every way came to."""
    found = judge(base, made.values(), windows_each)
    for (way, seed), stage in made.items():
        yield Outcome(way, seed, read_json(stage.parent.parent / SECONDS)["median"], found[stage])


def draw(found: list[Outcome]) -> Table:
    """A table in the order of the ways."""
    kinds = list(found[0].found.heldout.sources)
    table = Table("way", "validation KL", "held-out", *kinds, "KL", "CPU s a step")
    for way in dict.fromkeys(one.way for one in found):
        seeds = [one for one in found if one.way == way]
        heldout: list[Quality] = [one.found.heldout for one in seeds]
        table.add_row(
            way,
            varied([one.found.validation.kl for one in seeds], ".3f"),
            varied([q.perplexity for q in heldout]),
            *(varied([q.sources[kind].perplexity for q in heldout]) for kind in kinds),
            varied([q.kl for q in heldout], ".3f"),
            f"{mean([one.seconds for one in seeds]):.2f}",
        )
    return table


def main() -> None:
    """Trains by every way and writes ``optimizers.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run-dir", type=Path, help="of a recipe, up to prune")
    parser.add_argument("--steps", type=int, default=40, help="of 4 windows of 256 tokens")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234])
    parser.add_argument("--windows", type=int, default=64, help="of held-out text")
    parser.add_argument("--float32", action="store_true", help="for processors without bfloat16")
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"))
    args = parser.parse_args()
    base, out, console = (args.run_dir or make_inputs()).resolve(), args.out.resolve(), screen()
    made = {
        (way, seed): make(
            base,
            out / f"{way.replace(',', '').replace(' ', '-')}-{seed}",
            WAYS[way],
            args.steps,
            seed,
            not args.float32,
        )
        for seed in args.seeds
        for way in args.only
    }
    found = list(outcomes(base, made, args.windows))
    write_json(out / "optimizers.json", [asdict(one) for one in found])
    console.print(draw(found))
    console.print(f"figures: {out / 'optimizers.json'}")


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error
