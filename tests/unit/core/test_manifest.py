from __future__ import annotations

import json
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

if TYPE_CHECKING:
    from pathlib import Path

HELLO_SHA256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
UNENCODABLE = "a lone surrogate: \ud800"


@pytest.fixture
def stage_dir(tmp_path: Path) -> Path:
    """A complete stage with two files, one in a folder."""
    artifact = tmp_path / "stage" / ARTIFACT
    (artifact / "sub").mkdir(parents=True)
    (artifact / "a.txt").write_text("hello")
    (artifact / "sub" / "b.txt").write_text("world!")
    manifest = Manifest(
        stage="prune",
        kind="checkpoint_nemo",
        fingerprint="f",
        config={"x": 1},
        code="c",
        inputs={"data": "d"},
        files=stamp_files(artifact),
        metrics={"loss": 0.5},
        architecture={"num_layers": 2},
        parameters=7,
        tokenizer_sha256=None,
        versions={"python": "3"},
        git_sha=None,
        started_at="now",
        seconds=1.5,
        peak_rss_bytes=3,
    )
    write_manifest(artifact.parent, manifest)
    return artifact.parent


@dataclass(frozen=True)
class Layers:
    loss: float
    scores: dict[int, float] = field(default_factory=dict)
    licence: str | None = None


@dataclass(frozen=True)
class Part:
    """What is not asked for is passed over."""

    licence: str | None = None


def test_a_result_is_read_back_as_it_was_written(stage_dir: Path) -> None:
    manifest = read_manifest(stage_dir)
    assert manifest is not None
    written = Layers(0.5, {1: 0.25, 12: 2.0}, "mit")
    write_manifest(stage_dir, replace(manifest, metrics=asdict(written)))
    found = read_manifest(stage_dir)
    assert found is not None
    assert found.result(Layers) == written
    assert found.result(Part) == Part("mit")
    assert found.result_if("prune", Layers) == written
    assert found.result_if("distill", Layers) is None


@pytest.mark.parametrize(
    ("metrics", "named"),
    [
        ({"perplexity": 0.5}, "loss: Field required"),
        ({"loss": 0.5, "scores": {"1": "high"}}, "scores.1: Input should be a valid number"),
    ],
)
def test_a_result_of_another_form_is_refused(
    stage_dir: Path, metrics: dict[str, Any], named: str
) -> None:
    manifest = read_manifest(stage_dir)
    assert manifest is not None
    with pytest.raises(RecipeError) as caught:
        replace(manifest, metrics=metrics).result(Layers)
    for words in ("stage prune", named, "fix: delete the manifest.json of prune"):
        assert words in str(caught.value)


def test_text_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
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


