"""A plan refuses models and text with different tokenizers or vocabulary sizes."""

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
"""Prefix of settings."""


def test_a_teacher_with_another_tokenizer_or_vocabulary_size_is_refused(
    plan: MakePlan, complete: Complete, tmp_path: Path
) -> None:
    complete(plan())
    # The results of the complete run become those of another run. This run has none.
    other_run = (tmp_path / "run").rename(tmp_path / "other")
    teacher = f"{D}inputs.teacher={other_run}/import_hf"
    inputs = teacher, f"{D}inputs.data={other_run}/prepare_data"
    plan(*inputs)  # is accepted: teacher and data have the same tokenizer, with hash "t"
    edit_manifest(other_run / "prepare_data", tokenizer_sha256="another")
    with pytest.raises(
        RecipeError, match="different tokenizers: teacher t, data another"
    ) as caught:
        plan(*inputs)
    assert RULES["tokenizer"].reference in str(caught.value)
    padded = replace(read_architecture(HF_CONFIG, "SmolLM2"), vocab_size=49280)
    edit_manifest(other_run / "import_hf", architecture=padded.as_dict())
    with pytest.raises(RecipeError, match=r"different sizes: teacher 49280, student 49152"):
        plan(teacher)
