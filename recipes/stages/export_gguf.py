"""The exported model as one GGUF file, with its tokenizer and chat template, for llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nemo_convert.gguf_file import ARCHITECTURES, FILE, TYPES, write
from recipes.core.constraints import one_of
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, StageConfig, metrics_log
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.problems import Problem
from recipes.stages.contract import Stage


@dataclass
class ExportGgufConfig(StageConfig):
    """Settings of ``export_gguf``."""

    type: Annotated[str, one_of(*TYPES)] = "f16"
    """Of the matrices; ``q8_0`` takes half of ``f16``'s memory."""


def check(cfg: ExportGgufConfig, chain: Chain) -> Iterator[Problem]:
    """Finds families that are not written."""
    family = chain.teacher.hf_architecture
    if family not in ARCHITECTURES:
        yield Problem(
            rules.FORMAT,
            f"{cfg.stage} cannot write a {family}",
            f"use gguf=null; it knows {', '.join(ARCHITECTURES)}",
        )


def disk_bytes(cfg: ExportGgufConfig, chain: Chain) -> int:
    """Size of the file, the teacher's in float32 at most."""
    return 4 * chain.teacher.parameters()


def run(cfg: ExportGgufConfig, inputs: Inputs, out: Path) -> Outcome:
    """Writes the file."""
    source, log = inputs["checkpoint"], metrics_log(out)
    found = write(source.artifact, out / FILE, cfg.type, lambda d, n: log.progress("gguf", d, n))
    return Outcome(
        found,
        architecture=source.manifest.architecture,
        parameters=source.manifest.parameters,
        tokenizer_sha256=source.manifest.tokenizer_sha256,
    )


STAGE = Stage(
    config=ExportGgufConfig,
    kind="gguf",
    run=run,
    check=check,
    one_rank="a conversion is one process's work",
    inputs={"checkpoint": ("checkpoint_hf",)},
    needs_gpu=lambda config, chain: False,
    disk_bytes=disk_bytes,
)

if __name__ == "__main__":
    STAGE.main()
