"""Jobs of a rehearsal and their results. A job runs one rank of one stage on fake tensors.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import OmegaConf

from recipes.core.manifest import manifest_of
from recipes.core.stage import StageConfig
from recipes.distillation.settings import (
    CACHE_FIELDS,
    CacheLogitsConfig,
    DistillConfig,
    TrainingConfig,
)
from recipes.evaluation.settings import EvaluateConfig
from recipes.planning.chain import Chain
from recipes.pruning.settings import AddLayersConfig, HealConfig, ScoreConfig
from recipes.rehearsal.agreement import Channel, distinct_ranks
from recipes.search.settings import RankCandidatesConfig, SuccessiveHalvingConfig
from recipes.stages.contract import Stage
from recipes.stages.export_hf import ExportConfig
from recipes.stages.import_hf import ImportConfig
from recipes.stages.successive_halving import training_of

STEPS = 2
"""Steps of a rehearsed training run. The second step has the peak memory, because the first step
creates the optimizer's states."""


@dataclass(frozen=True)
class JobInput:
    """An input of a rehearsed stage."""

    kind: str
    """Type of the artifact, such as ``dataset`` (``Kind`` in ``recipes/stages/contract.py``)."""
    shape: dict[str, Any]
    """Architecture of the input's model. If the input is a list of shapes: of the teacher."""
    config: dict[str, Any] = field(default_factory=dict)
    """Those settings of the stage that made the input whose names are in ``CACHE_FIELDS``."""


@dataclass(frozen=True)
class RankJob:
    """One rank of one stage, to be rehearsed."""

    name: str
    """Name of the stage in the run."""
    config: dict[str, Any]
    """Settings of the stage, with fewer steps and less text but the same tensor shapes."""
    inputs: dict[str, JobInput]
    """Inputs by role, such as ``teacher``."""
    hf_config: dict[str, Any]
    """The teacher's ``config.json``."""
    rank: int
    resumed: bool = False
    """Whether the training is stopped after its first step and then resumed."""
    search: dict[str, Any] | None = None
    """Settings of the search that starts this training, if the search also evaluates candidates on
    this rank's device; otherwise ``None``."""

    @property
    def stage(self) -> str:
        """Name of the stage's module in ``recipes.stages``."""
        return str(self.config["stage"])

    @property
    def devices(self) -> int:
        """Number of ranks per node."""
        return int(self.config["resources"]["devices"])

    @property
    def world(self) -> int:
        """Number of ranks of the stage."""
        return self.devices * int(self.config["resources"]["nodes"])

    @property
    def vocabulary(self) -> int:
        """Size of the rank's shard of the vocabulary."""
        tensor: int = self.config.get("tensor_model_parallel_size", 1)
        return int(self.hf_config["vocab_size"]) // tensor


def jobs_of(
    chain: Chain,
    stages: Mapping[str, Stage[Any]],
    names: Sequence[str],
    hf_config: Mapping[str, Any],
    ranks: Sequence[int] | None = None,
) -> list[RankJob]:
    """Returns the jobs of stages. A stage that does not compute on a device has no job.

    Args:
        chain: Settings of all stages of a run.
        stages: All stages of the run, by name.
        names: Names of the stages to rehearse.
        hf_config: The teacher's ``config.json``.
        ranks: Ranks to rehearse; ranks that a stage does not have are ignored. By default,
            those of ``distinct_ranks``: every other rank runs the same code as one of them.
    """
    jobs = []
    for name in names:
        config = _rehearsed_config(chain.stages[name])
        settings = _reduced_settings(config)
        if settings is None:
            continue
        world = config.resources.ranks
        search_settings = None
        inputs = {role: _input(chain, stages, source) for role, source in config.inputs.items()}
        if isinstance(search := chain.stages[name], SuccessiveHalvingConfig):
            # ``config`` is a training run of the search. It trains the largest candidate.
            largest = chain.shape_of(search.inputs["candidates"])
            inputs["student"] = JobInput("checkpoint_nemo", largest.as_dict())
            search_settings = _reduced_search(search)
        jobs += [
            RankJob(
                name=name,
                config=settings,
                inputs=inputs,
                hf_config=dict(hf_config),
                rank=rank,
                resumed=isinstance(config, TrainingConfig),
                # A search evaluates candidates on the device of rank 0.
                search=search_settings if rank == 0 else None,
            )
            for rank in (_distinct_ranks(world, settings) if ranks is None else ranks)
            if rank < world
        ]
    return jobs


def _distinct_ranks(world: int, settings: Mapping[str, Any]) -> list[int]:
    """Calls ``distinct_ranks`` for a stage's settings. A parallel size that is not set is 1."""
    return distinct_ranks(
        world,
        tensor=settings.get("tensor_model_parallel_size", 1),
        context=settings.get("context_parallel_size", 1),
        pipeline=settings.get("pipeline_model_parallel_size", 1),
        expert=settings.get("expert_model_parallel_size", 1),
    )


