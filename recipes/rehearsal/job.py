"""What is rehearsed: ranks of stages, on what, with settings made short. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import OmegaConf

from recipes.core.manifest import manifest_of
from recipes.core.stage import StageConfig
from recipes.distillation.settings import CacheLogitsConfig, DistillConfig, TrainingConfig
from recipes.evaluation.settings import EvaluateConfig
from recipes.planning.chain import Chain
from recipes.pruning.settings import HealConfig, ScoreConfig
from recipes.search.settings import RankCandidatesConfig, SuccessiveHalvingConfig
from recipes.stages.contract import Stage
from recipes.stages.export_hf import ExportConfig
from recipes.stages.import_hf import ImportConfig
from recipes.stages.successive_halving import training_of

OF_A_CACHE = ("seq_length", "top_k", "tail_draws", "temperature")
"""Settings that say what a cached teacher is like."""
STEPS = 2
"""Of a training: memory is as it stays once the optimizer has its states."""


@dataclass(frozen=True)
class Given:
    """An input of a rehearsed stage."""

    kind: str
    shape: dict[str, Any]
    """Of the model that it is, or is of."""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings of the stage that made it."""


@dataclass(frozen=True)
class RankJob:
    """One rank of one stage."""

    name: str
    stage: str
    config: dict[str, Any]
    """Its settings, as short as they can be with the same shapes."""
    inputs: dict[str, Given]
    hf_config: dict[str, Any]
    """The teacher's ``config.json``."""
    rank: int
    nodes: int
    devices: int
    vocabulary: int
    """A rank's part of it."""
    tokens: int
    """Of each part of the text."""
    resumed: bool = False
    """Whether it is stopped by the clock after its first step, and taken up again."""

    @property
    def world(self) -> int:
        """Ranks of the stage."""
        return self.nodes * self.devices

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> RankJob:
        """The job that ``asdict`` made plain."""
        inputs = {name: Given(**given) for name, given in plain["inputs"].items()}
        return cls(**{**plain, "inputs": inputs})


@dataclass(frozen=True)
class Message:
    """A tensor that a rank sends to another, or has made room for."""

    source: int
    destination: int
    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal found."""

    seconds: float = 0
    error: str | None = None
    """The end of the traceback."""
    peak: dict[str, int] = field(default_factory=dict)
    """Bytes at the peak, by kind."""
    sent: list[Message] = field(default_factory=list)
    expected: list[Message] = field(default_factory=list)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Rehearsed:
        """What ``asdict`` made plain."""
        messages = {n: [Message(**m) for m in plain[n]] for n in ("sent", "expected")}
        return cls(**{**plain, **messages})


def jobs_of(
    chain: Chain,
    stages: Mapping[str, Stage[Any]],
    wanted: Sequence[str],
    hf_config: Mapping[str, Any],
    ranks: Sequence[int] | None = None,
) -> list[RankJob]:
    """What to rehearse; stages that compute nothing on a device are left out.

    Args:
        chain: The chain.
        stages: All of its stages, by name.
        wanted: Names of those to rehearse.
        hf_config: The teacher's ``config.json``.
        ranks: Which; by default the first of the first, middle and last pipeline stage. A stage
            of fewer ranks has none of the others.
    """
    jobs = []
    for name in wanted:
        config = computed(chain.stages[name])
        world = config.resources.ranks
        short = shortened(config)
        if short is None:
            continue
        pipeline = short.get("pipeline_model_parallel_size", 1)
        job = RankJob(
            name=name,
            stage=config.stage,
            config=short,
            inputs={**dict(_inputs(chain, stages, config)), **_largest(chain, chain.stages[name])},
            hf_config=dict(hf_config),
            rank=0,
            nodes=config.resources.nodes,
            devices=config.resources.devices,
            vocabulary=chain.teacher.vocab_size // short.get("tensor_model_parallel_size", 1),
            tokens=_tokens(short),
            resumed=isinstance(config, TrainingConfig),
        )
        jobs += [
            replace(job, rank=rank)
            for rank in (first_ranks(world, pipeline) if ranks is None else ranks)
            if rank < world
        ]
    return jobs


def computed(config: StageConfig) -> StageConfig:
    """What is rehearsed: a halving's training of a candidate, an export without its card."""
    if isinstance(config, ExportConfig):
        return replace(config, inputs={"checkpoint": config.inputs["checkpoint"]})
    if not isinstance(config, SuccessiveHalvingConfig):
        return config
    training = training_of(config, config.rounds(config.most()) or [1], 0)
    model = config.inputs["checkpoint"]
    inputs = {"teacher": model, "student": model, "data": config.inputs["data"]}
    return replace(training, inputs=inputs)


