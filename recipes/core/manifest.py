"""Manifests: the record that a stage is complete, and what it is made of.

A manifest is written last, by atomic rename. Present means complete; absent means there is nothing
to use. Torch-free, so that a login node can read and check a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from recipes.core.errors import RecipeError
from recipes.core.files import sha256_of_each, write_text_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import TypeAdapter

MANIFEST = "manifest.json"
ARTIFACT = "artifact"
WORK = "work"
"""In a stage's directory: its unfinished work."""
FORMAT = 1
"""Of run directories. Increase it when this code can no longer read what it wrote before."""
ResultT = TypeVar("ResultT", bound="DataclassInstance")


@dataclass(frozen=True)
class FileStamp:
    """Identity of one artifact file. ``mtime_ns`` only lets an unchanged file skip rehashing."""

    size: int
    sha256: str
    mtime_ns: int


@dataclass
class Outcome:
    """What a stage function returns about the artifact it wrote."""

    result: DataclassInstance | None = None
    """What it measured, a dataclass of its room's ``results.py``; on rank 0 at least."""
    architecture: dict[str, Any] | None = None
    parameters: int | None = None
    tokenizer_sha256: str | None = None

    @classmethod
    def of(cls, result: DataclassInstance, source: Manifest) -> Outcome:
        """Returns the outcome of a stage that wrote the model of ``source`` in another format."""
        return cls(result, source.architecture, source.parameters, source.tokenizer_sha256)


@dataclass
class Manifest:
    """What a result is made of, and the result. Sizes in bytes, times in seconds.

    While a stage runs, its ``work/`` holds one without a result.
    """

    stage: str
    kind: str
    fingerprint: str
    config: dict[str, Any]
    code: str
    inputs: dict[str, str]
    """Fingerprints of the inputs."""
    started_at: str
    """Time of the start, to the microsecond, which also tells two starts apart."""
    libraries: dict[str, str] = field(default_factory=dict)
    """Versions that are part of the fingerprint; ``versions`` has those of the stage's process."""
    versions: dict[str, str] = field(default_factory=dict)
    git_sha: str | None = None
    files: dict[str, FileStamp] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    """The stage's result as plain data; ``result`` reads it back."""
    architecture: dict[str, Any] | None = None
    parameters: int | None = None
    tokenizer_sha256: str | None = None
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    input_content: dict[str, str] = field(default_factory=dict)
    """Hashes of the inputs' files, which a forced rerun changes under the same fingerprint."""

    def result(self, of: type[ResultT]) -> ResultT:
        """What the stage measured, as what it was written from, or a part; refuses what differs."""
        from pydantic import ValidationError  # which takes a tenth of a second to import

        try:
            result: ResultT = _adapter(of).validate_python(self.metrics)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise RecipeError(
                f"the result of stage {self.stage} of {self.started_at} cannot be read: {name}: "
                f"{first['msg']}.",
                f"delete the {MANIFEST} of {self.stage}; the stage then runs again",
            ) from error
        return result

    def result_if(self, stage: str, of: type[ResultT]) -> ResultT | None:
        """The same where ``stage`` made it; ``None`` where another stage made one of its kind."""
        return self.result(of) if self.stage == stage else None

    def content(self) -> str:
        """One hash of the artifact's files."""
        names = "".join(f"{name} {stamp.sha256}\n" for name, stamp in sorted(self.files.items()))
        return hashlib.sha256(names.encode()).hexdigest()

    def total_bytes(self) -> int:
        """Size of the artifact on disk."""
        return sum(stamp.size for stamp in self.files.values())


@cache
def _adapter(of: type[ResultT]) -> TypeAdapter[ResultT]:
    from pydantic import TypeAdapter

    return TypeAdapter(of)


def require_format(found: object, path: Path) -> None:
    """Raises ``RecipeError`` unless a file of a run directory has this version's format."""
    if found != FORMAT:
        raise RecipeError(
            f"{path} was written by another version of this repository (format {found}, "
            f"not {FORMAT}).",
            "start a new run directory: run_dir=DIR",
        )


def write_manifest(stage_dir: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """Writes a manifest by atomic rename; in a stage's directory it marks the stage complete."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1, sort_keys=True)
    write_text_atomically(stage_dir / name, text + "\n")


def read_manifest(stage_dir: Path, name: str = MANIFEST) -> Manifest | None:
    """Returns the manifest of a stage, or ``None`` if it is not complete.

    Raises:
        RecipeError: The file is damaged.
    """
    path = stage_dir / name
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        require_format(data.pop("format", None), path)
        data["files"] = {name: FileStamp(**stamp) for name, stamp in data["files"].items()}
        return Manifest(**data)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecipeError(
            f"{path} is not a readable manifest ({error}).",
            "delete the file; the stage then runs again",
        ) from error


def manifest_of(source: str | None) -> Manifest | None:
    """The manifest of another run's stage, given as its directory; ``None`` for anything else."""
    return read_manifest(Path(source)) if source and Path(source).is_dir() else None


def stamp_files(root: Path) -> dict[str, FileStamp]:
    """Hashes every file below ``root``, keyed by its relative POSIX path."""
    paths = sorted(p for p in root.rglob("*") if p.is_file())
    stats = [path.stat() for path in paths]
    return {
        path.relative_to(root).as_posix(): FileStamp(stat.st_size, digest, stat.st_mtime_ns)
        for path, stat, digest in zip(paths, stats, sha256_of_each(paths), strict=True)
    }


def changed_files(root: Path, stamps: Mapping[str, FileStamp], *, rehash: bool) -> list[str]:
    """Lists files that are missing, added, or differ from their stamps.

    Without ``rehash`` a file whose size and mtime are unchanged is trusted, which keeps a rerun of
    a finished chain at a fraction of a second.
    """
    changed, doubtful = [], []
    present = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    for name, stamp in stamps.items():
        if name not in present:
            changed.append(f"{name} (missing)")
            continue
        stat = (root / name).stat()
        if stat.st_size != stamp.size:
            changed.append(f"{name} (changed)")
        elif rehash or stat.st_mtime_ns != stamp.mtime_ns:
            doubtful.append(name)
    digests = sha256_of_each([root / name for name in doubtful])
    pairs = zip(doubtful, digests, strict=True)
    changed += [f"{name} (changed)" for name, digest in pairs if digest != stamps[name].sha256]
    changed += [f"{name} (added)" for name in sorted(present - stamps.keys())]
    return changed


def check_artifact(stage_dir: Path, kind: str | None = None, *, rehash: bool = True) -> Manifest:
    """The manifest of a stage; refuses one that is incomplete, of another kind, or was changed."""
    manifest = read_manifest(stage_dir)
    if manifest is None:
        raise RecipeError(f"{stage_dir} has no {MANIFEST}: it is not complete.", "run it first")
    if kind is not None and manifest.kind != kind:
        raise RecipeError(
            f"{stage_dir} holds a {manifest.kind}, but a {kind} is needed here.",
            "point the input at a stage of that kind",
        )
    changed = changed_files(stage_dir / ARTIFACT, manifest.files, rehash=rehash)
    if changed:
        raise RecipeError(
            f"{stage_dir / ARTIFACT} does not match its manifest: {', '.join(changed[:5])}.",
            f"restore the files, or delete {stage_dir / MANIFEST} to make the stage run again",
        )
    return manifest
