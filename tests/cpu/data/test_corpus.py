"""Text through Hugging Face datasets, from a local folder since tests reach no hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.core.errors import RecipeError
from recipes.data.corpus import read_documents


def test_hugging_face_dataset(tmp_path: Path) -> None:
    lines = ['{"body": " one "}', '{"body": null}', '{"body": "two"}']
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    source = f"hf://{tmp_path}:train"
    assert list(read_documents(source, "body")) == ["one", "two"]
    with pytest.raises(RecipeError, match="no field 'text'; it has body"):
        list(read_documents(source, "text"))
