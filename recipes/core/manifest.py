"""Manifest of a complete stage: its settings, inputs, files and result.

The manifest is written last. Without a manifest a stage is not complete. A "start" of a stage is
one launch of its processes; an interrupted stage needs several starts.

This module does not import torch, so a login node can read and check a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from recipes.core.constraints import type_adapter
from recipes.core.errors import RecipeError
from recipes.core.files import json_text, sha256_of_each, sync, write_text_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MANIFEST = "manifest.json"
ARTIFACT = "artifact"
"""Folder in a stage's directory with the files of the complete result."""
WORK = "work"
"""Folder in a stage's directory with unfinished work."""
FORMAT = 3
"""Format version of a run directory. Increase it when new code cannot read older directories."""
ResultT = TypeVar("ResultT", bound="DataclassInstance")


@dataclass(frozen=True)
class FileStamp:
    """Identity of a file. Its hash counts as valid while size and ``mtime_ns`` are unchanged."""

    size: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Acceptance:
    """A user's decision to keep a stale result."""

    fingerprint: str
    """Fingerprint that the plan required. The stale result has another fingerprint."""
    reasons: list[str]
    """Why the result is stale."""
    input_content: dict[str, str] = field(default_factory=dict)
    """``Manifest.input_content`` at the time of the decision. Empty if the plan in which the user
    decided computes an input again: the content of that input was not known yet."""


@dataclass
class Outcome:
    """Return value of a stage's function ``run``, which describes the artifact that it wrote."""

    result: DataclassInstance | None = None
    """The stage's metrics as a dataclass; may be ``None`` on ranks other than 0."""
    architecture: dict[str, Any] | None = None
    """The model's ``nemo_convert.architecture.Architecture`` as plain data; ``None`` if the
    artifact is not a model."""
    parameters: int | None = None
    """Number of the model's parameters; ``None`` if the artifact is not a model."""
    tokenizer_sha256: str | None = None
    """Hash of the tokenizer of the model, or of the tokenizer that encoded the data."""

    @classmethod
    def of(cls, result: DataclassInstance, source: Manifest) -> Outcome:
        """Returns the outcome of a stage that wrote the model of ``source`` in another format."""
        return cls(result, source.architecture, source.parameters, source.tokenizer_sha256)


