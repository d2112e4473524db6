"""Tests licences and commits of sources."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import DatasetCardData, HfApi

from recipes.core.errors import RecipeError
from recipes.data.origins import origin_of, origins_of, pin_commit
from recipes.data.results import Origin

NEWEST, OLDER = "a" * 40, "b" * 40  # commits


def test_a_dataset_is_read_at_the_recorded_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = NEWEST  # the test changes it below

    def dataset_info(_: HfApi, name: str, revision: str | None, timeout: None) -> Any:
        if name != "org/data":
            raise OSError("404")
        unlisted = {"license": "other", "license_name": "a-research-licence"}
        card = DatasetCardData(**(unlisted if revision else {"license": ["mit", "cc0-1.0"]}))
        return SimpleNamespace(card_data=card, sha=revision or newest)

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    # ``bare`` has no revision, so its commit is the newest.
    bare, older = "hf://org/data@en:train", f"hf://org/data:train#revision={OLDER}"
    assert origin_of(bare) == Origin("mit, cc0-1.0", NEWEST)
    assert origin_of(older) == Origin("a-research-licence", OLDER)
    assert origin_of(f"{bare}#licence=of my own") == Origin("of my own", NEWEST)
    assert pin_commit(bare, origin_of(bare)) == f"{bare}#revision={NEWEST}"
    assert pin_commit(f"{bare}#name=x", origin_of(bare)) == f"{bare}#name=x&revision={NEWEST}"
    assert pin_commit(older, origin_of(older)) == older
    branch = "hf://org/data:train#revision=main&name=x"
    assert pin_commit(branch, Origin(commit=NEWEST)) == branch.replace("main", NEWEST)
    recorded = origins_of([bare, older], tmp_path / "origins.json")
    newest = "c" * 40
    assert origins_of([bare, older], tmp_path / "origins.json") == recorded
    assert origin_of(bare).commit == newest
    with pytest.raises(RecipeError, match="could not read dataset 'org/none' from the"):
        origin_of("hf://org/none:train")


def test_local_sources_have_the_licence_of_their_options(tmp_path: Path) -> None:
    file = str(tmp_path / "a.txt")
    assert origin_of(file) == Origin()
    assert origin_of(f"{file}#name=a&licence=public domain") == Origin("public domain")
    assert origin_of(f"hf://{tmp_path}:train") == Origin()
    assert pin_commit(file, Origin("x")) == file
