"""Prunes, trains and measures the candidates of ``successive_halving``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from recipes.core.files import write_text_atomically
from recipes.core.manifest import ARTIFACT, read_manifest
from recipes.core.stage import Inputs, rank, require_time_left, world_size
from recipes.core.stage_process import run_child
from recipes.core.watchdog import pause_watchdog
from recipes.distillation.settings import DistillConfig
from recipes.evaluation.results import TokenQuality
from recipes.pruning.settings import PruneConfig
from recipes.search.results import Candidate
from recipes.search.settings import SuccessiveHalvingConfig
from recipes.search.space import prune_settings, search_sizes

POLL_SECONDS = 0.5
"""Seconds between two checks of whether another rank has finished."""


class HalvingRun:
    """Prunes candidates in ``CANDIDATE/prune``, and trains them in ``CANDIDATE/round-0`` and so on.

    These are folders of ``directory``, which is kept until the stage is complete, so that a killed
    search can resume. ``layer_importance`` is the setting of ``prune``.
    """

    def __init__(
        self, cfg: SuccessiveHalvingConfig, inputs: Inputs, directory: Path, layer_importance: str
    ) -> None:
        self._cfg, self._inputs, self._directory = cfg, inputs, directory
        self._layer_importance = layer_importance

    def train(
        self, candidates: Sequence[Candidate], round_number: int, training: DistillConfig
    ) -> None:
        """Trains every candidate for one round, each on one rank. Skips completed trainings.

        ``training`` has the settings of the round. Returns after all ranks have trained.

        Raises:
            RecipeError: A stage failed; the message says where its log is.
        """
        for candidate in candidates[rank() :: world_size()]:
            if round_number == 0:
                student = self._prune_candidate(candidate)
            else:
                student = self._round_dir(candidate, round_number - 1)
            inputs = {
                "teacher": self._inputs["checkpoint"].directory,
                "student": student,
                "data": self._inputs["data"].directory,
            }
            run_child(training, self._round_dir(candidate, round_number), inputs)
        for candidate in candidates:
            # A complete training has a manifest.
            _wait_until(partial(read_manifest, self._round_dir(candidate, round_number)))

    def _round_dir(self, candidate: Candidate, round_number: int) -> Path:
        return self._directory / candidate.name / f"round-{round_number}"

    def _prune_candidate(self, candidate: Candidate) -> Path:
        settings = prune_settings(search_sizes(candidate.shape), self._layer_importance)
        inputs = {name: self._inputs[name].directory for name in ("checkpoint", "importance")}
        directory = self._directory / candidate.name / "prune"
        run_child(PruneConfig(stage="prune", **settings), directory, inputs)
        return directory

    def measure(self, candidates: Sequence[Candidate], round_number: int) -> list[TokenQuality]:
        """Measures every candidate on validation text after a round.

        Rank 0 measures. The other ranks wait, and read the results from a file.

        Raises:
            StoppedByDeadlineError: The deadline passed before the last model was loaded.
        """
        from nemo_convert import nemo
        from recipes.backend.device import release_cached_memory
        from recipes.data.token_sequences import read_sequences
        from recipes.evaluation.text_quality import measure_checkpoints

        def find_checkpoint_in_time(artifact: Path) -> Path:
            require_time_left(f"measuring round {round_number}")
            return nemo.find_checkpoint(artifact)

        results_file = self._directory / f"round-{round_number}.json"
        if rank() == 0 and not results_file.exists():  # a killed search may have left it
            length, batch_size = self._cfg.distill.seq_length, self._cfg.distill.micro_batch_size
            text = read_sequences(self._inputs["data"], "validation", length, self._cfg.num_samples)
            teacher = find_checkpoint_in_time(self._inputs["checkpoint"].artifact)
            students = (  # a generator, so that the deadline is checked before each is loaded
                find_checkpoint_in_time(self._round_dir(candidate, round_number) / ARTIFACT)
                for candidate in candidates
            )
            precision = self._cfg.precision
            qualities = measure_checkpoints(teacher, students, text, precision, batch_size)
            qualities_text = json.dumps([asdict(quality) for quality in qualities])
            write_text_atomically(results_file, qualities_text)
            release_cached_memory()  # the next round's training is another process on this GPU
        _wait_until(results_file.exists)
        qualities_json = json.loads(results_file.read_text(encoding="utf-8"))
        return [TokenQuality(**quality) for quality in qualities_json]


def _wait_until(is_finished: Callable[[], object]) -> None:
    """Waits for another rank until ``is_finished`` returns a true value.

    If the other rank fails, torchrun ends this process.

    Raises:
        StoppedByDeadlineError: The deadline passed.
    """
    with pause_watchdog():
        while not is_finished():
            require_time_left("waiting for other ranks")
            time.sleep(POLL_SECONDS)
