"""Successive halving: prunes, trains and measures candidates, each as a stage of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from recipes.core.files import write_text_atomically
from recipes.core.manifest import read_manifest
from recipes.core.stage import Inputs, rank, world_size
from recipes.core.stage_process import run_child
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
            run_child(training, place / f"round-{number}", inputs)
        for candidate in candidates:  # others have theirs
            _wait_for(self._directory / candidate.name / f"round-{number}")

    def _prune(self, candidate: Candidate, directory: Path) -> None:
        settings = prune_settings(axes_of(candidate.shape), self._method)
        config = PruneConfig(stage="prune", **settings)
        inputs = {name: self._inputs[name].directory for name in ("checkpoint", "importance")}
        run_child(config, directory, inputs)

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


def _wait_for(directory: Path) -> None:
    """Another rank that fails ends this one, too: torchrun sees to that."""
    with pause_watchdog():
        while read_manifest(directory) is None:
            time.sleep(POLL)
