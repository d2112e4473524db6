"""Minitron pruning of width and depth with ModelOpt, by activations on calibration text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recipes.architecture import Targets, pruned, target_problems
from recipes.manifest import Outcome
from recipes.preflight import Chain, Problem, one_rank_problems, window_problems
from recipes.stage import Inputs, StageConfig, metrics_log, stage_main

KIND = "checkpoint_nemo"
INPUTS = {"checkpoint": "checkpoint_nemo", "calibration": "dataset"}


@dataclass
class Config(StageConfig):
    """Settings of ``prune``. An axis without a target stays as it is."""

    target_num_layers: int | None = None
    """Keep this many layers, by importance (block influence, arXiv:2403.03853)."""
    drop_layers: list[int] = field(default_factory=list)
    """Drop exactly these layers, counted from 1, instead."""
    target_hidden_size: int | None = None
    target_ffn_hidden_size: int | None = None
    target_num_attention_heads: int | None = None
    target_num_moe_experts: int | None = None
    target_moe_ffn_hidden_size: int | None = None
    hidden_size_divisor: int = 64
    ffn_hidden_size_divisor: int = 64
    """Of an expert's width, too."""
    num_calibration_samples: int = 64
    """Windows of ``seq_length`` tokens from the calibration part."""
    seq_length: int = 256
    micro_batch_size: int = 4

    def targets(self) -> Targets:
        """The targets without the calibration settings."""
        return Targets(
            num_layers=self.target_num_layers,
            hidden_size=self.target_hidden_size,
            ffn_hidden_size=self.target_ffn_hidden_size,
            num_attention_heads=self.target_num_attention_heads,
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
    """Finds targets that the teacher cannot be pruned to."""
    for what, fix in target_problems(chain.teacher, cfg.targets(), cfg.divisors()):
        yield Problem("prune-target", what, fix)
    yield from window_problems(cfg.seq_length, chain)
    yield from one_rank_problems(cfg, "ModelOpt refuses tensor parallelism while pruning")


def disk_bytes(cfg: Config, chain: Chain) -> int:
    """The student's checkpoint, the teacher's size at most."""
    return 4 * chain.teacher.parameters()


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Prunes, checks every shape, and saves the student and the importance scores."""
    from nemo_convert import hf, nemo
    from recipes.indexed_dataset import windows
    from recipes.minitron import prune_checkpoint

    teacher = nemo.find_checkpoint(inputs["checkpoint"].artifact)
    calibration = windows(
        inputs["calibration"].artifact, "calibration", cfg.seq_length, cfg.num_calibration_samples
    )
    student = pruned(nemo.architecture_of(teacher), cfg.targets())
    scores = prune_checkpoint(
        cfg, teacher, student, calibration, out / teacher.name, metrics_log(out)
    )
    return Outcome(
        metrics={
            **scores,
            "calibration_tokens": calibration.numel(),
            "teacher_parameters": inputs["checkpoint"].manifest.parameters,
        },
        architecture=student.as_dict(),
        parameters=student.parameters(),
        tokenizer_sha256=hf.tokenizer_sha256(nemo.side_files(teacher)),
    )


if __name__ == "__main__":
    stage_main(run, Config, KIND)