def _rehearsed_config(config: StageConfig) -> StageConfig:
    """Replaces a search by one of its training runs; removes the evaluation from an export."""
    if isinstance(config, ExportConfig):
        return replace(config, inputs={"checkpoint": config.inputs["checkpoint"]})
    if not isinstance(config, SuccessiveHalvingConfig):
        return config
    round_sizes = config.round_sizes(config.max_candidates()) or [1]  # one candidate has no rounds
    training = training_of(config, round_sizes, round_number=0)
    model = config.inputs["checkpoint"]
    # ``jobs_of`` replaces the student by the largest candidate.
    inputs = {"teacher": model, "student": model, "data": config.inputs["data"]}
    return replace(training, inputs=inputs)


def _reduced_settings(config: StageConfig) -> dict[str, Any] | None:
    """Returns settings with fewer steps and samples; ``None`` if the stage uses no device.

    Each data-parallel replica gets one micro batch; in training, it may get a few.
    """
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]
    micro_batch = settings.get("micro_batch_size", 1)
    if isinstance(config, TrainingConfig):
        settings |= _reduced_training(config)
    elif isinstance(config, CacheLogitsConfig):
        replicas = config.resources.ranks // config.tensor_model_parallel_size
        settings |= {"num_sequences": replicas * micro_batch, "sequences_per_shard": micro_batch}
    elif isinstance(config, ScoreConfig):
        replicas = config.resources.ranks // config.pipeline_model_parallel_size
        settings |= {"block_sizes": [], "num_calibration_samples": replicas * micro_batch}
        settings |= {"num_loss_samples": min(micro_batch, config.num_loss_samples)}
    elif isinstance(config, EvaluateConfig):
        settings |= {"num_sequences": config.resources.ranks * micro_batch}
        settings |= {"num_generations": 1, "new_tokens": 1}
    elif isinstance(config, AddLayersConfig):
        settings |= {"num_sequences": micro_batch}
    elif isinstance(config, (HealConfig, RankCandidatesConfig)):
        settings |= {"num_samples": micro_batch}
    elif not isinstance(config, (ImportConfig, ExportConfig)):
        return None
    return settings


def _reduced_search(config: SuccessiveHalvingConfig) -> dict[str, Any]:
    """Returns a search's settings with one micro batch of evaluation samples."""
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]
    return {**settings, "num_samples": config.distill.micro_batch_size}


def _reduced_training(config: TrainingConfig) -> dict[str, Any]:
    """Returns the changes of settings that make a training run do ``STEPS`` short steps."""
    pipeline = config.pipeline_model_parallel_size
    replica_ranks = config.tensor_model_parallel_size * pipeline * config.context_parallel_size
    # Sequences in one micro batch of every data-parallel replica.
    sequences = config.resources.ranks // replica_ranks * config.micro_batch_size
    # With one micro batch more than pipeline stages, the pipeline schedule reaches a steady state.
    micro_batches = min(config.global_batch_size // sequences, pipeline + 1)
    without_stop = {"stop_at_recovered": None} if isinstance(config, DistillConfig) else {}
    return {
        **without_stop,
        "global_batch_size": sequences * micro_batches,
        "max_steps": STEPS,
        "warmup_steps": 1,
        "val_check_interval": STEPS,
        "limit_val_batches": 1,
        "checkpoint_interval": STEPS,
        "profile_steps": [],  # a profiler would keep weights in memory
        "compile": False,  # the fake device has no compiler
    }


def _input(chain: Chain, stages: Mapping[str, Stage[Any]], source: str) -> JobInput:
    """Returns a job's input.

    Args:
        chain: Settings of all stages of a run.
        stages: All stages of the run, by name.
        source: Name of the stage that makes the input, or the directory of a completed stage.
    """
    manifest = manifest_of(source) if source not in stages else None
    kind = manifest.kind if manifest is not None else stages[source].kind
    settings = manifest.config if manifest is not None else vars(chain.stages[source])
    config = {name: settings[name] for name in CACHE_FIELDS if name in settings}
    # The teacher represents the candidates of a search, since no candidate needs more memory.
    shape = chain.teacher if kind == "shapes" else chain.shape_of(source)
    return JobInput(kind, shape.as_dict(), config)


@dataclass(frozen=True)
class RehearsalResult:
    """Result of the rehearsal of one rank of a stage."""

    seconds: float = 0
    """Duration of the rehearsal, which says nothing about the time on a GPU."""
    error: str | None = None
    """End of the traceback; ``None`` if the stage did not fail."""
    peak: dict[str, int] = field(default_factory=dict)
    """Bytes on the device by label (such as ``weights``), at the time of their largest sum."""
    host: int = 0
    """Peak bytes of tensors in host memory, often while a checkpoint is saved."""
    channels: list[Channel] = field(default_factory=list)
    """The rank's collectives and point-to-point messages."""
