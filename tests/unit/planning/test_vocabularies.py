"""A plan refuses models and text with different vocabularies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nemo_convert.hf_config import read_architecture
from nemo_convert.smollm2 import HF_CONFIG
from recipes.core.errors import RecipeError
from recipes.planning.rules import RULES
from tests.support.manifests import edit_manifest

if TYPE_CHECKING:
    from tests.unit.conftest import Complete, MakePlan

D = "stages.distill."


def test_different_tokenizers_are_refused(
    plan: MakePlan, complete: Complete, tmp_path: Path
) -> None:
    complete(plan())
    other = (tmp_path / "run").rename(tmp_path / "other")  # now the results of another run
    inputs = f"{D}inputs.teacher={other}/import_hf", f"{D}inputs.data={other}/prepare_data"
    plan(*inputs)  # is accepted: the other run has the same tokenizer
    edit_manifest(other / "prepare_data", tokenizer_sha256="another")
    with pytest.raises(RecipeError, match=r"different tokenizers: teacher t, data another") as e:
        plan(*inputs)
    assert RULES["tokenizer"].reference in str(e.value)


def test_vocabularies_with_different_padding_are_refused(
    plan: MakePlan, complete: Complete, tmp_path: Path
) -> None:
    complete(plan())
    other = (tmp_path / "run").rename(tmp_path / "other")  # now the results of another run
    padded = replace(read_architecture(HF_CONFIG, "SmolLM2"), vocab_size=49280)
    edit_manifest(other / "import_hf", architecture=padded.as_dict())
    with pytest.raises(RecipeError, match=r"different sizes: teacher 49280, student 49152"):
        plan(f"{D}inputs.teacher={other}/import_hf")
