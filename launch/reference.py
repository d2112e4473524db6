"""``python -m launch.reference`` writes ``docs/configuration.md``: tables of choices and fields."""

from __future__ import annotations

import ast
import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MinLen
from omegaconf import OmegaConf
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from launch.executors.docker import DockerConfig
from launch.executors.local import LocalConfig
from launch.executors.slurm import SlurmConfig
from launch.planned import load_stage, stage_names
from launch.schema import CONF, OPTIONAL_GROUPS, groups
from launch.settings import RunSettings
from recipes.core.constraints import INT32, Requirement
from recipes.core.files import REPO_ROOT, write_text_atomically
from recipes.core.stage import StageConfig
from recipes.distillation.settings import TrainingConfig
from recipes.planning.hardware import Hardware

PAGE = REPO_ROOT / "docs" / "configuration.md"
MARKER = "<!-- From here on: python -m launch.reference -->\n"
TYPE_NAMES = {int: "integer", float: "number", str: "string", bool: "true or false"}
COMPARISON_SIGNS: dict[type, str] = {Gt: ">", Ge: "≥", Lt: "<", Le: "≤"}
MAX_NAMES = 12
"""Maximum number of allowed names that the table lists for a field."""


def page() -> str:
    """Returns the page: the hand-written text above ``MARKER``, and new tables below it."""
    above, marker, _ = PAGE.read_text(encoding="utf-8").partition(MARKER)
    return "\n".join([above + marker, *_sections()])


def _sections() -> Iterator[str]:
    """Yields the headings, sentences and tables of the page below ``MARKER``."""
    yield "## Groups\n"
    optional = ", ".join(f"`{group}=null`" for group in OPTIONAL_GROUPS)
    yield f"Each of {optional} leaves out its group.\n"
    yield _table(("choice", "what it is"), _choices())
    yield "## The run\n"
    yield "These settings are at the root of the config.\n"
    yield _fields(RunSettings)
    yield "## Every stage\n"
    yield "These settings are below `stages.NAME`.\n"
    yield _fields(StageConfig)
    yield "## Every training stage\n"
    yield "`distill`, `correct_teacher` and the trainings of `successive_halving` have them.\n"
    yield _fields(TrainingConfig, without=StageConfig)
    for name in stage_names():
        yield from _stage(name)
    yield "## hardware\n"
    yield "A device profile such as `hardware=h100`; a file in `conf/hardware` sets most fields.\n"
    yield _fields(Hardware)
    for cluster in (LocalConfig, DockerConfig, SlurmConfig):
        yield f"## cluster={cluster.executor}\n"
        yield _fields(cluster, _yaml(f"cluster/{cluster.executor}.yaml"))


def _choices() -> Iterator[tuple[str, str]]:
    """Yields each choice of a group, and what it is: its file's first sentence, or its values."""
    folders = [CONF / group for group in groups() if group != "recipe"]
    for file in sorted(file for folder in folders for file in folder.glob("*.yaml")):
        # Comments such as "# @package stages" are for Hydra.
        comments = re.findall(r"^# (?!@)(.+)", file.read_text(encoding="utf-8"), re.M)
        values = _yaml(f"{file.parent.name}/{file.name}")
        text_of_values = ", ".join(f"{name}: {value}" for name, value in values.items())
        text = " ".join(comments) or f"`{text_of_values}`"
        # A sentence ends with a period after a word or a parenthesis.
        first_sentence = re.split(r"(?<=[\w)])\.(?= |$)", text)[0]
        yield f"`{file.parent.name}={file.stem}`", first_sentence


def _yaml(name: str) -> dict[str, Any]:
    """Returns the content of a YAML file in ``conf``, with unresolved interpolations."""
    return typing.cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(CONF / name)))


def _stage(name: str) -> Iterator[str]:
    """Yields the heading, summary and table of a stage."""
    stage = load_stage(name)
    summary = (import_module(f"recipes.stages.{name}").__doc__ or "").strip().splitlines()[0]
    inputs = [*stage.inputs, *(f"{key} (optional)" for key in stage.optional_inputs)]
    yield f"## {name}\n"
    yield f"{summary} Artifact: `{stage.kind}`; inputs: {', '.join(inputs) or 'none'}.\n"
    # If a stage has several files, default.yaml is the first in the order of their names.
    [file, *_] = sorted((CONF / "stage" / name).glob("*.yaml"))
    values = _yaml(f"stage/{name}/{file.name}")
    if not issubclass(stage.config, TrainingConfig):
        yield _fields(stage.config, values, without=StageConfig)
        return
    # Fields that all training stages have, and other stages do not have.
    shared = {f.name for f in fields(TrainingConfig)} - {f.name for f in fields(StageConfig)}
    defaults = ", ".join(f"`{key}: {_value(values[key])}`" for key in values if key in shared)
    yield f"The fields of every training stage, with {defaults}, and:\n"
    yield _fields(stage.config, values, without=TrainingConfig)


