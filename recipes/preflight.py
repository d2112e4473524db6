"""What a stage's ``check`` sees, and what it says: rules that need no torch and take no time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recipes.architecture import Architecture, pruned, read_architecture
from recipes.errors import RecipeError
from recipes.hardware import Hardware
from recipes.manifest import read_manifest
from recipes.rules import ERROR, RULES, Rule
from recipes.sources import read_or_recall_config
from recipes.stage import StageConfig


@dataclass(frozen=True)
class Problem:
    """A rule that a recipe breaks: its name, what is wrong, and how to fix it."""

    rule: str
    what: str
    fix: str

    @property
    def severity(self) -> str:
        """``error`` or ``warning``, as the table of rules has it."""
        return self._known.severity

    @property
    def reference(self) -> str:
        """Where others met it: issues or a paper; empty if nowhere known."""
        return self._known.reference

    @property
    def _known(self) -> Rule:
        return RULES.get(self.rule, Rule(self.rule, ""))

    def __str__(self) -> str:
        see = f"\n  see: {self.reference}" if self.reference else ""
        return f"{self.what}\n  fix: {self.fix}   [{self.rule}]{see}"


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
    time_limit: str | None = None
    """What a job may take, as Slurm writes it; none by default."""
    recalled: bool = False
    """The teacher's shape is the one bundled here, since its config.json is out of reach."""

    def shape_of(self, stage: str | None) -> Architecture:
        """Shape of the model that a stage makes: the teacher's, unless it prunes.

        Of another run's stage it is in the manifest.
        """
        config = self.stages.get(stage or "")
        if config is None and stage and Path(stage).is_dir():
            manifest = read_manifest(Path(stage))
            if manifest is not None and manifest.architecture is not None:
                return Architecture(**manifest.architecture)
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
    config, recalled = read_or_recall_config(hf_path)
    return Chain(hf_path, read_architecture(config, hf_path), stages, recalled=recalled)


def require_none(problems: Iterable[Problem], waived: Collection[str] = ()) -> tuple[Problem, ...]:
    """Raises one ``RecipeError`` that lists all errors, if there are any.

    Args:
        problems: What was found.
        waived: Rules whose errors do not stop the run.

    Returns:
        What was found and does not stop the run.
    """
    found = tuple(dict.fromkeys(problems))
    stopping = [str(p) for p in found if p.severity == ERROR and p.rule not in waived]
    if stopping:
        raise RecipeError("\n".join(stopping))
    return found
