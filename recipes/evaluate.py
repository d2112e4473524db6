"""Quality of teacher, pruned and distilled model on held-out text, the same windows for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.manifest import Outcome
from recipes.preflight import Chain, Problem, one_rank_problems, window_problems
from recipes.stage import Inputs, StageConfig, metrics_log, stage_main

KIND = "eval_results"
INPUTS = {
    "teacher": "checkpoint_nemo",
    "pruned": "checkpoint_nemo",
    "distilled": "checkpoint_nemo",
    "data": "dataset",
}


@dataclass
class Config(StageConfig):
    """Settings of ``evaluate``."""

    seq_length: int = 256
    num_windows: int = 40
    """Windows of ``seq_length`` tokens from the held-out part, as many from each of its sources (so
    a few more may be taken); fewer if the text is shorter."""
    micro_batch_size: int = 4
    num_generations: int = 3
    """Held-out windows whose first tokens are continued by every model."""
    prompt_tokens: int = 32
    new_tokens: int = 32


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """Finds settings that leave nothing to measure."""
    if cfg.num_windows < 1 or cfg.prompt_tokens >= cfg.seq_length:
        yield Problem(
            "evaluate",
            f"num_windows={cfg.num_windows}, prompt_tokens={cfg.prompt_tokens} leave nothing to do",
            "use at least one window, and prompts shorter than seq_length",
        )
    yield from window_problems(cfg.seq_length, chain)
    yield from one_rank_problems(cfg, "its windows are not split over ranks")


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Measures perplexity, KL to the teacher and top-1 agreement, by source too, and generates."""
    from nemo_convert import nemo
    from recipes.quality import measure

    checkpoints = {
        name: nemo.find_checkpoint(item.artifact) for name, item in inputs.items() if name != "data"
    }
    metrics = measure(cfg, checkpoints, inputs["data"], out, metrics_log(out))
    return Outcome(metrics=metrics)


if __name__ == "__main__":
    stage_main(run, Config, KIND)
