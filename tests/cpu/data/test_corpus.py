"""Text through Hugging Face datasets, from a local folder since tests reach no hub."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from recipes.core.errors import RecipeError
from recipes.data.corpus import read_source


def test_hugging_face_dataset(tmp_path: Path) -> None:
    lines = ['{"body": " one "}', '{"body": null}', '{"body": "two"}']
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    source = f"hf://{tmp_path}:train"
    assert [document.text for document in read_source(source, "body")] == ["one", "two"]
    with pytest.raises(RecipeError, match="no field 'text'; it has body"):
        list(read_source(source, "text"))


def test_hugging_face_dataset_is_taken_up_again(tmp_path: Path) -> None:
    for shard in range(3):
        rows = [json.dumps({"text": f"{shard} {row}"}) for row in range(10)]
        (tmp_path / f"train-{shard}.jsonl").write_text("\n".join(rows))
    source = f"hf://{tmp_path}:train"
    whole = list(read_source(source, "text"))
    assert len(whole) == 30
    first = read_source(source, "text")
    begun = list(islice(first, 17))
    state = json.loads(json.dumps(first.state()))
    assert begun + list(read_source(source, "text", state)) == whole