def test_failed_write_leaves_no_partial(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(file, UNENCODABLE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("change", [{"format": FORMAT + 1}, {"format": "1"}, {}])
def test_a_manifest_of_another_version_is_refused(stage_dir: Path, change: dict[str, Any]) -> None:
    data = json.loads((stage_dir / MANIFEST).read_text())
    del data["format"]
    (stage_dir / MANIFEST).write_text(json.dumps({**data, **change}))
    with pytest.raises(RecipeError, match="start a new run directory"):
        read_manifest(stage_dir)


def test_manifest_survives_a_round_trip(stage_dir: Path) -> None:
    manifest = read_manifest(stage_dir)
    assert manifest is not None
    write_manifest(stage_dir, manifest)
    assert read_manifest(stage_dir) == manifest
    assert manifest.total_bytes() == len("hello") + len("world!")
    assert manifest.files["a.txt"].sha256 == HELLO_SHA256


def test_no_manifest_means_incomplete(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '{"format": 1, "files": {"a": {"size": 1}}}', "\0"],
)
def test_broken_manifest_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_manifest(tmp_path)
    assert str(tmp_path / MANIFEST) in str(caught.value)
    assert "delete the file" in str(caught.value)


@pytest.mark.parametrize("change", ["extra", "lacking"])
def test_manifest_with_other_fields_is_refused(stage_dir: Path, change: str) -> None:
    file = stage_dir / MANIFEST
    data = json.loads(file.read_text())
    if change == "extra":
        data["surprise"] = 1
    else:
        del data["fingerprint"]
    file.write_text(json.dumps(data))
    with pytest.raises(RecipeError, match="is not a readable manifest"):
        read_manifest(stage_dir)


def test_stamps_use_relative_posix_names(stage_dir: Path) -> None:
    stamps = stamp_files(stage_dir / ARTIFACT)
    assert list(stamps) == ["a.txt", "sub/b.txt"]
    assert stamps["sub/b.txt"].size == 6
    assert stamps["sub/b.txt"].mtime_ns == (stage_dir / ARTIFACT / "sub/b.txt").stat().st_mtime_ns


@pytest.mark.parametrize("rehash", [True, False])
def test_untouched_files_are_unchanged(stage_dir: Path, rehash: bool) -> None:
    stamps = stamp_files(stage_dir / ARTIFACT)
    assert changed_files(stage_dir / ARTIFACT, stamps, rehash=rehash) == []


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


def test_missing_artifact_directory_lists_every_file(stage_dir: Path) -> None:
    stamps = stamp_files(stage_dir / ARTIFACT)
    found = changed_files(stage_dir / "gone", stamps, rehash=False)
    assert found == ["a.txt (missing)", "sub/b.txt (missing)"]


def test_same_size_and_restored_mtime_is_found_by_rehashing_only(stage_dir: Path) -> None:
    artifact = stage_dir / ARTIFACT
    stamps = stamp_files(artifact)
    (artifact / "a.txt").write_text("jello")
    os.utime(artifact / "a.txt", ns=(0, stamps["a.txt"].mtime_ns))
    assert changed_files(artifact, stamps, rehash=False) == []
    assert changed_files(artifact, stamps, rehash=True) == ["a.txt (changed)"]


def test_same_size_and_touched_mtime_is_found_without_rehashing(stage_dir: Path) -> None:
    artifact = stage_dir / ARTIFACT
    stamps = stamp_files(artifact)
    (artifact / "a.txt").write_text("jello")
    os.utime(artifact / "a.txt", ns=(0, stamps["a.txt"].mtime_ns + 1))
    assert changed_files(artifact, stamps, rehash=False) == ["a.txt (changed)"]


@pytest.mark.parametrize("rehash", [True, False])
def test_touching_a_file_changes_nothing(stage_dir: Path, rehash: bool) -> None:
    artifact = stage_dir / ARTIFACT
    stamps = stamp_files(artifact)
    os.utime(artifact / "a.txt", ns=(0, 0))
    assert changed_files(artifact, stamps, rehash=rehash) == []


def test_check_returns_the_manifest(stage_dir: Path) -> None:
    assert check_artifact(stage_dir, "checkpoint_nemo") == read_manifest(stage_dir)
    assert check_artifact(stage_dir).kind == "checkpoint_nemo"


def test_check_refuses_another_kind(stage_dir: Path) -> None:
    with pytest.raises(RecipeError, match="a checkpoint_nemo, but the input must be a dataset"):
        check_artifact(stage_dir, "dataset")


def test_check_refuses_an_incomplete_stage(stage_dir: Path) -> None:
    (stage_dir / MANIFEST).unlink()
    with pytest.raises(RecipeError, match="is not complete") as caught:
        check_artifact(stage_dir)
    assert str(stage_dir) in str(caught.value)


def test_check_names_changed_files(stage_dir: Path) -> None:
    (stage_dir / ARTIFACT / "a.txt").write_text("other")
    with pytest.raises(RecipeError, match=r"a\.txt \(changed\)"):
        check_artifact(stage_dir, "checkpoint_nemo")


def test_digest_depends_on_names_and_contents_but_not_on_order_or_folder(tmp_path: Path) -> None:
    files = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        for name in ("1.json", "2.json"):
            files.append(tmp_path / folder / name)
            files[-1].write_text(name)
    assert sha256_of(files[0]) == sha256_of(files[2])
    assert digest_files(files[:2]) == digest_files(files[:1:-1])
    files[2].write_text("changed")
    assert digest_files(files[:2]) != digest_files(files[2:])
    files[1].rename(tmp_path / "x" / "3.json")
    assert digest_files([files[0], tmp_path / "x" / "3.json"]) != digest_files(files[2:])


def test_stamp_fields_are_what_the_manifest_stores(stage_dir: Path) -> None:
    stored = json.loads((stage_dir / MANIFEST).read_text())["files"]["a.txt"]
    stamps = stamp_files(stage_dir / ARTIFACT)
    assert stored == asdict(stamps["a.txt"])
