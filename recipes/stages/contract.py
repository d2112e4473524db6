"""Defines the interface through which the launcher plans a stage and the worker runs it."""

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
"""Types of the artifacts that stages write."""
Kinds = tuple[Kind, ...]


def inherited_shapes(config: StageConfig, chain: Chain) -> Sequence[Architecture]:
    """Returns the architectures that a stage's input may have, the largest first.

    Returns an empty sequence before the search that lists them has run.
    """
    for name in ("candidates", "shapes"):  # inputs from a search, which may have many shapes
        if name in config.inputs:
            return chain.shapes.get(config.inputs[name], ())
    return chain.shapes_of(config.inputs.get("checkpoint") or config.inputs.get("student"))


def smaller_settings(config: StageConfig) -> Iterator[dict[str, Any]]:
    """Yields changes of a stage's settings that save memory, the least intrusive change first.

    A change maps names of settings, also nested ones such as ``resources.devices``, to new values.
    """
    small_batch: dict[str, Any] = {"micro_batch_size": 1}
    bf16 = {"precision": "bf16-mixed"}
    pipelines = [  # one rank for each pipeline stage
        {"pipeline_model_parallel_size": size, "resources.devices": size}
        for size in PARALLEL_SIZES[1:]  # without 1
    ]
    num_samples = vars(config).get("num_calibration_samples", 0)
    fewer_samples = {"num_calibration_samples": max(1, num_samples // 2)}
    changes = (
        small_batch,
        bf16,
        {**bf16, **small_batch},
        *pipelines,
        *({**pipeline, **small_batch} for pipeline in pipelines),
        fewer_samples,
        {**fewer_samples, **small_batch},
    )
    for change in changes:
        # Skips settings that this stage does not have.
        if all(hasattr(config, name.partition(".")[0]) for name in change):
            yield change
    if "distill" in vars(config):  # a search, which trains candidates
        yield from _smaller_trainings(vars(config)["distill"].resources.devices)


def _smaller_trainings(devices: int) -> Iterator[dict[str, Any]]:
    """Yields changes that save memory in a search's training runs.

    ``devices`` is the number of devices per training run before the change.
    """
    small_batch: dict[str, Any] = {"distill.micro_batch_size": 1}
    for base in (small_batch, {**small_batch, "distill.recompute_granularity": "full"}):
        yield base
        for size in PARALLEL_SIZES[1:]:  # without 1
            yield {
                **base,
                "distill.tensor_model_parallel_size": size,
                "distill.resources.devices": max(devices, size),
            }


def with_changes(config: Any, changes: Mapping[str, Any]) -> Any:
    """Returns a copy of a stage's settings, or of nested settings, with changes.

    ``changes`` are new values by name. A dot separates nested names: ``resources.devices``.
    """
    for key, value in changes.items():
        name, _, nested_key = key.partition(".")
        if nested_key:
            value = with_changes(vars(config)[name], {nested_key: value})
        changed = replace(config, **{name: value})
        if isinstance(config, StageConfig):
            changed.name = config.name  # ``replace`` resets it to the module's name
        config = changed
    return config


def checkpoint_outcome(result: DataclassInstance | None, checkpoint: Path) -> Outcome:
    """Returns the outcome of a stage that wrote a NeMo checkpoint.

    Args:
        result: The stage's result; ``None`` on ranks other than 0, if only rank 0 has it.
        checkpoint: A NeMo checkpoint with the same architecture and tokenizer as the written one.
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
    """Type of the artifact that the stage writes."""
    run: Callable[[ConfigT, Inputs, Path], Outcome]
    """Runs the stage on every rank. The path is an empty directory for the artifact."""
    check: Callable[[ConfigT, Chain], Iterable[Problem]] = lambda config, chain: ()
    """Yields problems of the settings. Takes less than a second. Must not import torch."""
    single_rank_reason: str = ""
    """Why the stage needs exactly one rank; empty if it supports several ranks."""
    inputs: Mapping[str, Kinds] = field(default_factory=dict)
    """Required inputs: maps each name to the artifact types that it may have."""
    optional_inputs: Mapping[str, Kinds] = field(default_factory=dict)
    """Optional inputs: maps each name to the artifact types that it may have."""
    starts: tuple[str, ...] = ()
    """Other stages that this stage runs itself. Its code fingerprint includes their code."""
    devices: Callable[[ConfigT, Chain], int] = lambda config, chain: config.resources.devices
    """Devices per node that the stage uses; by default one for each process. A search and a stage
    that runs engines may use more devices than processes."""
    needs_torch: bool = True
    """Whether the stage imports torch. If not, it starts without torchrun."""
    needs_gpu: Callable[[ConfigT, Chain], bool] = lambda config, chain: True
    """Whether the stage uses GPUs. If not, its job and its container get no GPUs."""
    needs_tensorrt_llm: Callable[[ConfigT, Chain], bool] = lambda config, chain: False
    """Whether the stage runs TensorRT-LLM, which has its own container image."""
    external: Callable[[ConfigT], Mapping[str, Path]] = lambda config: {}
    """Files and folders outside the run that the result depends on, by name in the fingerprint."""
    external_files: tuple[str, ...] = ("**/*",)
    """Glob patterns of the files that the result depends on, in the folders of ``external``."""
    libraries: tuple[str, ...] = ()
    """Libraries that not all stages use. Their versions are in the fingerprint."""
    programs: tuple[str, ...] = ()
    """Programs that the stage runs if they are installed. The fingerprint has their versions."""
    disk_bytes: Callable[[ConfigT, Chain], int] = lambda config, chain: 0
    """Disk space of the artifact and temporary files, in bytes."""
    shapes: Callable[[ConfigT, Chain], Sequence[Architecture]] = inherited_shapes
    """Architectures that the result may have, the largest first; by default those of the input."""
    workload: Callable[[ConfigT, Chain], Workload] | None = None
    """Returns the work of a stage that trains, or that runs the teacher over a text. Plans compute
    the stage's time from it. ``None`` for other stages."""
    inference_cost: Callable[[ConfigT, Chain], InferenceCost | None] = lambda config, chain: None
    """Returns the cost of a stage that runs models and has no ``workload``, for plans. The cost of
    a search includes the training of candidates. ``None`` if the cost is not estimated."""
    names_accepted_results: bool = False
    """Whether the result is a document that lists the stale results that the user accepted."""
    resolve_from_chain: Callable[[ConfigT, Chain], ConfigT] = lambda config, chain: config
    """Returns the settings, completed with values that follow from other stages or the machine."""
    progress: Callable[[Path], str | None] = lambda work: None
    """Returns the progress of the unfinished work in the folder ``work``, such as "step 50";
    ``None`` if there is no unfinished work."""
    check_machine: Callable[[ConfigT], None] = lambda config: None
    """Raises ``RecipeError`` if this machine lacks what the stage needs."""

    def image(self, config: ConfigT, chain: Chain) -> str | None:
        """Returns the stage's container image; ``None`` if the stage runs outside containers."""
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
        """Yields a problem if the stage needs more memory than a rank has, by ``inference_cost``.

        The problem's fix is the first of ``smaller_settings`` that is valid and fits into memory.
        ``name`` is the stage's name.
        """
        hardware = chain.hardware
        available = hardware.memory_of_rank(config.resources.devices)
        needed = self._memory_bytes(config, chain)
        if needed <= available:
            return
        fix = "use a device with more memory"
        for changes in smaller_settings(config):
            smaller = with_changes(config, changes)
            # A change may use more devices. On a CPU, ranks share the memory.
            memory = hardware.memory_of_rank(smaller.resources.devices)
            is_valid = not has_error(self.problems(smaller, chain))
            if is_valid and self._memory_bytes(smaller, chain) <= memory:
                settings = (f"stages.{name}.{key}={value}" for key, value in changes.items())
                fix = f"set {' '.join(settings)}"
                break
        yield memory_problem(name, needed, available, hardware.name, fix)

    def _memory_bytes(self, config: ConfigT, chain: Chain) -> float:
        """Returns the memory that a rank needs, by ``inference_cost``; 0 if it is not estimated."""
        cost = self.inference_cost(config, chain)
        return cost.memory.total if cost else 0.0
