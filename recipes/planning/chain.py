"""What a stage's ``check`` sees: the whole chain before anything runs. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import read_architecture
from recipes.core.manifest import manifest_of
from recipes.core.stage import StageConfig
from recipes.data.settings import PrepareDataConfig
from recipes.planning import rules
from recipes.planning.hardware import Hardware
from recipes.planning.problems import Problem
from recipes.planning.published_configs import read_config_or_published
from recipes.planning.reading import Estimates
from recipes.planning.targets import PruneTargets, pruned
from recipes.planning.workload import Workload


@runtime_checkable
class Prunes(Protocol):
    """The config of a stage that makes a model smaller."""

    inputs: dict[str, str]

    def targets(self, teacher: Architecture) -> PruneTargets:
        """What a teacher is pruned to."""

    def on_the_way(self, before: Architecture, student: Architecture) -> Architecture:
        """What is cut to for a student, of what there is before it."""


@runtime_checkable
class ListsShapes(Protocol):
    """The config of a stage that lists the shapes within a budget."""

    def shapes(self, teacher: Architecture) -> list[Architecture]:
        """Those of a teacher, the largest first."""


@runtime_checkable
class ReadsModel(Protocol):
    """The config of a stage that reads a Hugging Face model."""

    hf_path: str


@dataclass(frozen=True)
class Chain:
    """The whole chain, as far as it is known before anything runs."""

    hf_path: str
    teacher: Architecture
    stages: Mapping[str, StageConfig]
    hardware: Hardware = field(default_factory=Hardware)
    """What the stages run on."""
    run_dir: Path | None = None
    """Where results of this chain are, if it has run before."""
    runs_here: bool = False
    """Its stages are processes of this machine, in this environment."""
    time_limit: str = ""
    """What a job may take, as Slurm writes it; none by default."""
    from_published_config: bool = False
    """The teacher's shape is the one bundled here, since its config.json is out of reach."""
    workloads: Mapping[str, Workload] = field(default_factory=dict)
    """Every training, and every pass of a teacher over its text, by stage; known once all checks
    have passed."""
    readings: Mapping[str, Estimates] = field(default_factory=dict, compare=False)
    """What stages take that only run models forward; known once all checks have passed."""

    def shape_of(self, stage: str | None) -> Architecture:
        """Shape of the model that a stage makes, of another run's by its manifest."""
        config = self.stages.get(stage or "")
        manifest = manifest_of(stage) if config is None else None
        if manifest is not None and manifest.architecture is not None:
            return Architecture(**manifest.architecture)
        if isinstance(config, Prunes):
            return self.student_of(config)
        before = self.pruned_by(config) if config is not None else None
        return self.teacher if before is None else self.shape_of(before)

    def student_of(self, config: Prunes) -> Architecture:
        """Shape of what a stage prunes with such settings.

        Where a search of this run is still to choose it, that is the largest within its budget, so
        that what is planned is the most that it may take; where that waits for latencies, the
        teacher's.
        """
        search, before = config.inputs.get("shape"), self.shape_of(config.inputs.get("checkpoint"))
        if search is None:
            student = pruned(before, config.targets(self.teacher))
        else:
            student = next(iter(self.shapes_within(search)), self.shape_of(search))
        return config.on_the_way(before, student)

    def shapes_within(self, search: str | None) -> list[Architecture]:
        """Shapes that a search of this run chooses from, as far as they are known before it runs.

        The largest first; none for another run's search, and where latencies are to be measured.
        """
        config = self.stages.get(search or "")
        while config is not None and not isinstance(config, ListsShapes):
            before = config.inputs.get("candidates") or config.inputs.get("shapes")
            config = self.stages.get(before or "")
        if config is None or "latency" in config.inputs:
            return []
        return config.shapes(self.teacher)

    def pruned_by(self, config: StageConfig) -> str | None:
        """The stage that pruned the model which a later stage gets; ``None`` for the teacher."""
        before: StageConfig | None = config
        while before is not None:
            name = before.inputs.get("checkpoint") or before.inputs.get("student")
            before = self.stages.get(name or "")
            if isinstance(before, Prunes):
                return name
        return None


def window_problems(seq_length: int, chain: Chain) -> Iterator[Problem]:
    """Checks a window's length against the teacher's positions, and against conversations."""
    limit = chain.teacher.max_position_embeddings
    if not 1 <= seq_length <= limit:
        yield Problem(
            rules.SEQ_LENGTH,
            f"seq_length={seq_length} is not between 1 and the teacher's {limit} positions",
            f"set data.seq_length to at most {limit}",
        )
    for name, config in chain.stages.items():
        if not (isinstance(config, PrepareDataConfig) and config.chats()):
            continue
        if config.seq_length != seq_length:
            yield Problem(
                rules.CHAT,
                f"seq_length={seq_length}, but {name} keeps conversations whole in windows of "
                f"{config.seq_length}",
                "set data.seq_length, which all stages take",
            )


def read_chain(hf_path: str, stages: Mapping[str, StageConfig]) -> Chain:
    """Reads the teacher's shape from its ``config.json``; refuses an unusable one."""
    config, published = read_config_or_published(hf_path)
    shape = read_architecture(config, hf_path)
    return Chain(hf_path, shape, stages, from_published_config=published)
