"""Makes and edits manifests, and folders of complete stages, without running stages."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from recipes.core.manifest import ARTIFACT, Manifest, read_manifest, stamp_files, write_manifest
from recipes.core.run_state import Request, content_of
from recipes.core.stage import Input
from recipes.data.results import DatasetResult, SourceTokens


def bare_manifest(stage: str, kind: str, result: Any) -> Manifest:
    """Returns a manifest with fixed placeholder values. It lists no files.

    Args:
        stage: Name of the stage.
        kind: Type of the artifact.
        result: Dataclass whose fields become the metrics; ``None`` for no metrics.
    """
    return Manifest(
        stage=stage,
        kind=kind,
        fingerprint="f",
        config={},
        code="c",
        inputs={},
        metrics=asdict(result) if result is not None else {},
        tokenizer_sha256="t",
        started_at="2025-01-01T00:00:00+00:00",
        seconds=1.0,
        peak_rss_bytes=10**9,
    )


def as_input(folder: Path, kind: str, result: Any = None, artifact: Path | None = None) -> Input:
    """Makes the folder of a complete stage, and returns the stage as an input of another stage.

    Args:
        folder: Folder to create. It gets no manifest file; only the returned input has a manifest.
        kind: Type of the artifact.
        result: As in ``bare_manifest``.
        artifact: Folder to which the stage's artifact links; ``None`` for a stage without one.
    """
    folder.mkdir()
    manifest = bare_manifest("test", kind, result)
    if artifact is not None:
        (folder / ARTIFACT).symlink_to(artifact)
        # The cache of benchmark answers identifies a model by the hashes of its files.
        manifest.files = stamp_files(artifact)
    return Input(folder, manifest)


def dataset_result(artifact: Path) -> DatasetResult:
    """Returns the result of a dataset that ``SplitWriter`` wrote, as if it had a single source.

    Args:
        artifact: Folder with a ``.bin`` file for each split.
    """
    from recipes.data.token_sequences import read_tokens

    tokens = {file.stem: read_tokens(artifact, file.stem) for file in artifact.glob("*.bin")}
    return DatasetResult(
        documents={},
        tokens={split: len(ids) for split, ids in tokens.items()},
        sources=["text"],
        source_tokens={split: [SourceTokens("text", len(ids))] for split, ids in tokens.items()},
        # Assumes that the last token of a split is the one that ends a document.
        document_end=int(next(iter(tokens.values()))[-1]),
    )


def edit_manifest(stage_dir: Path, **changes: Any) -> None:
    """Replaces fields in the manifest file of a complete stage."""
    manifest = read_manifest(stage_dir)
    assert manifest is not None
    write_manifest(stage_dir, replace(manifest, **changes))


def unfinished_manifest(request: Request) -> Manifest:
    """Returns the manifest of a stage that has started and has no result yet."""
    inputs = {name: ref.fingerprint for name, ref in request.inputs.items()}
    return Manifest(
        stage=request.config["stage"],
        kind="kind",
        fingerprint=request.fingerprint,
        config=dict(request.config),
        code=request.code,
        libraries=dict(request.libraries),
        snapshot=request.snapshot,
        inputs=inputs,
        input_content=content_of(request.inputs),
        started_at="2025-01-02T00:00:00+00:00",
    )
