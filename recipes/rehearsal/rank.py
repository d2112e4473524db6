"""Rehearses one rank of one stage: calls the stage's ``run`` with fake tensors.

A fake tensor has a shape and a device, but no values.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from nemo.lightning.callback_group import CallbackGroup
from omegaconf import OmegaConf

from nemo_convert.architecture import Architecture
from recipes.core.manifest import ARTIFACT, WORK
from recipes.core.stage import DEADLINE, Input, StoppedByDeadlineError
from recipes.rehearsal import device, materials, messages
from recipes.rehearsal.job import RankJob, RehearsalResult
from recipes.rehearsal.memory import MemoryTracker, install_labels
from recipes.search.halving import HalvingRun
from recipes.search.results import Candidate
from recipes.search.settings import SuccessiveHalvingConfig
from recipes.stages.contract import Stage

MAX_FRAMES = 5
"""Number of innermost frames of a traceback that are reported."""


def rehearse(job: RankJob) -> RehearsalResult:
    """Runs the job's stage; returns its peak memory, its communication, and its error if any."""
    os.environ.update(environment(job))
    stage: Stage[Any] = importlib.import_module(f"recipes.stages.{job.stage}").STAGE
    memory = MemoryTracker(job.vocabulary)
    start = time.monotonic()
    error = None
    with tempfile.TemporaryDirectory() as temporary:
        run_dir = Path(temporary)
        out = run_dir / job.name / WORK / ARTIFACT
        out.mkdir(parents=True)
        try:
            inputs = materials.inputs(job, run_dir)
            schema = OmegaConf.structured(stage.config)
            cfg = OmegaConf.merge(schema, materials.settings(job, run_dir))
            run = partial(stage.run, OmegaConf.to_object(cfg), inputs, out)
            install_labels(memory)
            with device.fake_tensors(), memory, messages.MessageChecker():
                if job.search is not None:
                    # In a real run, the search still holds the memory of this evaluation while a
                    # child process of the search trains on the same GPU.
                    _measure_candidate(job.search, inputs, run_dir)
                    memory.label_as_parent()
                if job.resumed:
                    _stop_after_one_step(run)
                run()  # resumes if the call above saved a checkpoint
        except Exception:
            error = _error_text()
    return RehearsalResult(
        seconds=round(time.monotonic() - start, 1),
        error=error,
        peak={label: size for label, size in memory.peak.items() if size},
        host=memory.host_peak,
        channels=messages.recorded_channels(),
    )


def _measure_candidate(
    settings: Mapping[str, Any], inputs: Mapping[str, Input], run_dir: Path
) -> None:
    """Evaluates a candidate, as a search does between two rounds of training runs.

    Args:
        settings: Settings of ``successive_halving``.
        inputs: Inputs of the rehearsed training. The student is the candidate.
        run_dir: The rehearsal's run directory.
    """
    config = OmegaConf.merge(OmegaConf.structured(SuccessiveHalvingConfig), settings)
    shape = Architecture(**inputs["student"].manifest.architecture or {})
    # The measurement uses only the candidate's name, so all numbers are placeholders.
    candidate = Candidate(
        "candidate", parameters=0, shape=shape, proxy=0, perplexity=0, kl_to_teacher=0
    )
    directory = run_dir / "search"
    (directory / candidate.name).mkdir(parents=True)
    # The search looks here for the candidate that was trained in round 0.
    (directory / candidate.name / "round-0").symlink_to(inputs["student"].directory)
    search_inputs = {"checkpoint": inputs["teacher"], "data": inputs["data"]}
    search = HalvingRun(OmegaConf.to_object(config), search_inputs, directory, "")  # type: ignore[arg-type]
    search.measure([candidate], round_number=0)


def _stop_after_one_step(run: Callable[[], object]) -> None:
    """Runs a training whose deadline has passed, so that it stops after one step and a checkpoint.

    Then frees all memory of the training, as the end of a process would.
    """
    os.environ[DEADLINE] = "0"  # a time in 1970
    with suppress(StoppedByDeadlineError):
        run()
    del os.environ[DEADLINE]
    RotaryEmbedding.forward.cache_clear()  # the cache of this function refers to the model
    for callback in CallbackGroup.get_instance().callbacks:  # NeMo's global list
        del callback.log, callback.log_dict  # bound methods, which refer to the model
    _clear_optimizers()
    gc.collect()


def _clear_optimizers() -> None:
    """Clears optimizers, because they keep models alive.

    A float32 optimizer holds views of weights. The autograd graph of the views has hooks that refer
    to the model. The loop is in its own function, so that its variable keeps no object alive.
    """
    for instance in gc.get_objects():
        # ``isinstance`` would raise an error if an instance is the proxy of a freed object.
        if issubclass(type(instance), DistributedOptimizer):
            vars(instance).clear()


def _error_text() -> str:
    """Returns the current error and its innermost frames outside of torch and of rehearsals."""
    _, error, trace = sys.exc_info()
    frames = [
        frame
        for frame in traceback.extract_tb(trace)
        if "/torch/" not in frame.filename and "/recipes/rehearsal/" not in frame.filename
    ]
    lines = traceback.format_list(frames[-MAX_FRAMES:])
    return "".join(lines) + f"{type(error).__name__}: {error}"


def environment(job: RankJob) -> dict[str, str]:
    """Returns the environment variables that torchrun would set for the job's rank."""
    return {
        "RANK": str(job.rank),
        "LOCAL_RANK": str(job.rank % job.devices),
        "WORLD_SIZE": str(job.world),
        "LOCAL_WORLD_SIZE": str(job.devices),
        "GROUP_RANK": str(job.rank // job.devices),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "rehearsal",
    }
