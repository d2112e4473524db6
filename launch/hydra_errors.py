"""Hydra's and OmegaConf's errors as one message with the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.planned import stage_names
from recipes.core.constraints import violations
from recipes.core.errors import RecipeError, did_you_mean
from recipes.core.files import REPO_ROOT
from recipes.planning.rules import REFUSED_FIELDS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CHOICE = re.compile(r"(?!(null|true|false|nan|inf)$)[a-z]\w*(,[a-z]\w*)*", re.IGNORECASE)
"""A name of a group, or several for a sweep; Hydra reads some words as values."""
SHOW_HELP = "recipe=NAME runs a recipe; --help shows recipes, fields and commands"
SHOW_FIELDS = "--cfg job shows every field and what it is set to"
NAMES = re.compile(r"(?P<field>.*\.(env|images|mpi|inputs|num_fewshot|revisions))\.(?P<name>.+)")
"""A field of names that a user chooses, which Hydra takes for a mistake."""
ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


def as_typed(schema: type[ConfigT], node: DictConfig, where: str = "") -> ConfigT:
    """A config's node, at ``where`` in the whole, as a dataclass; refuses what does not fit it."""
    try:
        typed: ConfigT = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or getattr(error, "key", ""))
        name, said = f"{where}.{key}".strip("."), str(error).splitlines()[0]
        near = did_you_mean(key, {part.name for part in fields(schema)} - {key})
        raise RecipeError(f"{name}: {said.rstrip('.')}.{near}", fix_of(said)) from error
    if wrong := list(violations(typed, where)):
        raise RecipeError("\n".join(wrong), fix="")
    return typed


def require_choices(words: Iterable[str]) -> None:
    """Refuses ``cluster=null`` and the like, which Hydra ends with a traceback on."""
    groups = {folder.name for folder in (REPO_ROOT / "conf").iterdir() if folder.is_dir()}
    for word in words:
        group, _, choice = word.partition("=")
        if group in groups and not CHOICE.fullmatch(choice):
            own = f"model.hf_path={choice} for a folder or a hub id; " if group == "model" else ""
            raise RecipeError(f"{word} names no {group}.", f"{own}--help lists them all")


def explain(error: Exception) -> str:
    """Returns what to tell the user about an error."""
    if isinstance(error, RecipeError):
        return str(error)
    messages = [str(cause) for cause in _causes(error)]
    text = "\n".join(messages)
    if unread := _unread(text):
        return unread
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
        return f"there is no field {where}.{_nearest(where, name, error)}"
    said = "\n  ".join(messages[:2])
    return f"{said}\n  fix: {fix_of(said)}"


TYPES = {
    "Union[int, float]": "use a whole number, or a share such as 0.75",
    "to Integer": "use a whole number",
    "to Float": "use a number",
    "valid bool": "use true or false",
    "not Optional": "give a value; null is none",
    "to string": "give one text",
    "ListConfig": "give a list, such as [a,b]",
    "Dict": "give names with values, such as {a: 1}",
}
"""What OmegaConf says of a value of another type, and what to do about it."""


def fix_of(said: str) -> str:
    """How to mend what OmegaConf complains of."""
    return next((fix for sign, fix in TYPES.items() if sign in said), SHOW_FIELDS)


def _unread(text: str) -> str | None:
    """What is wrong with a word of the command line that Hydra cannot read; ``None`` if it can."""
    if bare := re.search(r"Error parsing override '([^'=]+)'\nmissing EQUAL", text):
        recipes = (f"recipe={file.stem}" for file in (REPO_ROOT / "conf/recipe").glob("*.yaml"))
        hint = did_you_mean(f"recipe={bare.group(1)}", recipes)
        return f"'{bare.group(1)}' is neither FIELD=VALUE nor a command.{hint}\n  fix: {SHOW_HELP}"
    if value := re.search(r"LexerNoViableAltException: ([\w.]+)=(.*)", text):
        name, given = value.groups()
        return (
            f"the value of {name} cannot be read: {given}\n"
            f"  fix: quote each text that has signs in it, such as '{name}=[\"a >= 1\"]'"
        )
    return None


def _no_group(group: str) -> str:
    """A whole group is not there, such as a stage of another name."""
    return f"there is no {group}.{did_you_mean(group.rpartition('/')[2], stage_names())}"


def _nearest(where: str, name: str, error: Exception) -> str:
    if where in stage_names():
        return f" Did you mean 'stages.{where}'?"
    own = NAMES.fullmatch(where)
    fix = f"'+{own['field']}={{{own['name']}: …}}' adds it" if own else SHOW_FIELDS
    return did_you_mean(name, _fields(error)) or f"\n  fix: {fix}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _options(text: str) -> list[str]:
    listed = re.search(r"Available options in '[^']*':\n((?:\t[^\n]*\n?)+)", text)
    names = listed.group(1).split() if listed else []
    return [name for name in names if name != "schema"]


def _fields(error: BaseException) -> list[str]:
    """Valid names beside a wrong key, from the node that refused it."""
    parents = (getattr(cause, "parent_node", None) for cause in _causes(error))
    return [str(key) for parent in parents if isinstance(parent, DictConfig) for key in parent]
