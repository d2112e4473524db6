"""Successive halving: prunes, trains and measures candidates, each as a stage of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT, write_text_atomically
from recipes.core.fingerprint import result_settings, stage_code, stage_fingerprint
from recipes.core.manifest import read_manifest
from recipes.core.processes import die_with_parent, start_command
from recipes.core.stage import REQUEST, Inputs, StageConfig, rank, world_size
from recipes.core.watchdog import pause_watchdog
from recipes.distillation.settings import DistillConfig
from recipes.evaluation.results import TokenQuality
from recipes.pruning.settings import PruneConfig
from recipes.search.results import Candidate
from recipes.search.settings import SuccessiveHalvingConfig
from recipes.search.space import axes_of, prune_settings

POLL = 0.5
"""Seconds between looks at what other ranks have finished."""


class HalvingRun:
    """Where candidates compete: ``NAME/prune``, ``NAME/round-0``, … below a directory.

    Args:
        cfg: The stage's config.
        inputs: Its inputs.
        directory: Kept while the stage is unfinished.
        method: How ``prune`` chooses layers.
    """

    def __init__(
        self, cfg: SuccessiveHalvingConfig, inputs: Inputs, directory: Path, method: str
    ) -> None:
        self._cfg, self._inputs, self._directory, self._method = cfg, inputs, directory, method

    def train(self, candidates: Sequence[Candidate], number: int, training: DistillConfig) -> None:
        """Trains every candidate for one round; each rank takes its share.

        Raises:
            RecipeError: A stage failed; the message says where its log is.
        """
        for candidate in candidates[rank() :: world_size()]:
            place = self._directory / candidate.name
            pruned = place / "prune"
            if number == 0:
                self._prune(candidate, pruned)
            student = place / f"round-{number - 1}" if number else pruned
            inputs = {
                "teacher": self._inputs["checkpoint"].directory,
                "student": student,
                "data": self._inputs["data"].directory,
            }
            run_stage(training, place / f"round-{number}", inputs)
        for candidate in candidates:  # others have theirs
            _wait_for(self._directory / candidate.name / f"round-{number}")

    def _prune(self, candidate: Candidate, directory: Path) -> None:
        settings = prune_settings(axes_of(candidate.shape), self._method)
        config = PruneConfig(stage="prune", **settings)
        inputs = {name: self._inputs[name].directory for name in ("checkpoint", "importance")}
        run_stage(config, directory, inputs)

    def measure(self, candidates: Sequence[Candidate], number: int) -> list[TokenQuality]:
        """Perplexity and KL to the teacher of every candidate on validation text."""
        from nemo_convert import nemo
        from recipes.data.token_windows import read_windows
        from recipes.evaluation.text_quality import measure_checkpoints

        places = [self._directory / c.name / f"round-{number}" for c in candidates]
        found = self._directory / f"round-{number}.json"
        if rank() == 0 and not found.exists():
            length, size = self._cfg.distill.seq_length, self._cfg.distill.micro_batch_size
            text = read_windows(self._inputs["data"], "validation", length, self._cfg.num_samples)
            teacher = nemo.find_checkpoint(self._inputs["checkpoint"].artifact)
            students = [nemo.find_checkpoint(place / "artifact") for place in places]
            figures = measure_checkpoints(teacher, students, text, self._cfg.precision, size)
            write_text_atomically(found, json.dumps([asdict(one) for one in figures]))
        with pause_watchdog():
            while not found.exists():
                time.sleep(POLL)
        return [TokenQuality(**one) for one in json.loads(found.read_text(encoding="utf-8"))]


def run_stage(config: StageConfig, directory: Path, inputs: dict[str, Path]) -> None:
    """Runs a stage as the launcher does, on one machine, unless it is complete.

    Raises:
        RecipeError: It failed.
    """
    request = request_of(config, inputs)
    done = read_manifest(directory)
    if done is not None and done.fingerprint == request["fingerprint"]:
        return
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / REQUEST
    write_text_atomically(file, OmegaConf.to_yaml(request))
    devices = config.resources.devices
    command = start_command(f"recipes.stages.{config.stage}", file, devices, sys.executable)
    with (directory / "log.txt").open("w", encoding="utf-8") as log, pause_watchdog():
        subprocess.run(
            command, cwd=REPO_ROOT, env=_environment(devices), stdout=log, stderr=log,
            check=False, preexec_fn=die_with_parent,
        )  # fmt: skip
    if read_manifest(directory) is None:
        error = directory / "work" / "error.txt"
        reason = error.read_text(encoding="utf-8") if error.exists() else "it left no message"
        raise RecipeError(f"{directory.name} of {directory.parent.name} failed: {reason}", fix="")


def request_of(config: StageConfig, inputs: dict[str, Path]) -> dict[str, Any]:
    """Content of a stage's ``config.yaml``, as the launcher would write it.

    Raises:
        RecipeError: An input is not complete.
    """
    refs = {}
    for name, source in inputs.items():
        manifest = read_manifest(source)
        if manifest is None:
            raise RecipeError(f"{source} is not complete.", "the same command runs it first")
        refs[name] = {
            "directory": str(source),
            "kind": manifest.kind,
            "fingerprint": manifest.fingerprint,
        }
    code = stage_code([config.stage])
    prints = {name: ref["fingerprint"] for name, ref in refs.items()}
    fingerprint = stage_fingerprint(result_settings(config), code, prints, {})
    return {"config": asdict(config), "inputs": refs, "fingerprint": fingerprint, "code": code}


def _environment(devices: int) -> dict[str, str]:
    """This rank's, without what makes it one of several; for one device, it is the rank's own."""
    keep = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_"))
        and name not in ("RANK", "WORLD_SIZE")
    }
    keep["PYTHONPATH"] = str(REPO_ROOT)
    if devices > 1:
        return keep
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return {**keep, "CUDA_VISIBLE_DEVICES": visible.split(",")[local] if visible else str(local)}


def _wait_for(directory: Path) -> None:
    """Another rank that fails ends this one, too: torchrun sees to that."""
    with pause_watchdog():
        while read_manifest(directory) is None:
            time.sleep(POLL)
