from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from recipes.core.errors import RecipeError
from recipes.core.files import digest_files, sha256_of, write_text_atomically
from recipes.core.manifest import (
    ARTIFACT,
    FORMAT,
    MANIFEST,
    Manifest,
    changed_files,
    check_artifact,
    read_manifest,
    stamp_files,
    write_manifest,
)
from tests.support.manifests import bare_manifest, edit_manifest

if TYPE_CHECKING:
    from pathlib import Path

HELLO_SHA256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
"""SHA-256 of the text "hello"."""
UNENCODABLE = "a lone surrogate: \ud800"
"""A text that UTF-8 cannot encode."""


@pytest.fixture
def stage_dir(tmp_path: Path) -> Path:
    """The directory of a complete stage. Its artifact has a file, and another in a folder."""
    artifact = tmp_path / "stage" / ARTIFACT
    (artifact / "sub").mkdir(parents=True)
    (artifact / "a.txt").write_text("hello")
    (artifact / "sub" / "b.txt").write_text("world!")
    write_manifest(artifact.parent, manifest_of(artifact))
    return artifact.parent


def manifest_of(artifact: Path) -> Manifest:
    manifest = bare_manifest("prune", "checkpoint_nemo", None)
    return replace(manifest, config={"x": 1}, parameters=7, files=stamp_files(artifact))


@dataclass(frozen=True)
class Result:
    """The result of a stage, which its manifest holds as ``metrics``."""

    loss: float
    scores: dict[int, float] = field(default_factory=dict)
    licence: str | None = None


@dataclass(frozen=True)
class Licence:
    """Has one field of ``Result``. ``Manifest.result`` ignores the other fields."""

    licence: str | None = None


def test_a_result_is_read_back_as_it_was_written(stage_dir: Path) -> None:
    written = Result(0.5, {1: 0.25, 12: 2.0}, "mit")
    edit_manifest(stage_dir, metrics=asdict(written))
    manifest = check_artifact(stage_dir)
    assert manifest.result(Result) == written
    assert manifest.result(Licence) == Licence("mit")
    assert manifest.result_if("prune", Result) == written
    assert manifest.result_if("distill", Result) is None


def test_a_manifest_with_nan_and_infinity_is_valid_json(stage_dir: Path) -> None:
    written = Result(math.nan, {1: math.inf})
    edit_manifest(stage_dir, metrics=asdict(written))
    # Python calls ``parse_constant`` for NaN and Infinity, which are not JSON.
    json.loads((stage_dir / MANIFEST).read_text(), parse_constant=pytest.fail)
    # Compares texts, because NaN does not equal NaN.
    assert str(check_artifact(stage_dir).result(Result)) == str(written)


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"perplexity": 0.5}, "loss: Field required"),
        ({"loss": 0.5, "scores": {"1": "high"}}, "scores.1: Input should be a valid number"),
    ],
)
def test_a_result_with_a_missing_field_or_a_wrong_type_is_refused(
    metrics: dict[str, Any], reason: str
) -> None:
    manifest = replace(bare_manifest("prune", "checkpoint_nemo", None), metrics=metrics)
    with pytest.raises(RecipeError) as error:
        manifest.result(Result)
    for words in ("stage prune", reason, "fix: delete the manifest.json of prune"):
        assert words in str(error.value)


def test_a_write_replaces_the_text_and_leaves_no_other_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_text_atomically(file, "old")
    write_text_atomically(file, "new – ü")
    assert file.read_text(encoding="utf-8") == "new – ü"
    assert os.listdir(tmp_path) == ["x.json"]


def test_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(file, UNENCODABLE)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("version", [{"format": FORMAT + 1}, {"format": "1"}, {}])
def test_a_manifest_of_another_version_is_refused(stage_dir: Path, version: dict[str, Any]) -> None:
    data = json.loads((stage_dir / MANIFEST).read_text())
    del data["format"]  # with {}, the manifest has no version
    (stage_dir / MANIFEST).write_text(json.dumps({**data, **version}))
    with pytest.raises(RecipeError, match="start a new run directory"):
        read_manifest(stage_dir)


def test_manifest_survives_a_round_trip(stage_dir: Path) -> None:
    manifest = manifest_of(stage_dir / ARTIFACT)
    assert read_manifest(stage_dir) == manifest
    assert manifest.total_bytes() == len("hello") + len("world!")
    assert manifest.files["a.txt"].sha256 == HELLO_SHA256


