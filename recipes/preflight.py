"""What a stage's ``check`` sees, and what it says: rules that need no torch and take no time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from recipes.architecture import Architecture, pruned, read_architecture
from recipes.errors import RecipeError
from recipes.sources import read_hf_config
from recipes.stage import StageConfig


@dataclass(frozen=True)
class Problem:
    """A rule that a recipe breaks: its name, what is wrong, and how to fix it."""

    rule: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}   [{self.rule}]"


@dataclass(frozen=True)
class Chain:
    """The whole chain, as far as it is known before anything runs."""

    hf_path: str
    teacher: Architecture
    stages: Mapping[str, StageConfig]

    def shape_of(self, stage: str | None) -> Architecture:
        """Shape of the model that a stage makes: the teacher's, unless it prunes."""
        config = self.stages.get(stage or "")
        targets = getattr(config, "targets", None)
        return pruned(self.teacher, targets()) if targets else self.teacher

    def pruned_by(self, config: StageConfig) -> str | None:
        """The stage that pruned the model which a later stage gets; ``None`` for the teacher."""
        before: StageConfig | None = config
        while before is not None:
            name = before.inputs.get("checkpoint") or before.inputs.get("student")
            before = self.stages.get(name or "")
            if hasattr(before, "targets"):
                return name
        return None


def window_problems(seq_length: int, chain: Chain) -> Iterator[Problem]:
    """Checks a window's length against the teacher's positions."""
    limit = chain.teacher.max_position_embeddings
    if not 1 <= seq_length <= limit:
        yield Problem(
            "seq-length",
            f"seq_length={seq_length} is not between 1 and the teacher's {limit} positions",
            f"set data.seq_length to at most {limit}",
        )


def one_rank_problems(config: StageConfig, reason: str) -> Iterator[Problem]:
    """Refuses more than one process for a stage that has work for one."""
    if config.resources.nodes * config.resources.devices != 1:
        yield Problem(
            "one-rank",
            f"{config.stage} runs on one rank: {reason}",
            "set its resources.devices and resources.nodes to 1",
        )


def read_chain(hf_path: str, stages: Mapping[str, StageConfig]) -> Chain:
    """Reads the teacher's shape from its ``config.json``.

    Raises:
        RecipeError: There is no usable teacher.
    """
    teacher = read_architecture(read_hf_config(hf_path), hf_path)
    return Chain(hf_path, teacher, stages)


def require_none(problems: Iterable[Problem]) -> None:
    """Raises one ``RecipeError`` that lists all problems, if there are any."""
    found = [str(problem) for problem in problems]
    if found:
        raise RecipeError("\n".join(found))
