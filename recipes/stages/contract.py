"""What a stage is: one description, which the launcher plans by and the worker runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from nemo_convert.architecture import Architecture
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, StageConfig
from recipes.core.worker import stage_main
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.inference_cost import InferenceCost
from recipes.planning.limits import memory_problem
from recipes.planning.parallelism import layout_problems
from recipes.planning.problems import Problem
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
    "speed_results",
    "shapes",
    "latency_model",
    "search_results",
    "report",
]
"""What a stage makes."""
Kinds = tuple[Kind, ...]

PIPELINE_SIZES = (2, 4, 8)


def inherited_shapes(config: StageConfig, chain: Chain) -> Sequence[Architecture]:
    """Returns the shapes of a stage's input, as far as they are known before it runs."""
    for search in ("candidates", "shapes"):
        if search in config.inputs:
            return chain.shapes.get(config.inputs[search], ())
    return [chain.shape_of(config.inputs.get("checkpoint") or config.inputs.get("student"))]


def smaller_settings(config: StageConfig) -> Iterator[dict[str, Any]]:
    """Yields settings that take less memory, those that change a stage least first."""
    one: dict[str, Any] = {"micro_batch_size": 1}
    half = {"precision": "bf16-mixed"}
    split = [{"pipeline_model_parallel_size": ranks} for ranks in PIPELINE_SIZES]
    for change in (one, half, {**half, **one}, *split, *({**s, **one} for s in split)):
        if all(hasattr(config, name) for name in change):
            yield change


def checkpoint_outcome(result: DataclassInstance | None, checkpoint: Path) -> Outcome:
    """Returns the outcome of a stage that wrote a NeMo checkpoint.

    Args:
        result: The stage's result; ``None`` on ranks that have none.
        checkpoint: A NeMo checkpoint with the architecture and tokenizer of the result.
    """
    from nemo_convert import hf, nemo

    arch = nemo.architecture_of(checkpoint)
    tokenizer = hf.tokenizer_sha256(nemo.side_files(checkpoint))
    return Outcome(result, arch.as_dict(), arch.parameters(), tokenizer)


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[ConfigT]):
    """A stage: ``STAGE`` of each module beside this one, named as its folder in ``conf/stage``.

    Started as ``[torchrun] -m recipes.stages.<stage> --config <stage directory>/config.yaml``;
    ranks never compose.
    """

    config: type[ConfigT]
    kind: Kind
    """What it makes."""
    run: Callable[[ConfigT, Inputs, Path], Outcome]
    """Does the work, on every rank, and writes the artifact below a directory that is empty."""
    check: Callable[[ConfigT, Chain], Iterable[Problem]] = lambda config, chain: ()
    """Finds in a second, and without torch, what would fail after an hour."""
    one_rank: str = ""
    """Why it has work for one process only; empty if several can share it."""
    inputs: Mapping[str, Kinds] = field(default_factory=dict)
    """Kinds that each input may be of."""
    optional_inputs: Mapping[str, Kinds] = field(default_factory=dict)
    """Inputs that a recipe may leave out."""
    starts: tuple[str, ...] = ()
    """Stages that it starts as processes of their own, whose code is then a part of its own."""
    needs_torch: bool = True
    """Without it, no torchrun starts the stage where it starts every other one."""
    needs_gpu: Callable[[ConfigT, Chain], bool] = lambda config, chain: True
    """Whether it uses GPUs where there are some; without, its job and its container get none."""
    external: Callable[[ConfigT], Mapping[str, Path]] = lambda config: {}
    """Files from outside of the run that the result depends on."""
    disk_bytes: Callable[[ConfigT, Chain], int] = lambda config, chain: 0
    """What its artifact, and what it keeps meanwhile, take on the disk."""
    shapes: Callable[[ConfigT, Chain], Sequence[Architecture]] = inherited_shapes
    """Shapes that its model may have, the largest first; by default those of its input."""
    workload: Callable[[ConfigT, Chain], Workload] | None = None
    """The training or teacher's pass over a text, for plans."""
    inference_cost: Callable[[ConfigT, Chain], InferenceCost] | None = None
    """Its cost, for plans, if it runs models and trains none."""
    plans_workloads: bool = False
    """Its result is about the chain's workloads, which are checked with it."""
    resolve_from_chain: Callable[[ConfigT, Chain], ConfigT] = lambda config, chain: config
    """Puts into its settings what its result depends on of others'."""
    progress: Callable[[Path], str | None] = lambda work: None
    """How far unfinished work has come ("step 50"); ``None`` if there is nothing to lose."""
    require_here: Callable[[ConfigT], None] = lambda config: None
    """Raises ``RecipeError`` where this machine lacks what the stage needs."""

    def problems(self, config: ConfigT, chain: Chain) -> Iterator[Problem]:
        """Everything that is wrong with its settings."""
        ranks = config.resources.ranks
        if self.one_rank and ranks != 1:
            yield Problem(
                rules.ONE_RANK,
                f"{config.stage} runs on one rank: {self.one_rank}",
                "set its resources.devices and resources.nodes to 1",
            )
        yield from self.check(config, chain)
        if self.workload is not None:
            yield from layout_problems(self.workload(config, chain), chain.hardware)

    def memory_problems(self, name: str, config: ConfigT, chain: Chain) -> Iterator[Problem]:
        """Compares the memory of a stage that trains nothing with that of a rank."""
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

    def main(self) -> None:
        """Entry point of the stage's own process."""
        stage_main(self.run, self.config, self.kind)
