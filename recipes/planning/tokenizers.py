"""Checks that models and data which meet in one loss have the same tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemo_convert.hf import tokenizer_sha256
from recipes.core.manifest import manifest_of
from recipes.core.stage import StageConfig
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.problems import Problem

SOURCES = ("tokenizer", "checkpoint", "student", "teacher")
"""Inputs whose tokenizer a stage takes over, in order of precedence."""


def tokenizer_problems(cfg: StageConfig, chain: Chain) -> Iterator[Problem]:
    """Compares the tokenizers of a stage's inputs whose files are on this machine.

    The stage itself compares the others when it starts.
    """
    hashes = {name: tokenizer_of(source, chain) for name, source in cfg.inputs.items()}
    known = {name: sha for name, sha in hashes.items() if sha is not None}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name} {sha[:12]}" for name, sha in known.items())
        yield Problem(
            rules.TOKENIZER,
            f"the inputs of {cfg.stage} have different tokenizers: {listed}",
            "use models of one vocabulary, and data tokenized with it",
        )


def tokenizer_of(source: str, chain: Chain) -> str | None:
    """Returns the SHA-256 of the tokenizer of a stage or stage directory; ``None`` if unknown."""
    config = chain.stages.get(source)
    if config is None:
        manifest = manifest_of(source)
        return manifest.tokenizer_sha256 if manifest else None
    if "hf_path" in vars(config):
        folder = Path(vars(config)["hf_path"])
        return tokenizer_sha256(folder) if folder.is_dir() else None
    upstream = next((config.inputs[name] for name in SOURCES if name in config.inputs), None)
    return None if upstream is None else tokenizer_of(upstream, chain)
