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
from recipes.planning.layouts import layout_problems
from recipes.planning.limits import memory_problem
from recipes.planning.rules import Problem
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
"""Type of a stage's result."""
Kinds = tuple[Kind, ...]

PIPELINE_SIZES = (2, 4, 8)


def inherited_shapes(config: StageConfig, chain: Chain) -> Sequence[Architecture]:
    """Returns the shapes that a stage's input may have; empty if they are not known yet."""
    for search in ("candidates", "shapes"):
        if search in config.inputs:
            return chain.shapes.get(config.inputs[search], ())
    return [chain.shape_of(config.inputs.get("checkpoint") or config.inputs.get("student"))]


def smaller_settings(config: StageConfig) -> Iterator[dict[str, Any]]:
    """Yields changed settings that take less memory. The change with the least effect is first."""
    batch: dict[str, Any] = {"micro_batch_size": 1}
    precision = {"precision": "bf16-mixed"}
    pipelines = [{"pipeline_model_parallel_size": ranks} for ranks in PIPELINE_SIZES]
    both = {**precision, **batch}
    for change in (batch, precision, both, *pipelines, *({**p, **batch} for p in pipelines)):
        if all(hasattr(config, name) for name in change):
            yield change


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
    """A stage. Each module of this package has one as ``STAGE``, and defaults in ``conf/stage``."""

    config: type[ConfigT]
    kind: Kind
    """Type of its result."""
    run: Callable[[ConfigT, Inputs, Path], Outcome]
    """Runs the stage on every rank. The path is an empty directory for the artifact."""
    check: Callable[[ConfigT, Chain], Iterable[Problem]] = lambda config, chain: ()
    """Yields problems of the settings. It takes less than a second and does not import torch."""
    single_rank_reason: str = ""
    """Why it needs exactly one rank; empty if it supports several."""
    inputs: Mapping[str, Kinds] = field(default_factory=dict)
    """Required inputs, each with the types it may have."""
    optional_inputs: Mapping[str, Kinds] = field(default_factory=dict)
    """Optional inputs, each with the types it may have."""
    starts: tuple[str, ...] = ()
    """Stages that it starts; their code counts as its code in the fingerprint."""
    devices: Callable[[ConfigT], int] = lambda config: config.resources.devices
    """Devices per node that it needs, including the stages that it starts."""
    needs_torch: bool = True
    """Whether it imports torch. If not, torchrun does not start it."""
    needs_gpu: Callable[[ConfigT, Chain], bool] = lambda config, chain: True
    """Whether it uses GPUs. If not, its job and its container have none."""
    needs_tensorrt_llm: Callable[[ConfigT, Chain], bool] = lambda config, chain: False
    """Whether it runs TensorRT-LLM, which has its own image."""
    external: Callable[[ConfigT], Mapping[str, Path]] = lambda config: {}
    """Files outside the run that the result depends on."""
    disk_bytes: Callable[[ConfigT, Chain], int] = lambda config, chain: 0
    """Bytes on disk of its artifact and its temporary files."""
    shapes: Callable[[ConfigT, Chain], Sequence[Architecture]] = inherited_shapes
    """Architectures that its model may have, the largest first; by default those of its input."""
    workload: Callable[[ConfigT, Chain], Workload] | None = None
    """Returns its training, or the forward passes of its teacher, for plans."""
    inference_cost: Callable[[ConfigT, Chain], InferenceCost] | None = None
    """Returns its cost, for plans. A stage that has a ``workload`` or runs no model has none."""
    plans_workloads: bool = False
    """Whether it plans the whole chain: its settings then include all workloads."""
    cites_manifests: bool = False
    """Whether its result says which stale results the user accepted."""
    resolve_from_chain: Callable[[ConfigT, Chain], ConfigT] = lambda config, chain: config
    """Copies settings of other stages that the result depends on."""
    progress: Callable[[Path], str | None] = lambda work: None
    """Returns the progress of unfinished work, such as "step 50"; ``None`` without progress."""
    require_here: Callable[[ConfigT], None] = lambda config: None
    """Raises ``RecipeError`` if this machine lacks what the stage needs."""

    def image(self, config: ConfigT, chain: Chain) -> str | None:
        """Returns the container image that it runs in; ``None`` without a container."""
        return chain.image_of(config.stage, self.needs_tensorrt_llm(config, chain))

    def problems(self, config: ConfigT, chain: Chain) -> Iterator[Problem]:
        """Yields all problems of the stage's settings."""
        ranks = config.resources.ranks
        if self.single_rank_reason and ranks != 1:
            yield Problem(
                rules.ONE_RANK,
                f"{config.stage} has {ranks} ranks, but must have one: {self.single_rank_reason}",
                "set its resources.devices and resources.nodes to 1",
            )
        yield from self.check(config, chain)
        if self.workload is not None:
            yield from layout_problems(self.workload(config, chain), chain.hardware)

    def memory_problems(self, name: str, config: ConfigT, chain: Chain) -> Iterator[Problem]:
        """Yields a problem if a stage that does not train needs more memory than a rank has."""
        if self.inference_cost is None:
            return
        hardware, cost = chain.hardware, self.inference_cost
        available = hardware.memory_of_rank(config.resources.devices)
        needed = cost(config, chain).memory.total
        if needed <= available:
            return
        for settings in smaller_settings(config):
            if cost(replace(config, **settings), chain).memory.total <= available:
                if ranks := settings.get("pipeline_model_parallel_size"):
                    settings["resources.devices"] = ranks
                fix = " ".join(f"stages.{name}.{key}={value}" for key, value in settings.items())
                yield memory_problem(name, needed, available, hardware.name, f"set {fix}")
                return
        fix = "use a device with more memory"
        yield memory_problem(name, needed, available, hardware.name, fix)
