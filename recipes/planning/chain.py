"""What a stage's ``check`` sees: the whole chain before anything runs. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import read_architecture
from recipes.core.manifest import manifest_of
from recipes.core.stage import StageConfig
from recipes.data.settings import PrepareDataConfig
from recipes.planning import rules
from recipes.planning.hardware import Hardware
from recipes.planning.inference_cost import InferenceCost
from recipes.planning.problems import Problem
from recipes.planning.published_configs import read_config_or_published
from recipes.planning.workload import Workload


@dataclass(frozen=True)
class Chain:
    """The whole chain, as far as it is known before anything runs."""

    hf_path: str
    teacher: Architecture
    stages: Mapping[str, StageConfig]
    hardware: Hardware = field(default_factory=Hardware)
    run_dir: Path | None = None
    """Directory with the results of an earlier run of this chain."""
    runs_here: bool = False
    """Whether its stages are processes of this machine, in this environment."""
    images: Mapping[str, str | None] = field(default_factory=dict)
    """Image by stage module, ``default`` for all others."""
    time_limit: str = ""
    """Time limit of a job, in Slurm's format; none by default."""
    from_published_config: bool = False
    """Whether the teacher's shape is the bundled one, because config.json cannot be read."""
    shapes: Mapping[str, Sequence[Architecture]] = field(default_factory=dict)
    """Shapes that the model of each stage may have, the largest first. Empty for a search that
    measures before it lists them."""
    workloads: Mapping[str, Workload] = field(default_factory=dict)
    """Each training and each teacher's pass over a text, by stage, once all checks have passed."""
    inference_costs: Mapping[str, InferenceCost] = field(default_factory=dict)
    """Of each other stage that runs models, once all checks have passed."""

    def image_of(self, module: str) -> str | None:
        """Returns the image that a stage module runs in; ``None`` outside of containers."""
        return self.images.get(module, self.images.get("default"))

    def shape_of(self, stage: str | None) -> Architecture:
        """Returns the largest shape that a stage's model may have; the teacher's if unknown."""
        if stage is None:
            return self.teacher
        if stage in self.stages:
            return next(iter(self.shapes.get(stage, ())), self.teacher)
        manifest = manifest_of(stage)
        if manifest is None or manifest.architecture is None:
            return self.teacher
        return Architecture(**manifest.architecture)


def sequence_problems(seq_length: int, chain: Chain) -> Iterator[Problem]:
    """Checks a sequence's length against the teacher's positions, and against conversations."""
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
                f"seq_length={seq_length}, but {name} keeps conversations whole in sequences of "
                f"{config.seq_length}",
                "set data.seq_length, which all stages take",
            )


def read_chain(hf_path: str, stages: Mapping[str, StageConfig]) -> Chain:
    """Reads the teacher's shape from its ``config.json``; refuses an unusable one."""
    config, published = read_config_or_published(hf_path)
    shape = read_architecture(config, hf_path)
    return Chain(hf_path, shape, stages, from_published_config=published)