@pytest.mark.parametrize(
    "text",  # the last two lack required fields
    ["", "{", "[]", '{"format": 3, "files": {"a": {"size": 1}}}', '{"format": 3, "files": {}}'],
)
def test_the_error_about_a_damaged_manifest_has_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(RecipeError) as error:
        read_manifest(tmp_path)
    assert str(tmp_path / MANIFEST) in str(error.value)
    assert "delete the file" in str(error.value)


@pytest.mark.parametrize("rehash", [True, False])
def test_missing_changed_and_added_files_are_listed(stage_dir: Path, rehash: bool) -> None:
    artifact = stage_dir / ARTIFACT
    stamps = stamp_files(artifact)
    (artifact / "a.txt").unlink()
    (artifact / "sub" / "b.txt").write_text("longer than before")
    (artifact / "sub" / "new.txt").write_text("")
    assert changed_files(artifact, stamps, rehash=rehash) == [
        "a.txt (missing)",
        "sub/b.txt (changed)",
        "sub/new.txt (added)",
    ]


@pytest.mark.parametrize(
    ("text", "mtime_change", "changes_without_rehash", "changes_with_rehash"),
    [  # the file was "hello"; time changes are in nanoseconds
        ("hello", 0, [], []),
        ("hello", 5, [], []),
        ("jello", 5, ["a.txt (changed)"], ["a.txt (changed)"]),
        ("jello", 0, [], ["a.txt (changed)"]),
    ],
    ids=["untouched", "touched", "changed", "changed with the old time"],
)
def test_only_hashes_detect_a_change_that_keeps_size_and_time(
    stage_dir: Path,
    text: str,
    mtime_change: int,
    changes_without_rehash: list[str],
    changes_with_rehash: list[str],
) -> None:
    artifact = stage_dir / ARTIFACT
    stamps = stamp_files(artifact)
    assert list(stamps) == ["a.txt", "sub/b.txt"]
    (artifact / "a.txt").write_text(text)
    old_time = stamps["a.txt"].mtime_ns
    os.utime(artifact / "a.txt", ns=(0, old_time + mtime_change))
    assert changed_files(artifact, stamps, rehash=False) == changes_without_rehash
    # A file with an unchanged hash gets its stamp's time back, so that it is hashed only once.
    expected_time = old_time + mtime_change if changes_without_rehash else old_time
    assert (artifact / "a.txt").stat().st_mtime_ns == expected_time
    assert changed_files(artifact, stamps, rehash=True) == changes_with_rehash


def test_another_type_changed_files_and_a_missing_manifest_are_refused(stage_dir: Path) -> None:
    assert check_artifact(stage_dir) == check_artifact(stage_dir, "checkpoint_nemo")
    with pytest.raises(RecipeError, match="a checkpoint_nemo, but the input must be a dataset"):
        check_artifact(stage_dir, "dataset")
    (stage_dir / ARTIFACT / "a.txt").write_text("other")
    with pytest.raises(RecipeError, match=r"a\.txt \(changed\)"):
        check_artifact(stage_dir)
    (stage_dir / MANIFEST).unlink()
    with pytest.raises(RecipeError, match=f"{stage_dir} has no manifest.json: it is not complete"):
        check_artifact(stage_dir)


def test_digest_depends_on_names_and_contents_but_not_on_order_or_folder(tmp_path: Path) -> None:
    files = [tmp_path / folder / name for folder in ("x", "y") for name in ("1.json", "2.json")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(file.name)  # so files with the same name have the same content
    x1, x2, y1, y2 = files
    assert sha256_of(x1) == sha256_of(y1)
    assert digest_files([x1, x2]) == digest_files([y2, y1])
    y1.write_text("changed")
    assert digest_files([x1, x2]) != digest_files([y1, y2])
    assert digest_files(files) == digest_files(reversed(files)), (
        "the order of two files with the same name must not matter"
    )
    old_digest = digest_files([x1, x2])
    x3 = x2.rename(tmp_path / "x" / "3.json")
    assert digest_files([x1, x3]) != old_digest


def test_device_hours_count_all_devices_on_all_nodes() -> None:
    result = replace(bare_manifest("distill", "checkpoint_nemo", None), seconds=1800, devices=8)
    assert result.device_hours() == 4  # half an hour on 8 devices
    assert replace(result, config={"resources": {"nodes": 2}}).device_hours() == 8