def _fields(
    dataclass: type, values: Mapping[str, Any] | None = None, without: type | None = None
) -> str:
    """Returns a table of a dataclass's fields, but not of those of the base class ``without``.

    ``values`` has values from a YAML file, which replace the dataclass's defaults.
    """
    rows = list(_rows(dataclass, values or {}, without=without))
    return _table(("field", "type", "default", "meaning"), rows) if rows else "No other fields.\n"


def _rows(
    dataclass: type, values: Mapping[str, Any], prefix: str = "", without: type | None = None
) -> Iterator[tuple[str, ...]]:
    """Yields name, type, default and meaning of each field, also in nested dataclasses.

    ``prefix`` is the dotted name of a nested dataclass, with a final dot.
    """
    hints, meanings = typing.get_type_hints(dataclass, include_extras=True), _meanings(dataclass)
    skipped = {field.name for field in fields(without)} if without else set()
    for field in fields(dataclass):
        if field.name in skipped:
            continue
        hint, name = hints[field.name], prefix + field.name
        # A field that holds the settings of a stage is not expanded: that stage has its own table.
        if isinstance(hint, type) and is_dataclass(hint) and not issubclass(hint, StageConfig):
            yield from _rows(hint, values.get(field.name, {}), f"{name}.")
            continue
        default = field.default
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        dagger = " †" if field.metadata.get("resource") else ""  # explained above ``MARKER``
        value = _value(values.get(field.name, default))
        yield f"`{name}`{dagger}", _type(hint), f"`{value}`", meanings[field.name]


def _meanings(dataclass: type) -> dict[str, str]:
    """Returns the docstring of each field (the string after the field), also if it is inherited."""
    meanings = {}
    # Base classes first, because a subclass may replace the docstring of an inherited field.
    for base in filter(is_dataclass, reversed(dataclass.__mro__)):
        [tree] = ast.parse(inspect.getsource(base)).body
        assert isinstance(tree, ast.ClassDef)
        for statement_pair in pairwise(tree.body):
            match statement_pair:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    meanings[name] = " ".join(text.replace("``", "`").split())
    return meanings


def _value(value: object) -> str:
    """Formats a default as YAML; returns "…" for a dataclass and for a field without a default."""
    if is_dataclass(value) or value is MISSING:
        return "…"
    if isinstance(value, str) and value.startswith(("$", "?")):
        return value  # without quotes: an interpolation, or ``???`` for a missing value
    return json.dumps(value)


def _type(hint: Any) -> str:
    arguments = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Annotated:
            base, *constraints = arguments
            texts = [text for constraint in constraints for text in _allowed(constraint)]
            # The text of an AfterValidator already implies the base type.
            if not isinstance(constraints[0], AfterValidator):
                texts.insert(0, _type(base))
            return " ".join(texts)
        case typing.Union | types.UnionType:
            return " or ".join(map(_type, arguments))
        case origin if origin is list:
            return f"list of {_type(arguments[0])}"
        case origin if origin is dict:
            return f"mapping of names to {_type(arguments[1])}"
    if hint is type(None):
        return "null"
    return TYPE_NAMES.get(hint, "fields" if is_dataclass(hint) else "any")


def _allowed(constraint: object) -> Iterator[str]:
    """Yields descriptions of the values that a constraint allows."""
    match constraint:
        case AfterValidator(Requirement(names=names)) if names:
            more = ", …" if len(names) > MAX_NAMES else ""
            yield ", ".join(f"`{name}`" for name in names[:MAX_NAMES]) + more
        case AfterValidator(Requirement(description=text)):
            yield text
        case FieldInfo(metadata=constraints):
            yield from (text for inner in constraints for text in _allowed(inner))
        case MinLen():
            yield "not empty"
        # INT32 is omitted, because every integer has this limit by default.
        case Gt(limit) | Ge(limit) | Lt(limit) | Le(limit) if limit != INT32:
            yield f"{COMPARISON_SIGNS[type(constraint)]} {limit:g}"


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    all_rows = [columns, ("---",) * len(columns), *rows]
    lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in all_rows)
    return "".join(f"| {line} |\n" for line in lines)


if __name__ == "__main__":
    write_text_atomically(PAGE, page())
