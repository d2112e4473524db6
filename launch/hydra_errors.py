"""Turns errors of Hydra and OmegaConf into messages with fixes; converts nodes to dataclasses."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, TypeVar

from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from launch.planned import stage_names
from launch.schema import choices, groups
from recipes.core.constraints import violations
from recipes.core.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SHOW_HELP = "recipe=NAME runs a recipe; --help shows recipes, fields and commands"
SHOW_FIELDS = "--cfg job shows every field and what it is set to"
DICT_KEY = re.compile(
    r"(?P<field>.*\.(env|images|mpi|inputs|num_fewshot|revisions|weights))\.(?P<key>.+)"
)
"""Matches a key of a dict field, such as ``cluster.env.WORD``. Hydra adds keys only after ``+``."""
HOME_TILDE = re.compile(r"(?<![^\[,\s])~(?=/|$)")
"""Matches a path's ``~`` at the start or after ``[``, a comma or a space. Hydra cannot parse it."""
ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


def as_typed(schema: type[ConfigT], node: DictConfig, where: str = "") -> ConfigT:
    """Converts a node of the config to the dataclass ``schema``; refuses invalid values.

    Messages have the node's dotted name ``where``, which is empty for the root.
    """
    try:
        typed: ConfigT = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key)
        name, message = f"{where}.{key}".strip("."), str(error).splitlines()[0]
        # Do not suggest the field itself: if its name is known, only its value is wrong.
        hint = did_you_mean(key, {field.name for field in fields(schema)} - {key})
        raise RecipeError(f"{name}: {message.rstrip('.')}.{hint}", fix_of(message)) from error
    if invalid := list(violations(typed, where)):
        raise RecipeError("\n".join(invalid), fix="")
    return typed


def refuse_unknown_fields(node: DictConfig, where: str) -> None:
    """Refuses fields that ``+FIELD=VALUE`` added to a dataclass, which would have no effect."""
    schema = OmegaConf.get_type(node)
    known = [field.name for field in fields(schema)] if is_dataclass(schema) else list(node)
    for name in map(str, node):
        if name not in known:
            hint = did_you_mean(name, known)
            raise RecipeError(f"there is no field {where}.{name}.{hint}", SHOW_FIELDS)
        # Skips missing values and interpolations, because reading them can fail.
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        if isinstance(child := node[name], DictConfig):
            refuse_unknown_fields(child, f"{where}.{name}")


def explain(error: Exception) -> str:
    """Returns the message and fix that the user sees for an error of Hydra, OmegaConf or YAML."""
    if isinstance(error, RecipeError):
        return str(error)
    if isinstance(error, YAMLError):
        return f"a config is not valid YAML: {error}\n  fix: correct this line"
    if isinstance(error, OverrideParseException):
        return _malformed_argument(error.override)
    messages = [str(cause) for cause in _causes(error)]
    text = "\n".join(messages)
    if message := _ambiguous_value(text) or _unknown_choice(text):
        return message
    # The two messages of OmegaConf for an unknown key.
    if unknown_key := re.search(r"Key '([^']+)' (?:is not in struct|not in '\w+')", text):
        name = unknown_key.group(1)
        full_key = re.search(r"full_key: (\S+)", text)
        where = full_key.group(1) if full_key else name
        return f"there is no field {where}.{_suggestion(where, name, error)}"
    message = "\n  ".join(messages[:2])  # the error and its direct cause
    return f"{message}\n  fix: {fix_of(message)}"


TYPE_FIXES = {
    "does not support deletion": "only stages, groups and keys of a mapping can be deleted with ~",
    "Union[int, float]": "use a whole number, or a fraction such as 0.75",
    "to Integer": "use a whole number",
    "to Float": "use a number",
    "valid bool": "use true or false",
    "not Optional": "give a value other than null",
    "to string": "give one string",
    "ListConfig": "give a list, such as [a,b]",
    "Dict": "give names with values, such as {a: 1}",
}
"""Fixes for values of a wrong type, by a substring of OmegaConf's message. The first match wins."""


def fix_of(message: str) -> str:
    """Returns the fix for a message of OmegaConf."""
    return next((fix for text, fix in TYPE_FIXES.items() if text in message), SHOW_FIELDS)


