"""Minitron pruning of width and depth: cuts the weights to what scored highest, without a pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recipes.architecture import Targets, pruned, target_problems
from recipes.manifest import Outcome
from recipes.preflight import Chain, Problem, one_rank_problems
from recipes.stage import Inputs, StageConfig, stage_main

KIND = "checkpoint_nemo"
INPUTS = {"checkpoint": "checkpoint_nemo", "importance": "importance"}
METHODS = ("block_influence", "loss", "block", "greedy")


@dataclass
class Config(StageConfig):
    """Settings of ``prune``. An axis without a target stays as it is."""

    target_num_layers: int | None = None
    """Keep this many layers, by ``layer_importance``."""
    layer_importance: str = "loss"
    """``loss``: its change without the layer; ``block_influence`` (arXiv:2403.03853): free;
    ``block``: the neighbouring layers that are missed least together; ``greedy``: one after the
    other. Before distillation ``loss`` beats ``block_influence`` on SmolLM2 at 24 and at 20 of 30
    layers, and ``block`` is best at 24 (benchmarks/layers.py)."""
    drop_layers: list[int] = field(default_factory=list)
    """Drop exactly these layers, counted from 1, instead."""
    target_hidden_size: int | None = None
    target_ffn_hidden_size: int | None = None
    target_num_attention_heads: int | None = None
    target_num_query_groups: int | None = None
    """Whole groups go, with their heads; by default each that stays keeps all of its heads."""
    target_num_moe_experts: int | None = None
    target_moe_ffn_hidden_size: int | None = None
    hidden_size_divisor: int = 64
    ffn_hidden_size_divisor: int = 64
    """Of an expert's width, too."""

    def targets(self) -> Targets:
        """The targets without the rest."""
        return Targets(
            num_layers=self.target_num_layers,
            hidden_size=self.target_hidden_size,
            ffn_hidden_size=self.target_ffn_hidden_size,
            num_attention_heads=self.target_num_attention_heads,
            num_query_groups=self.target_num_query_groups,
            num_moe_experts=self.target_num_moe_experts,
            moe_ffn_hidden_size=self.target_moe_ffn_hidden_size,
            drop_layers=tuple(sorted(self.drop_layers)),
        )

    def divisors(self) -> dict[str, int]:
        """What each axis' target must be a multiple of."""
        return {
            "hidden_size": self.hidden_size_divisor,
            "ffn_hidden_size": self.ffn_hidden_size_divisor,
            "moe_ffn_hidden_size": self.ffn_hidden_size_divisor,
        }


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """Finds targets that the teacher cannot be pruned to, and scores that would be missing."""
    for what, fix in target_problems(chain.teacher, cfg.targets(), cfg.divisors()):
        yield Problem("prune-target", what, fix)
    yield from one_rank_problems(cfg, "it only copies weights")
    if cfg.layer_importance not in METHODS:
        yield Problem(
            "layer-importance",
            f"layer_importance={cfg.layer_importance}",
            f"use one of {', '.join(METHODS)}",
        )
    elif cfg.target_num_layers is not None:
        yield from _score_problems(cfg, chain, chain.teacher.num_layers - cfg.target_num_layers)


def _score_problems(cfg: Config, chain: Chain, drop: int) -> Iterator[Problem]:
    """Whether the stage that scores, if it is of this run, measures what is asked for here."""
    name = cfg.inputs.get("importance", "")
    score = chain.stages.get(name)
    if score is None or drop <= 0:
        return
    has = {
        "loss": getattr(score, "num_loss_samples") > 0,
        "block": drop in getattr(score, "block_sizes"),
        "greedy": drop <= getattr(score, "num_greedy_layers"),
    }
    wanted = {
        "loss": "num_loss_samples=8",
        "block": f"block_sizes=[{drop}]",
        "greedy": f"num_greedy_layers={drop}",
    }
    if not has.get(cfg.layer_importance, True):
        yield Problem(
            "layer-importance",
            f"layer_importance={cfg.layer_importance} drops {drop} layers by what "
            f"{name} does not measure",
            f"set stages.{name}.{wanted[cfg.layer_importance]}",
        )


def disk_bytes(cfg: Config, chain: Chain) -> int:
    """The student's checkpoint."""
    return 4 * pruned(chain.teacher, cfg.targets()).parameters()


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Chooses what to keep, cuts the weights, and saves the student and the kept indices."""
    from nemo_convert import hf, nemo
    from recipes.importance import Importance
    from recipes.minitron import layers_to_keep, prune_checkpoint, summary
    from recipes.slicing import choose

    teacher = nemo.find_checkpoint(inputs["checkpoint"].artifact)
    importance = Importance.load(inputs["importance"].artifact)
    whole = nemo.architecture_of(teacher)
    student = pruned(whole, cfg.targets())
    if cfg.drop_layers:
        layers = sorted(set(range(1, whole.num_layers + 1)) - set(cfg.drop_layers))
    else:
        layers = layers_to_keep(importance, cfg.layer_importance, student.num_layers)
    kept = choose(importance.widths, whole, student, layers)
    prune_checkpoint(teacher, student, kept, out / teacher.name)
    kept.save(out)
    scored = inputs["importance"].manifest.metrics
    return Outcome(
        metrics={
            **summary(importance, cfg.layer_importance, kept),
            "calibration_tokens": scored["calibration_tokens"],
            "calibration_windows": scored["calibration_windows"],
            "teacher_parameters": inputs["checkpoint"].manifest.parameters,
        },
        architecture=student.as_dict(),
        parameters=student.parameters(),
        tokenizer_sha256=hf.tokenizer_sha256(nemo.side_files(teacher)),
    )


if __name__ == "__main__":
    stage_main(run, Config, KIND)
