"""Defines a stage for the launcher, which plans it, and the worker, which runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from nemo_convert.architecture import Architecture
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, StageConfig
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.inference_cost import InferenceCost
from recipes.planning.layouts import PARALLEL_SIZES, shape_layout_problems
from recipes.planning.limits import memory_problem
from recipes.planning.rules import Problem, has_error
from recipes.planning.workload import Workload

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound=StageConfig)
Kind = Literal[
    "checkpoint_hf",
    "checkpoint_nemo",
    "engine",
    "gguf",
    "eval_results",
    "dataset",
    "logit_cache",
    "importance",
    "plan",
    "task_results",
    "served_results",
    "speed_results",
    "shapes",
    "latency_model",
    "search_results",
    "report",
]
"""Types of the results of stages."""
Kinds = tuple[Kind, ...]


def inherited_shapes(config: StageConfig, chain: Chain) -> Sequence[Architecture]:
    """Returns the architectures that a stage's input may have; empty if they are not known yet."""
    for name in ("candidates", "shapes"):  # inputs from a search, which have many shapes
        if name in config.inputs:
            return chain.shapes.get(config.inputs[name], ())
    source = config.inputs.get("checkpoint") or config.inputs.get("student")
    return chain.shapes.get(source or "") or [chain.shape_of(source)]


def smaller_settings(config: StageConfig) -> Iterator[dict[str, Any]]:
    """Yields changes of settings that save memory, the change with the least side effects first."""
    batch: dict[str, Any] = {"micro_batch_size": 1}
    bf16 = {"precision": "bf16-mixed"}
    sizes = PARALLEL_SIZES[1:]
    pipelines = [  # one rank for each pipeline stage
        {"pipeline_model_parallel_size": size, "resources.devices": size} for size in sizes
    ]
    combined = [{**pipeline, **batch} for pipeline in pipelines]
    samples = vars(config).get("num_calibration_samples", 0) // 2
    fewer = {"num_calibration_samples": max(1, samples)}
    changes = (batch, bf16, {**bf16, **batch}, *pipelines, *combined, fewer, {**fewer, **batch})
    for change in changes:
        if all(hasattr(config, name.partition(".")[0]) for name in change):
            yield change
    if "distill" in vars(config):  # a search
        yield from _smaller_trainings(vars(config)["distill"].resources.devices)


def _smaller_trainings(devices: int) -> Iterator[dict[str, Any]]:
    """Yields changes of the settings of a search's trainings, which have ``devices`` devices."""
    batch: dict[str, Any] = {"distill.micro_batch_size": 1}
    for base in (batch, {**batch, "distill.recompute_granularity": "full"}):
        yield base
        for size in PARALLEL_SIZES[1:]:
            yield {
                **base,
                "distill.tensor_model_parallel_size": size,
                "distill.resources.devices": max(devices, size),
            }


def with_changes(config: Any, changes: Mapping[str, Any]) -> Any:
    """Returns settings with changes, whose keys may name nested settings: ``resources.devices``."""
    for key, value in changes.items():
        name, _, nested = key.partition(".")
        new = with_changes(vars(config)[name], {nested: value}) if nested else value
        changed = replace(config, **{name: new})
        if isinstance(config, StageConfig):
            changed.name = config.name  # ``replace`` sets the module's name
        config = changed
    return config


