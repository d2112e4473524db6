"""Manifests of no stage that ran."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from recipes.core.manifest import Manifest


def bare_manifest(stage: str, kind: str, result: Any) -> Manifest:
    """A manifest that says nothing but what was measured, if anything was."""
    return Manifest(
        stage=stage,
        kind=kind,
        fingerprint="f",
        config={},
        code="c",
        inputs={},
        files={},
        metrics=asdict(result) if result is not None else {},
        architecture=None,
        parameters=None,
        tokenizer_sha256="t",
        versions={},
        git_sha=None,
        started_at="2025-01-01T00:00:00+00:00",
        seconds=1.0,
        peak_rss_bytes=10**9,
    )
