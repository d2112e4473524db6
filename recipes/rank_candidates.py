"""Ranks shapes by how well the teacher cut to them still predicts text, without training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.architecture import Architecture
from recipes.enumerate_shapes import FILE as SHAPES
from recipes.manifest import Outcome, write_text_atomically
from recipes.preflight import Chain, Problem, one_rank_problems, window_problems
from recipes.prune import METHODS
from recipes.search_space import Budget
from recipes.stage import Inputs, StageConfig, metrics_log, stage_main

KIND = "search_results"
INPUTS = {
    "checkpoint": "checkpoint_nemo",
    "importance": "importance",
    "data": "dataset",
    "shapes": "shapes",
}
PROXIES = ("kl_to_teacher", "perplexity")
FILE = "candidates.json"


@dataclass
class Config(StageConfig):
    """Settings of ``rank_candidates``."""

    proxy: str = "kl_to_teacher"
    """``kl_to_teacher`` or ``perplexity`` right after pruning; the lower, the better."""
    layer_importance: str = "loss"
    """As in ``prune``."""
    num_samples: int = 8
    """Windows of ``seq_length`` tokens from the validation part."""
    seq_length: int = 256
    micro_batch_size: int = 4


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """Finds settings that leave nothing to rank by."""
    yield from window_problems(cfg.seq_length, chain)
    yield from one_rank_problems(cfg, "its windows are not split over ranks")
    for name, known in (("proxy", PROXIES), ("layer_importance", METHODS)):
        if getattr(cfg, name) not in known:
            yield Problem("search", f"{name}={getattr(cfg, name)}", f"use {' or '.join(known)}")
    if cfg.num_samples < 1:
        yield Problem("search", f"num_samples={cfg.num_samples}", "use at least one window")


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Measures every shape and writes ``candidates.json``, the best first."""
    from nemo_convert import nemo
    from recipes.candidates import measure_shapes
    from recipes.importance import Importance
    from recipes.indexed_dataset import windows

    listed = (inputs["shapes"].artifact / SHAPES).read_text(encoding="utf-8")
    shapes = [Architecture(**shape) for shape in json.loads(listed)]
    tokens = windows(inputs["data"].artifact, "validation", cfg.seq_length, cfg.num_samples)
    candidates = measure_shapes(
        cfg,
        nemo.find_checkpoint(inputs["checkpoint"].artifact),
        Importance.load(inputs["importance"].artifact),
        shapes,
        tokens,
        metrics_log(out),
    )
    candidates.sort(key=lambda candidate: candidate["proxy"])
    mark_pareto(candidates)
    write_text_atomically(out / FILE, json.dumps(candidates, indent=1) + "\n")
    budget = Budget(**inputs["shapes"].manifest.config["budget"]).limits()
    return Outcome(metrics={"candidates": candidates, "budget": budget})


def mark_pareto(candidates: Sequence[dict[str, Any]]) -> None:
    """Marks those that no other beats in both size and proxy."""
    for one in candidates:
        one["pareto"] = not any(
            other["parameters"] <= one["parameters"]
            and other["proxy"] <= one["proxy"]
            and (other["parameters"], other["proxy"]) != (one["parameters"], one["proxy"])
            for other in candidates
        )


if __name__ == "__main__":
    stage_main(run, Config, KIND)