def checkpoint_outcome(result: DataclassInstance | None, checkpoint: Path) -> Outcome:
    """Returns the outcome of a stage that wrote a NeMo checkpoint.

    Args:
        result: The stage's result; ``None`` on ranks other than 0, if only rank 0 has it.
        checkpoint: A NeMo checkpoint with the same architecture and tokenizer.
    """
    from nemo_convert import hf, nemo

    arch = nemo.architecture_of(checkpoint)
    tokenizer = hf.tokenizer_sha256(nemo.side_folder(checkpoint))
    return Outcome(result, arch.as_dict(), arch.parameters(), tokenizer)


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[ConfigT]):
    """A stage. Its module defines it as ``STAGE``; its default settings are in ``conf/stage``."""

    config: type[ConfigT]
    kind: Kind
    """Type of the stage's result."""
    run: Callable[[ConfigT, Inputs, Path], Outcome]
    """Runs the stage on every rank. The path is an empty directory for the artifact."""
    check: Callable[[ConfigT, Chain], Iterable[Problem]] = lambda config, chain: ()
    """Yields problems of the settings. Takes less than a second and does not import torch."""
    single_rank_reason: str = ""
    """Why the stage needs exactly one rank; empty if it supports several ranks."""
    inputs: Mapping[str, Kinds] = field(default_factory=dict)
    """Required inputs, each with the types that it may have."""
    optional_inputs: Mapping[str, Kinds] = field(default_factory=dict)
    """Optional inputs, each with the types that it may have."""
    starts: tuple[str, ...] = ()
    """Stages that this stage starts. Their code is part of this stage's code fingerprint."""
    devices: Callable[[ConfigT, Chain], int] = lambda config, chain: config.resources.devices
    """Devices per node that the stage uses. A search, and a stage that runs engines, may start one
    process that uses several."""
    needs_torch: bool = True
    """Whether the stage imports torch. If not, it starts without torchrun."""
    needs_gpu: Callable[[ConfigT, Chain], bool] = lambda config, chain: True
    """Whether the stage uses GPUs. If not, its job and its container get no GPUs."""
    needs_tensorrt_llm: Callable[[ConfigT, Chain], bool] = lambda config, chain: False
    """Whether the stage runs TensorRT-LLM, which has its own container image."""
    external: Callable[[ConfigT], Mapping[str, Path]] = lambda config: {}
    """Files and folders outside the run that the result depends on."""
    external_files: tuple[str, ...] = ("**/*",)
    """Patterns of the files in these folders that the result depends on."""
    libraries: tuple[str, ...] = ()
    """Libraries that only some stages compute with. Their versions are in the fingerprint."""
    programs: tuple[str, ...] = ()
    """Programs that the stage runs if they are on ``PATH``. Their versions are in the
    fingerprint."""
    disk_bytes: Callable[[ConfigT, Chain], int] = lambda config, chain: 0
    """Disk space of the artifact and temporary files, in bytes."""
    shapes: Callable[[ConfigT, Chain], Sequence[Architecture]] = inherited_shapes
    """Architectures that the result may have, the largest first; by default those of the input."""
    workload: Callable[[ConfigT, Chain], Workload] | None = None
    """For plans: the training, or the teacher's forward passes over a text."""
    inference_cost: Callable[[ConfigT, Chain], InferenceCost] | None = None
    """For plans: the cost of a stage that runs models and has no ``workload``. For a search it
    includes the training of candidates."""
    names_accepted_results: bool = False
    """Whether the result is a document that says which stale results the user accepted."""
    resolve_from_chain: Callable[[ConfigT, Chain], ConfigT] = lambda config, chain: config
    """Returns the settings, with those of other stages that the result depends on."""
    progress: Callable[[Path], str | None] = lambda work: None
    """Returns the progress of unfinished work in a folder, such as "step 50"; ``None`` if none."""
    check_machine: Callable[[ConfigT], None] = lambda config: None
    """Raises ``RecipeError`` if this machine lacks what the stage needs."""

    def image(self, config: ConfigT, chain: Chain) -> str | None:
        """Returns the stage's container image; ``None`` without a container."""
        return chain.image_of(config.stage, self.needs_tensorrt_llm(config, chain))

    def problems(self, config: ConfigT, chain: Chain) -> Iterator[Problem]:
        """Yields all problems of the stage's settings."""
        ranks = config.resources.ranks
        if self.single_rank_reason and ranks != 1:
            yield Problem(
                rules.ONE_RANK,
                f"{config.name} has {ranks} ranks, but must have one: {self.single_rank_reason}",
                "set its resources.devices and resources.nodes to 1",
            )
        yield from self.check(config, chain)
        if self.workload is not None:
            shapes = self.shapes(config, chain)
            yield from shape_layout_problems(self.workload(config, chain), shapes, chain.hardware)

    def memory_problems(self, name: str, config: ConfigT, chain: Chain) -> Iterator[Problem]:
        """Yields a problem if ``inference_cost`` needs more memory than a rank has."""
        if self.inference_cost is None:
            return
        hardware, cost = chain.hardware, self.inference_cost
        available = hardware.memory_of_rank(config.resources.devices)
        needed = cost(config, chain).memory.total
        if needed <= available:
            return
        fix = "use a device with more memory"
        for changes in smaller_settings(config):
            smaller = with_changes(config, changes)
            memory = hardware.memory_of_rank(smaller.resources.devices)
            is_valid = not has_error(self.problems(smaller, chain))
            if is_valid and cost(smaller, chain).memory.total <= memory:
                settings = (f"stages.{name}.{key}={value}" for key, value in changes.items())
                fix = f"set {' '.join(settings)}"
                break
        yield memory_problem(name, needed, available, hardware.name, fix)
