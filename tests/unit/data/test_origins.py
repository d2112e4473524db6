"""Licences and commits of sources; those on a hub from a replacement of its client."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi

from recipes.core.errors import RecipeError
from recipes.data.results import Origin
from recipes.data.sources import origin_of, origins_of, pinned

NEWEST, OLDER = "a" * 40, "b" * 40


def test_a_dataset_is_read_at_the_recorded_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = NEWEST

    def dataset_info(_: HfApi, name: str, revision: str | None) -> Any:
        if name != "org/data":
            raise OSError("404")
        card = SimpleNamespace(license="cc-by-4.0" if revision else ["mit", "cc0-1.0"])
        return SimpleNamespace(card_data=card, sha=revision or newest)

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    bare, older = "hf://org/data@en:train", f"hf://org/data:train#revision={OLDER}"
    assert origin_of(bare) == Origin("mit, cc0-1.0", NEWEST)
    assert origin_of(older) == Origin("cc-by-4.0", OLDER)
    assert origin_of(f"{bare}#licence=of my own") == Origin("of my own", NEWEST)
    assert pinned(bare, origin_of(bare)) == f"{bare}#revision={NEWEST}"
    assert pinned(f"{bare}#name=x", origin_of(bare)) == f"{bare}#name=x&revision={NEWEST}"
    assert pinned(older, origin_of(older)) == older
    recorded = origins_of([bare, older], tmp_path / "origins.json")
    newest = "c" * 40
    assert origins_of([bare, older], tmp_path / "origins.json") == recorded
    assert origin_of(bare).commit == newest
    with pytest.raises(RecipeError, match="could not read dataset 'org/none' from the"):
        origin_of("hf://org/none:train")


def test_local_sources_have_the_licence_of_their_options(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    assert origin_of(str(file)) == Origin()
    assert origin_of(f"{file}#name=a&licence=public domain") == Origin("public domain")
    assert origin_of(f"hf://{tmp_path}:train") == Origin()
    assert pinned(str(file), Origin("x")) == str(file)