def _largest(chain: Chain, config: StageConfig) -> dict[str, Given]:
    """The candidate of a halving that needs most memory; a teacher where none is known."""
    if not isinstance(config, SuccessiveHalvingConfig):
        return {}
    shapes = chain.shapes_within(config.inputs["candidates"])
    return {"student": Given("checkpoint_nemo", next(iter(shapes), chain.teacher).as_dict())}


def first_ranks(world: int, pipeline: int) -> list[int]:
    """The first rank of the first, the middle and the last pipeline stage."""
    return [stage * (world // pipeline) for stage in sorted({0, pipeline // 2, pipeline - 1})]


def shortened(config: StageConfig) -> dict[str, Any] | None:
    """A stage's settings, made short; ``None`` if it computes nothing on a device."""
    plain: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]
    changed: dict[str, Any]
    if isinstance(config, TrainingConfig):
        changed = _short_training(config)
    elif isinstance(config, CacheLogitsConfig):
        replicas = config.resources.ranks // config.tensor_model_parallel_size
        changed = {
            "num_windows": replicas * config.micro_batch_size,
            "windows_per_shard": config.micro_batch_size,
        }
    elif isinstance(config, ScoreConfig):
        windows = config.micro_batch_size
        changed = {
            "num_calibration_samples": windows,
            "num_loss_samples": min(windows, config.num_loss_samples),
            "block_sizes": [],
            "num_greedy_layers": 0,
        }
    elif isinstance(config, EvaluateConfig):
        changed = {"num_windows": config.micro_batch_size, "num_generations": 1, "new_tokens": 1}
    elif isinstance(config, (HealConfig, RankCandidatesConfig)):
        changed = {"num_samples": config.micro_batch_size}
    elif isinstance(config, (ImportConfig, ExportConfig)):
        changed = {}
    else:
        return None
    return {**plain, **changed}


def _short_training(config: TrainingConfig) -> dict[str, Any]:
    """Two steps, of as many micro batches as any stage of the pipeline holds at once, and one."""
    pipeline = config.pipeline_model_parallel_size
    model = config.tensor_model_parallel_size * pipeline * config.context_parallel_size
    batch = config.resources.ranks // model * config.micro_batch_size
    micro_batches = min(config.global_batch_size // batch, pipeline + 1)
    return {
        **({"stop_at_recovered": None} if isinstance(config, DistillConfig) else {}),
        "global_batch_size": batch * micro_batches,
        "max_steps": STEPS,
        "warmup_steps": 1,
        "val_check_interval": STEPS,
        "limit_val_batches": 1,
        "checkpoint_interval": STEPS,
        "profile_steps": [],  # a profiler holds on to weights, and there is no time to measure
        "compile": False,  # it would, for a device that is not there
    }


def _tokens(config: Mapping[str, Any]) -> int:
    """Text for one batch, or for all windows."""
    names = ("global_batch_size", "num_windows", "num_calibration_samples", "num_samples")
    windows = max(config.get(name) or 1 for name in names)
    length: int = config.get("seq_length", 1)
    return (windows + 1) * length + 1


def _inputs(
    chain: Chain, stages: Mapping[str, Stage[Any]], config: StageConfig
) -> Iterator[tuple[str, Given]]:
    for role, source in config.inputs.items():
        manifest = manifest_of(source) if source not in stages else None
        kind = manifest.kind if manifest is not None else stages[source].kind
        settings = manifest.config if manifest is not None else vars(chain.stages[source])
        kept = {name: settings[name] for name in OF_A_CACHE if name in settings}
        yield role, Given(kind, chain.shape_of(source).as_dict(), kept)
