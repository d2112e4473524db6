"""Hydra's and OmegaConf's errors as one message with the nearest valid name."""

from __future__ import annotations

import re
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.planned import stage_names
from recipes.core.errors import RecipeError, did_you_mean
from recipes.planning.rules import REFUSED_FIELDS

ConfigT = TypeVar("ConfigT")


def as_typed(schema: type[ConfigT], node: DictConfig, where: str) -> ConfigT:
    """A config's node as the dataclass that it must be.

    Raises:
        RecipeError: A field is not known, or its value is of another type.
    """
    try:
        typed: ConfigT = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or getattr(error, "key", ""))
        near = did_you_mean(key, OmegaConf.structured(schema))
        raise RecipeError(f"{where}.{key}: {str(error).splitlines()[0]}.{near}") from error
    return typed


def explain(error: Exception) -> str:
    """Returns what to tell the user about an error."""
    if isinstance(error, RecipeError):
        return str(error)
    text = "\n".join(_chain_of(error))
    if missing := re.search(r"config group '([\w/]+)' does not exist", text):
        return _no_group(missing.group(1))
    if choice := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        group, name = choice.groups()
        options = _options(text)
        if not options:
            return _no_group(group)
        hint = did_you_mean(name, options)
        return f"there is no {group} '{name}'.{hint}\n  fix: use one of: {', '.join(options)}"
    if key := re.search(r"Key '([^']+)' is not in struct|Key '([^']+)' not in '(\w+)'", text):
        name = key.group(1) or key.group(2)
        full = re.search(r"full_key: (\S+)", text)
        where = full.group(1) if full else name
        if rule := REFUSED_FIELDS.get(name):
            return f"there is no field {where}: {rule.reason}.\n  fix: leave it out   [{rule.name}]"
        return f"there is no field {where}.{did_you_mean(name, _fields(error))}"
    if unread := re.search(r"LexerNoViableAltException: ([\w.]+)=(.*)", text):
        return (
            f"the value of {unread.group(1)} cannot be read: {unread.group(2)}\n"
            f"  fix: quote each text that has signs in it, such as '{unread.group(1)}=[\"a >= 1\"]'"
        )
    return "\n  ".join(_chain_of(error)[:2])


def _no_group(group: str) -> str:
    """A whole group is not there, such as a stage of another name."""
    return f"there is no {group}.{did_you_mean(group.rpartition('/')[2], stage_names())}"


def _chain_of(error: BaseException | None) -> list[str]:
    """The messages of an error and its causes, the outermost first."""
    texts: list[str] = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return texts


def _options(text: str) -> list[str]:
    listed = re.search(r"Available options in '[^']*':\n((?:\t[^\n]*\n?)+)", text)
    names = listed.group(1).split() if listed else []
    return [name for name in names if name != "schema"]


def _fields(error: BaseException | None) -> list[str]:
    """Valid names beside a wrong key, from the node that refused it."""
    names: list[str] = []
    while error is not None:
        parent = getattr(error, "parent_node", None)
        if parent is not None and hasattr(parent, "keys"):
            names += [str(key) for key in parent]
        error = error.__cause__ or error.__context__
    return names
