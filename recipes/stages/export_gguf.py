"""Writes the exported model as a GGUF file for llama.cpp.

Reads a Hugging Face folder. The GGUF file includes the tokenizer and chat template.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from nemo_convert.gguf_file import ARCHITECTURES, FILE, MATRIX_TYPES, require_storable, write
from nemo_convert.gguf_tokenizer import require_supported_files
from nemo_convert.hf_config import as_transformers_4
from nemo_convert.hub import local_folder
from nemo_convert.tokenizer_files import TOKENIZER
from recipes.core.constraints import one_of
from recipes.core.errors import RecipeError
from recipes.core.files import read_json
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, StageConfig, metrics_log
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.rules import Problem
from recipes.stages.contract import Stage


@dataclass
class ExportGgufConfig(StageConfig):
    """Settings of ``export_gguf``."""

    type: Annotated[str, one_of(*MATRIX_TYPES)] = "f16"
    """Type of the weight matrices; ``q8_0`` takes half the memory of ``f16``."""


def check(cfg: ExportGgufConfig, chain: Chain) -> Iterator[Problem]:
    """Yields a problem if the export does not support the model's family, config or tokenizer."""
    family = chain.teacher.hf_architecture
    if family not in ARCHITECTURES:
        what = f"{cfg.name} does not support {family}, only {', '.join(ARCHITECTURES)}"
        yield Problem(rules.FORMAT, what, "set gguf=null")
    try:
        folder = local_folder(chain.hf_path)
        # Files are missing if a hub model is not downloaded, or the tokenizer has another format.
        if folder and (folder / "config.json").is_file():
            require_storable(as_transformers_4(read_json(folder / "config.json"), chain.hf_path))
        if folder and (folder / TOKENIZER).is_file():
            require_supported_files(folder)
    except RecipeError as error:
        yield Problem(rules.FORMAT, error.what, error.fix)
    except (AttributeError, KeyError, TypeError):
        return  # the check of import_hf reports a damaged file


def run(cfg: ExportGgufConfig, inputs: Inputs, out: Path) -> Outcome:
    """Converts the Hugging Face folder to a GGUF file."""
    source, progress = inputs["checkpoint"], partial(metrics_log(out).progress, "gguf")
    result = write(source.artifact, out / FILE, cfg.type, progress)
    return Outcome.of(result, source.manifest)


STAGE = Stage(
    config=ExportGgufConfig,
    kind="gguf",
    run=run,
    check=check,
    single_rank_reason="a conversion is not split over ranks",
    inputs={"checkpoint": ("checkpoint_hf",)},
    needs_gpu=lambda config, chain: False,
    disk_bytes=lambda config, chain: 4 * chain.teacher.parameters(),  # upper bound: float32
)
