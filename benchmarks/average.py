"""Averages the weights of the students of one training.

    python -m benchmarks.average RUN/distill OUT

The students are those of the setting ``student_steps``, and the final student. If the learning rate
was constant, their mean can replace its decay (WSM, arXiv:2507.17634). OUT becomes the directory of
a complete stage: ``stages.evaluate.inputs.distilled=OUT`` evaluates the mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.launching import complete_manifest, run_main
from nemo_convert import nemo
from nemo_convert.convert import hf_weights
from recipes.core.manifest import ARTIFACT, stamp_files, write_manifest
from recipes.pruning.pruned_checkpoint import save_weights


def average(checkpoints: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Returns the mean of each weight, computed in float32, in the type of the last checkpoint."""
    sums: dict[str, torch.Tensor] = {}
    for checkpoint in checkpoints:
        weights = dict(hf_weights(checkpoint))
        for name, weight in weights.items():
            sums[name] = sums[name] + weight.float() if name in sums else weight.float()
    return {  # ``weights`` are those of the last checkpoint
        name: (sums[name] / len(checkpoints)).to(weight.dtype) for name, weight in weights.items()
    }


def main() -> None:
    """Reads the command line, and writes the mean."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.average")
    parser.add_argument("training", type=Path, help="directory of the stage distill")
    parser.add_argument("out", type=Path, help="new directory")
    args = parser.parse_args()
    manifest, artifact = complete_manifest(args.training), args.training / ARTIFACT
    final = nemo.find_checkpoint(artifact)
    weights = average([*nemo.step_checkpoints(artifact).values(), final])
    (args.out / ARTIFACT).mkdir(parents=True)
    save_weights(final, nemo.architecture_of(final), weights, args.out / ARTIFACT / final.name)
    fingerprint, files = f"mean of {manifest.fingerprint}", stamp_files(args.out / ARTIFACT)
    write_manifest(args.out, replace(manifest, files=files, fingerprint=fingerprint))


if __name__ == "__main__":
    run_main("benchmarks.average")
