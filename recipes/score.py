"""Scores what can be pruned: channels, heads and layers, by forward passes on calibration text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recipes.manifest import Outcome
from recipes.preflight import Chain, Problem, window_problems
from recipes.stage import Inputs, StageConfig, metrics_log, rank, stage_main

KIND = "importance"
INPUTS = {"checkpoint": "checkpoint_nemo", "calibration": "dataset"}
CALIBRATIONS = ("text", "random")


@dataclass
class Config(StageConfig):
    """Settings of ``score``. One pass gives widths and block influence; the rest costs more."""

    calibration: str = "text"
    """``text`` of the input, or ``random`` tokens: only to try out the machinery."""
    num_calibration_samples: int = 64
    """Windows of ``seq_length`` tokens from the calibration part."""
    num_loss_samples: int = 8
    """The first so many of them also tell how the loss changes when layers are left out, at about
    0.6 of a forward pass a layer; 0 leaves that out."""
    block_sizes: list[int] = field(default_factory=list)
    """Blocks of so many layers are left out together as well, for ``layer_importance=block``."""
    num_greedy_layers: int = 0
    """Leaves out so many layers one after the other, each time the one that is missed least, for
    ``layer_importance=greedy``. Twice as many are tried each time."""
    seq_length: int = 256
    micro_batch_size: int = 4
    seed: int = 1234
    """Of ``random`` tokens."""
    pipeline_model_parallel_size: int = field(default=1, metadata={"resource": True})
    """Ranks that the layers are split over; the scores are the same."""


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """Finds settings that leave nothing to score, and ranks that the layers cannot be split on."""
    yield from window_problems(cfg.seq_length, chain)
    if cfg.calibration not in CALIBRATIONS:
        yield Problem("calibration", f"calibration={cfg.calibration}", f"use {CALIBRATIONS[0]}")
    if cfg.num_calibration_samples < 1 or cfg.micro_batch_size < 1 or cfg.num_loss_samples < 0:
        yield Problem(
            "calibration",
            f"num_calibration_samples={cfg.num_calibration_samples}, micro_batch_size="
            f"{cfg.micro_batch_size}, num_loss_samples={cfg.num_loss_samples} leave nothing to do",
            "use at least one window",
        )
    layers = chain.teacher.num_layers
    wrong = [n for n in (*cfg.block_sizes, cfg.num_greedy_layers + 1) if not 1 <= n < layers]
    if wrong or (not cfg.num_loss_samples and (cfg.block_sizes or cfg.num_greedy_layers)):
        yield Problem(
            "calibration",
            f"block_sizes={cfg.block_sizes}, num_greedy_layers={cfg.num_greedy_layers} cannot be "
            f"measured on num_loss_samples={cfg.num_loss_samples} windows with {layers} layers",
            f"leave out fewer than {layers} layers, on at least one window",
        )
    ranks, stages = cfg.resources.nodes * cfg.resources.devices, cfg.pipeline_model_parallel_size
    if ranks != stages or not 1 <= stages <= layers:
        yield Problem(
            "ranks",
            f"{cfg.stage} has {ranks} rank(s) and pipeline_model_parallel_size={stages} for "
            f"{layers} layers; ModelOpt scores at TP=1, and windows are not split over ranks",
            "set both to the same number, at most the layers",
        )


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Runs the forward passes and writes ``importance.json`` and ``importance.safetensors``."""
    from nemo_convert import nemo
    from recipes.scoring import calibration_windows, score_checkpoint

    teacher = nemo.find_checkpoint(inputs["checkpoint"].artifact)
    windows = calibration_windows(cfg, inputs["calibration"].artifact, teacher)
    importance = score_checkpoint(cfg, teacher, windows, metrics_log(out))
    if rank() == 0:
        importance.save(out)
    return Outcome(
        metrics={
            "calibration": cfg.calibration,
            "calibration_windows": len(windows),
            "calibration_tokens": windows.numel(),
            "teacher_loss": importance.teacher_loss,
            "layer_importance": importance.layers,
        }
    )


if __name__ == "__main__":
    stage_main(run, Config, KIND)