@dataclass
class Manifest:
    """Record of one start of a stage. In ``manifest.json``: the start that completed the stage.

    ``work/begun.json`` is the record, still without results, of the start of the unfinished work.
    """

    stage: str
    """Type of the stage, such as ``distill``."""
    kind: str
    """Type of the artifact, such as ``dataset``."""
    fingerprint: str
    config: dict[str, Any]
    code: str
    """Fingerprint of the stage's code, which is part of ``fingerprint``."""
    inputs: dict[str, str]
    """Fingerprint of each input, by the input's name."""
    started_at: str
    """Time of the start in ISO format with microseconds, which also identifies the start."""
    libraries: dict[str, str] = field(default_factory=dict)
    """Versions that are part of the fingerprint, by library."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions that were installed when the stage ran, by library."""
    git_sha: str | None = None
    """Commit of the checkout from which the snapshot was copied."""
    snapshot: str | None = None
    """Hash of the code that ran, which is in ``code/HASH`` of the run directory."""
    files: dict[str, FileStamp] = field(default_factory=dict)
    """Stamps of the artifact's files, by path relative to ``artifact/``."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """``Outcome.result`` as plain data. The method ``result`` returns a dataclass."""
    architecture: dict[str, Any] | None = None
    parameters: int | None = None
    tokenizer_sha256: str | None = None
    seconds: float = 0.0
    """Duration of the start that completed the stage and of the starts that it resumed."""
    peak_rss_bytes: int = 0
    """Sum of the ranks' peak resident memory, without other processes that the stage started."""
    input_content: dict[str, str] = field(default_factory=dict)
    """A hash of each input's files, by the input's name. If an input is computed again, its hash
    may change although its fingerprint does not. ``begun.json`` contains the hash of an input only
    after a start has checked the input's files."""
    devices: int = 1
    """Devices per node that the stage used."""
    accepted: Acceptance | None = None
    """The user's decision to keep this result although it is stale; ``None`` without one."""
    kept: dict[str, list[str]] = field(default_factory=dict)
    """Stale results that the user kept and that this result depends on. Contains, by the name of
    each stage with such a result, the reasons why it is stale."""

    def result(self, result_type: type[ResultT]) -> ResultT:
        """Returns the metrics as the stage's dataclass, or as one with fewer of the fields.

        Raises ``RecipeError`` if the result lacks a field, or a field has another type.
        """
        try:
            result: ResultT = type_adapter(result_type).validate_python(self.metrics)
        except ValidationError as error:
            details = error.errors()[0]
            field_name = ".".join(map(str, details["loc"]))
            raise RecipeError(
                f"the result of stage {self.stage} of {self.started_at} cannot be read: "
                f"{field_name}: {details['msg']}.",
                f"delete the {MANIFEST} of {self.stage}; the stage then runs again",
            ) from error
        return result

    def result_if(self, stage: str, result_type: type[ResultT]) -> ResultT | None:
        """Returns the result if the manifest's stage is of the type ``stage``; otherwise ``None``.

        Several types of stages write the same type of artifact, but different types of result.
        """
        return self.result(result_type) if self.stage == stage else None

    def device_hours(self) -> float:
        """Returns the hours that the stage took for the result, times devices on all nodes."""
        nodes: int = self.config.get("resources", {}).get("nodes", 1)
        return self.seconds / 3600 * nodes * self.devices

    def content_hash(self) -> str:
        """Returns one hash of all files of the artifact."""
        lines = "".join(f"{name} {stamp.sha256}\n" for name, stamp in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def total_bytes(self) -> int:
        """Returns the artifact's size in bytes."""
        return sum(stamp.size for stamp in self.files.values())


def require_format(version: object, path: Path) -> None:
    """Raises ``RecipeError`` if the format version of a run directory's file is not ``FORMAT``."""
    if version != FORMAT:
        raise RecipeError(
            f"{path} was written by another version of this repository (format {version}, "
            f"not {FORMAT}).",
            "start a new run directory: run_dir=DIR",
        )


def replaced_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns the names of inputs whose ``Manifest.input_content`` has changed.

    An input without a hash in ``before`` counts as unchanged.
    """
    return [name for name, content in now.items() if before.get(name) not in (None, content)]


def write_manifest(folder: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """Writes a manifest atomically. The name ``manifest.json`` makes the stage complete."""
    text = json_text({"format": FORMAT, **asdict(manifest)}, indent=1, sort_keys=True)
    write_text_atomically(folder / name, text + "\n")


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest | None:
    """Reads the manifest in a stage's directory or its ``work/``; returns ``None`` without one.

    Raises ``RecipeError`` if the file is damaged or has another format.
    """
    path = folder / name
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        require_format(data.pop("format", None), path)
        data["files"] = {file: FileStamp(**stamp) for file, stamp in data["files"].items()}
        if accepted := data.get("accepted"):
            data["accepted"] = Acceptance(**accepted)
        return Manifest(**data)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecipeError(
            f"{path} is not a readable manifest ({error}).",
            "delete the file; the stage then runs again",
        ) from error


def manifest_of(source: str | None) -> Manifest | None:
    """Returns the manifest of ``source`` if that is the directory of a complete stage.

    Returns ``None`` for the name of a stage in the same chain and for ``None``.
    """
    return read_manifest(Path(source)) if source and Path(source).is_dir() else None


def stamp_files(root: Path) -> dict[str, FileStamp]:
    """Returns a stamp for every file below ``root``, by its relative POSIX path.

    Also syncs the files to disk, because libraries do not: the manifest must be written last.
    """
    files_and_folders = sorted(root.rglob("*"))
    for path in (root, *files_and_folders):
        if not path.is_symlink():
            sync(path)
    paths = [path for path in files_and_folders if path.is_file()]
    stats = [path.stat() for path in paths]
    return {
        path.relative_to(root).as_posix(): FileStamp(stat.st_size, digest, stat.st_mtime_ns)
        for path, stat, digest in zip(paths, stats, sha256_of_each(paths), strict=True)
    }


def changed_files(root: Path, stamps: Mapping[str, FileStamp], *, rehash: bool) -> list[str]:
    """Lists files that are missing, added, or differ from their stamps.

    Args:
        root: Folder of the files.
        stamps: Stamps of the expected files, by relative path.
        rehash: Whether to hash every file. If not, a file with the stamp's size and time is not
            hashed and counts as unchanged, so a plan is fast. A file with another time, for example
            in a copied run, is hashed. If its hash equals the stamp's, the file gets the stamp's
            time, so that later calls need not hash it.

    Returns:
        Entries such as "model.safetensors (changed)".
    """
    changed, to_hash = [], []
    present = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    for name, stamp in stamps.items():
        if name not in present:
            changed.append(f"{name} (missing)")
            continue
        stat = (root / name).stat()
        if stat.st_size != stamp.size:
            changed.append(f"{name} (changed)")
        elif rehash or stat.st_mtime_ns != stamp.mtime_ns:
            to_hash.append(name)
    digests = sha256_of_each([root / name for name in to_hash])
    for name, digest in zip(to_hash, digests, strict=True):
        if digest != stamps[name].sha256:
            changed.append(f"{name} (changed)")
        elif not (root / name).is_symlink():  # ``utime`` would change the link's target
            with contextlib.suppress(OSError):
                os.utime(root / name, ns=(time.time_ns(), stamps[name].mtime_ns))
    changed += [f"{name} (added)" for name in sorted(present - stamps.keys())]
    return changed


def check_artifact(stage_dir: Path, kind: str | None = None, *, rehash: bool = True) -> Manifest:
    """Checks that a stage is complete and its files are unchanged, and returns its manifest.

    Args:
        stage_dir: The stage's directory.
        kind: The required type of artifact; ``None`` accepts any.
        rehash: Whether to hash even the files whose size and time match their stamps.

    Raises:
        RecipeError: The stage is not complete, its artifact has another type, or files changed.
    """
    manifest = read_manifest(stage_dir)
    if manifest is None:
        what = f"{stage_dir} has no {MANIFEST}: it is not complete."
        raise RecipeError(what, "run this stage first")
    if kind is not None and manifest.kind != kind:
        raise RecipeError(
            f"{stage_dir} contains a {manifest.kind}, but the input must be a {kind}.",
            "use a stage of that type as the input",
        )
    changed = changed_files(stage_dir / ARTIFACT, manifest.files, rehash=rehash)
    if changed:
        raise RecipeError(
            f"{stage_dir / ARTIFACT} does not match its manifest: {', '.join(changed[:5])}.",
            f"restore the files, or delete {stage_dir / MANIFEST} to make the stage run again",
        )
    return manifest
