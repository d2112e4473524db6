"""Tests the checks of ``prepare_data`` on its settings, and on the tokens of its splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import DatasetCardData, HfApi

from nemo_convert.hub import HUB_SECONDS
from recipes.core.errors import RecipeError
from recipes.data.settings import PrepareDataConfig
from recipes.planning.chain import Chain
from recipes.stages import prepare_data


@pytest.fixture
def text(tmp_path: Path) -> str:
    """The path of a JSON-lines file with one document."""
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\n')
    return str(tmp_path / "text.jsonl")


def test_the_result_depends_on_text_files_and_folders_with_datasets(
    text: str, chain: Chain, tmp_path: Path
) -> None:
    cfg = PrepareDataConfig(sources=[text], seq_length=1024)
    assert list(prepare_data.check(cfg, chain)) == []
    assert prepare_data.external(cfg) == {text: Path(text)}
    cfg = PrepareDataConfig(sources=[f"hf://{tmp_path}:train#weight=1", "hf://org/data:train"])
    assert prepare_data.external(cfg) == {str(tmp_path): tmp_path}


def test_licences_on_the_hub_are_checked(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake hub has a dataset ``org/LICENCE`` for each licence.

    ``org/bare`` has no licence. A request for ``org/none`` fails. After a failed request the check
    sends no more requests, even if it runs again.
    """
    requests = []

    def dataset_info(_: HfApi, name: str, **options: object) -> object:
        requests.append((name, options["timeout"]))
        if name == "org/none":
            raise OSError("no answer")
        licence = None if name == "org/bare" else name.removeprefix("org/")
        return SimpleNamespace(card_data=DatasetCardData(license=licence), sha="a" * 40)

    def problems(*names: str) -> list[tuple[str, str]]:
        cfg = PrepareDataConfig(sources=[f"hf://org/{name}" for name in names])
        return [(problem.rule.name, problem.what) for problem in prepare_data.check(cfg, chain)]

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    [(rule, what)] = problems("mit:all", "cc-by-nc-4.0:all", "other:all#licence=mit")
    assert rule == "licence"
    assert "cc-by-nc-4.0, forbids commercial use" in what
    # The third source states its licence, so it needs no request.
    assert requests == [("org/mit", HUB_SECONDS), ("org/cc-by-nc-4.0", HUB_SECONDS)]
    [(rule, what)] = problems("bare:all")
    assert rule == "licence"
    assert "org/bare" in what
    requests.clear()
    for _ in range(2):
        assert [rule for rule, _ in problems("none:all", "mit:all")] == ["licence"] * 2
    assert requests == [("org/none", HUB_SECONDS)]


@pytest.mark.parametrize(
    ("settings", "rule", "expected_text"),
    [
        ({"sources": []}, "data-sources", "data.sources"),
        ({"sources": ["a.doc"]}, "data-sources", "a.doc"),
        ({"heldout_sources": ["missing.txt"]}, "data-sources", "missing.txt"),
        ({"heldout_sources": ["TEXT"]}, "data-sources", "data.heldout_sources"),  # also in sources
        *(
            ({"sources": [f"TEXT#weight={weight}"]}, "data-sources", f"invalid weight={weight} ")
            for weight in ("0", "-1", "nan", "inf", "1e308", "half", "[1,2]")
        ),
        ({"sources": ["TEXT#weight=1", "OTHER"]}, "data-sources", "OTHER' has no weight"),
        ({"heldout_sources": ["OTHER#weight=1"]}, "data-sources", "held-out source 'OTHER#weight"),
        ({"heldout_sources": ["TEXT"], "sources": ["TEXT#weight=1"]}, "data-sources", "twice"),
        ({"sources": ["TEXT#weight=1", "TEXT#name=x&weight=2"]}, "data-sources", "twice"),
        ({"sources": ["TEXT#format=dialogue"]}, "data-sources", "line 1"),
        ({"text_field": "words"}, "data-sources", "line 1: no text in field 'words'"),
        # No text would be left for training. Defaults: validation 0.02, calibration, heldout 0.04.
        ({"calibration_fraction": 0.94}, "data-splits", "fractions"),
        ({"validation_fraction": 0.5, "heldout_fraction": 0.5}, "data-splits", "fractions"),
        ({"seq_length": 0}, "seq-length", "seq_length=0"),
        ({"seq_length": 1025}, "seq-length", "seq_length=1025"),
    ],
)
def test_prepare_data_refuses_invalid_sources_and_splits(
    text: str, chain: Chain, settings: dict[str, Any], rule: str, expected_text: str
) -> None:
    """``TEXT`` and ``OTHER`` are placeholders for the paths of two files."""
    other = str(Path(text).with_name("other.txt"))
    Path(other).write_text("other")
    settings = {"sources": ["TEXT"], **settings}
    for name in settings.keys() & {"sources", "heldout_sources"}:
        for placeholder, path in (("TEXT", text), ("OTHER", other)):
            settings[name] = [source.replace(placeholder, path) for source in settings[name]]
    [problem] = prepare_data.check(PrepareDataConfig(**settings), chain)
    assert problem.rule.name == rule
    assert expected_text.replace("OTHER", other) in problem.what


def test_the_error_lists_splits_with_too_few_tokens() -> None:
    """A split must have more tokens than one sequence, which has 256 here."""
    tokens = Counter(train=1000, validation=256, calibration=257)  # a missing split, heldout, has 0
    chats = {"chats": {"used": 3, "shortened": 0, "too long": 90}}
    with pytest.raises(RecipeError, match="validation: 256, heldout: 0") as caught:
        prepare_data._require_sequences(tokens, 256, chats)
    assert "Of chats, 3 used, 90 too long." in str(caught.value)
    enough_tokens = Counter(train=257, validation=257, calibration=257, heldout=257)
    prepare_data._require_sequences(enough_tokens, 256, {})  # raises no error
