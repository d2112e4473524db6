"""Distils the best candidates a little, drops the worse half, and goes on until one is left.

Successive halving (Jamieson and Talwalkar, arXiv:1502.07943): each round has the same share of the
tokens, so fewer candidates get more each. Every pruning and training is a stage of its own below
``work/``, so a killed tournament goes on where it was. Candidates are shared out to the ranks; or
there is one rank, and each training takes all of the machine's devices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes import distill
from recipes.manifest import Outcome, write_text_atomically
from recipes.preflight import Chain, Problem
from recipes.search_space import AXES, prune_settings
from recipes.stage import Inputs, StageConfig, metrics_log, rank, stage_main
from recipes.training import training_problems

KIND = "search_results"
INPUTS = {
    "checkpoint": "checkpoint_nemo",
    "importance": "importance",
    "data": "dataset",
    "candidates": "search_results",
}
FILE = "candidates.json"
RECIPE = "recipe.yaml"


@dataclass
class Config(StageConfig):
    """Settings of ``tournament``."""

    num_candidates: int = 4
    """Best-ranked candidates that take part; the number left is halved each round. One alone wins
    by its rank, untrained."""
    also: list[str] = field(default_factory=list)
    """Names of candidates that take part whatever their rank."""
    max_tokens: int = 200_000
    """Tokens that all trainings together may use."""
    select_by: str = "kl_to_teacher"
    """``kl_to_teacher`` or ``perplexity`` on validation text; the lower, the better."""
    num_samples: int = 16
    """Windows of validation text that each is measured on after a round."""
    distill: distill.Config = field(default_factory=distill.Config)
    """How candidates are trained; steps follow from the tokens."""

    def rounds(self) -> list[int]:
        """Candidates in each round."""
        count = self.num_candidates + len(self.also)
        numbers = []
        while count > 1:
            numbers.append(count)
            count = math.ceil(count / 2)
        return numbers

    def steps(self, candidates: int) -> int:
        """Steps that each of so many candidates may take in a round."""
        tokens = self.max_tokens / len(self.rounds()) / candidates
        return int(tokens / (self.distill.global_batch_size * self.distill.seq_length))


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """Finds a tournament without candidates or steps, and settings that would fail in training."""
    if cfg.num_candidates < 1 or cfg.num_samples < 1:
        yield Problem(
            "search",
            f"num_candidates={cfg.num_candidates}, num_samples={cfg.num_samples}",
            "use at least one candidate and one window",
        )
        return
    if cfg.select_by not in ("kl_to_teacher", "perplexity"):
        yield Problem("search", f"select_by={cfg.select_by}", "use kl_to_teacher or perplexity")
    if cfg.distill.resources.devices > 1 and cfg.resources.devices * cfg.resources.nodes > 1:
        yield Problem(
            "search",
            f"the tournament has {cfg.resources.devices} devices and each of its trainings "
            f"{cfg.distill.resources.devices}: both have several ranks",
            "set resources.devices of one of them to 1",
        )
    rounds = cfg.rounds()
    if not rounds:
        return
    if cfg.steps(rounds[0]) < 2:
        need = 2 * len(rounds) * rounds[0] * cfg.distill.global_batch_size * cfg.distill.seq_length
        yield Problem(
            "search",
            f"max_tokens={cfg.max_tokens} leaves {rounds[0]} candidates less than two steps",
            f"set it to at least {need}, or fewer candidates",
        )
    else:
        yield from training_problems(_training(cfg, rounds[0]), chain)


def _training(cfg: Config, candidates: int) -> distill.Config:
    steps = cfg.steps(candidates)
    plain = {
        "stage": "distill",
        "max_steps": steps,
        "warmup_steps": min(cfg.distill.warmup_steps, steps // 5),
        "val_check_interval": steps,
        "checkpoint_interval": max(steps, 1),
    }
    return distill.Config(**{**vars(cfg.distill), **plain})


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Plays all rounds, and writes ``candidates.json`` and the winner as ``recipe.yaml``."""
    from recipes.rounds import Arena

    ranked = json.loads((inputs["candidates"].artifact / FILE).read_text(encoding="utf-8"))
    players: list[dict[str, Any]] = [
        c for n, c in enumerate(ranked) if n < cfg.num_candidates or c["name"] in cfg.also
    ]
    method = inputs["candidates"].manifest.config["layer_importance"]
    arena = Arena(cfg, inputs, out.parent / "candidates", method)
    log = metrics_log(out)
    for number, count in enumerate(rounds := cfg.rounds()):
        training = _training(cfg, count)
        arena.play(players, number, training)
        tokens = training.max_steps * training.global_batch_size * training.seq_length
        for candidate, found in zip(players, arena.measure(players, number), strict=True):
            candidate |= {**found, "tokens": candidate["tokens"] + tokens}
        players = sorted(players, key=lambda candidate: float(candidate[cfg.select_by]))
        log.progress("tournament", number + 1, len(rounds), leader=players[0]["name"])
        players = players[: math.ceil(len(players) / 2)]
    winner = players[0]
    winner["chosen"] = True
    if rank() == 0:
        write_text_atomically(out / FILE, json.dumps(ranked, indent=1) + "\n")
        write_text_atomically(out / RECIPE, recipe(cfg, inputs, winner, method))
    budget = inputs["candidates"].manifest.metrics["budget"]
    return Outcome(metrics={"candidates": ranked, "budget": budget, "winner": winner["name"]})


def recipe(cfg: Config, inputs: Inputs, winner: dict[str, Any], method: str) -> str:
    """The winner as a recipe: copied to ``conf/recipe/NAME.yaml`` it runs as ``recipe=NAME``."""
    teacher = inputs["checkpoint"].manifest.architecture or {}
    sizes = {axis: winner["shape"][axis] for axis in AXES}
    changed = {axis: size for axis, size in sizes.items() if size != teacher[axis]}
    scored = inputs["importance"].manifest.config
    return "\n".join(
        [
            "# @package _global_",
            f"# Found by a search for the model {inputs['checkpoint'].manifest.config['hf_path']}",
            "defaults:",
            "  - /chain@_global_: prune_distill",
            "  - _self_",
            "  - /teacher: live",
            "",
            f"description: {winner['name']}, {winner['parameters'] / 1e6:,.1f} M parameters",
            "stages:",
            "  score:",
            *(f"    {n}: {scored[n]}" for n in ("num_loss_samples", "block_sizes")),
            f"    num_greedy_layers: {scored['num_greedy_layers']}",
            "  prune:",
            *(f"    {name}: {value}" for name, value in prune_settings(changed, method).items()),
            "  distill:",
            f"    lr: {cfg.distill.lr}",
            f"    min_lr: {cfg.distill.min_lr}",
            "",
        ]
    )


if __name__ == "__main__":
    stage_main(run, Config, KIND)