def _malformed_argument(argument: str) -> str:
    """Explains a command-line argument that Hydra cannot parse."""
    name, equals, value = argument.partition("=")
    if not equals:
        recipes = [f"recipe={recipe}" for recipe in choices("recipe")]
        hint = did_you_mean(f"recipe={argument}", recipes)
        return f"'{argument}' is neither FIELD=VALUE nor a command.{hint}\n  fix: {SHOW_HELP}"
    expanded = HOME_TILDE.sub(os.path.expanduser("~"), value)
    if expanded != value:
        fix = f"write out the home directory: {shlex.quote(f'{name}={expanded}')}"
    else:
        escaped = value.replace('"', '\\"')
        # A value that starts with "[" or "{" is a list or a mapping, whose items may need quotes.
        examples = {"[": '["a >= 1"]', "{": '{a: "b >= 1"}'}
        example = examples.get(value[:1], f'"{escaped}"')
        fix = f"quote text with special characters, such as {shlex.quote(f'{name}={example}')}"
    return f"the value of {name} cannot be parsed: {value}\n  fix: {fix}"


def _ambiguous_value(text: str) -> str | None:
    """Explains a value with commas outside a sweep; ``None`` for other errors."""
    if not (ambiguous := re.search(r"Ambiguous value for argument '(.*)'\n", text)):
        return None
    name, _, value = ambiguous.group(1).partition("=")
    sweep = "-m starts one run for each value"
    as_list = shlex.quote(f"{name}=[{value}]")
    # A config group has a single choice, so a list would be invalid.
    fix = sweep if name in groups() else f"{as_list} for a list; {sweep}"
    return f"{name} has several values.\n  fix: {fix}"


def _unknown_choice(text: str) -> str | None:
    """Explains an unknown group, or an unknown choice of a group; ``None`` for other errors."""
    if unused := re.search(r"Could not override '(\w+)'. No match in the defaults list", text):
        group = unused.group(1)
        return f"this recipe has no {group}.\n  fix: leave out {group}=…"
    if unknown_group := re.search(r"config group '([\w/]+)' does not exist", text):
        return _unknown_group(unknown_group.group(1))
    # For example, "Could not find 'model/gpt5'": the group is model.
    if choice := re.search(r"Could not (?:find|load) '([\w/]+)/([^'/]+)'", text):
        group, name = choice.groups()
        options = choices(group)
        if not options:
            return _unknown_group(group)
        hint = did_you_mean(name, options)
        return f"there is no {group} '{name}'.{hint}\n  fix: use one of: {', '.join(options)}"
    return None


def _unknown_group(group: str) -> str:
    """Explains an unknown group, such as ``stage/prun``; suggests a stage with a similar name."""
    hint = did_you_mean(group.rpartition("/")[2], stage_names())
    return f"there is no config group '{group}'.{hint}\n  fix: {SHOW_FIELDS}"


def _suggestion(where: str, name: str, error: Exception) -> str:
    """Returns the end of a message about an unknown field: a similar name, or a fix.

    ``where`` is the field's dotted name, and ``name`` its last key.
    """
    if where in stage_names():
        return f" Did you mean 'stages.{where}'?"
    # Causes may hold the node that lacks the field.
    nodes = (getattr(cause, "parent_node", None) for cause in _causes(error))
    parents = [node for node in nodes if isinstance(node, DictConfig)]
    # The field is at the config's root, but the user gave it a prefix, as in stages.only.
    if any(name in parent._get_root() for parent in parents):
        return f" Did you mean '{name}'?"
    # For example, '+cluster.env={WORD: …}' adds the key WORD to the dict cluster.env.
    new_key = DICT_KEY.fullmatch(where)
    fix = f"'+{new_key['field']}={{{new_key['key']}: …}}' adds it" if new_key else SHOW_FIELDS
    siblings = [str(key) for parent in parents for key in parent]
    # These two dicts have stages as keys, so an unknown key is probably a misspelled stage.
    if where.startswith(("cluster.images.", "cluster.mpi.")) and name not in stage_names():
        siblings, fix = [*siblings, *stage_names()], SHOW_FIELDS
    # If ``where`` has only one key, it may also be a misspelled config group.
    hint = did_you_mean(name, [*siblings, *(groups() if where == name else ())])
    return hint or f"\n  fix: {fix}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
