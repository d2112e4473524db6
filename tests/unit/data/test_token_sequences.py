"""Tests the order of training sequences, and which predictions are in the loss."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.core.errors import RecipeError
from recipes.core.stage import Input
from recipes.data.results import DatasetResult, SourceTokens
from recipes.data.settings import PrepareDataConfig
from recipes.data.token_sequences import (
    TextSequences,
    count_sequences,
    read_sequences,
    require_heldout_sources,
    sequence_order,
    sequence_tokens,
    sequences_by_source,
    warn_of_short_sources,
)
from tests.support.manifests import bare_manifest


def test_each_epoch_and_seed_has_its_own_order_of_all_sequences() -> None:
    pairs = [(seed, epoch) for seed in (1, 2) for epoch in (0, 1, 7)]
    orders = {pair: tuple(sequence_order(np.arange(50), 50, *pair)) for pair in pairs}
    # All orders differ from each other and from the order of the text.
    assert len({*orders.values(), tuple(range(50))}) == len(pairs) + 1
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    # A second call returns the same order.
    assert tuple(sequence_order(np.arange(50), 50, 1, 0)) == orders[1, 0]


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_subset_keeps_the_order_of_the_whole(epoch: int) -> None:
    whole = sequence_order(np.arange(200), 200, seed=5, epoch=epoch)
    subset = np.random.default_rng(0).choice(200, size=37, replace=False)
    expected = [number for number in whole if number in set(subset)]
    assert list(sequence_order(subset, 200, seed=5, epoch=epoch)) == expected


@pytest.mark.parametrize(("tokens", "sequences"), [(9, 2), (8, 1), (5, 1), (4, 0)])
def test_a_sequence_needs_the_label_of_its_last_token(tokens: int, sequences: int) -> None:
    """A sequence has 4 tokens. Its last label is the next token of the text."""
    text = np.arange(tokens, dtype=np.int32)
    assert count_sequences(text, 4) == sequences
    for number in range(sequences):
        assert list(sequence_tokens(text, 4, number)) == list(range(number * 4, number * 4 + 5))


def test_predictions_of_the_token_after_an_end_token_are_not_in_the_loss() -> None:
    """The end token, here 0, is itself predicted. A sequence's first token is never predicted."""
    text = TextSequences.of(torch.tensor([[5, 0, 6, 7], [0, 8, 9, 0]]), end=0)
    assert text.prediction_mask.tolist() == [[True, False, True], [False, True, True]]
    assert (text.predictions, text.targets.tolist()) == (4, [0, 7, 9, 0])
    assert text[1:].targets.tolist() == [9, 0]
    assert TextSequences.of(text.tokens).predictions == 6  # all: 2 sequences of 4 - 1


def test_a_loss_mask_decides_which_predictions_are_in_the_loss() -> None:
    """With a loss mask, end tokens have no effect: a turn may end with the end token."""
    loss_mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    text = TextSequences.of(torch.tensor([[5, 0, 6, 7], [0, 8, 9, 0]]), 0, loss_mask)
    assert text.prediction_mask.tolist() == [[False, True, True], [True, False, False]]
    assert text.targets.tolist() == [6, 7, 8]


def test_each_source_has_the_sequences_that_are_completely_in_it() -> None:
    """The sources have the tokens 0 to 9, 10 and 11, and 12 to 25. A sequence has 4 tokens.

    Sequence 2 (tokens 8 to 11) spans two sources. A limit is divided by the number of sources.
    """
    sources = [SourceTokens("a", 10), SourceTokens("short", 2), SourceTokens("b", 14)]
    assert sequences_by_source(sources, 4) == {"a": range(2), "b": range(3, 6)}
    assert sequences_by_source(sources, 4, 3) == {"a": range(2), "b": range(3, 5)}
    assert sequences_by_source(sources, 4, 2) == {"a": range(1), "b": range(3, 4)}
    assert sequences_by_source(sources[:1], 4, 2) == {"a": range(2)}
    assert sequences_by_source(sources[1:2], 4, 2) == {}


def test_text_of_short_sources_without_a_whole_sequence_is_refused(tmp_path: Path) -> None:
    """Together the sources have 24 tokens, but each is shorter than a sequence."""
    entries = {"calibration": [SourceTokens("a", 12), SourceTokens("b", 12)]}
    result = DatasetResult({}, {}, [], entries, document_end=0)
    data = Input(tmp_path, bare_manifest("prepare_data", "dataset", result))
    with pytest.raises(RecipeError, match="a whole sequence of 16 tokens in calibration") as error:
        read_sequences(data, "calibration", 16)
    assert "so 31 tokens always suffice" in error.value.fix


def test_a_warning_names_sources_without_a_whole_sequence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The source "prose" is only for evaluation, and "mine" has text in all splits."""
    cfg = PrepareDataConfig(sources=["mine.txt"], heldout_sources=["prose.txt"], seq_length=4)
    enough, short = SourceTokens("mine", 40), SourceTokens("mine", 3)
    tokens = {split: [enough] for split in ("train", "validation", "calibration")}
    heldout = [SourceTokens("prose", 9), enough]
    warn_of_short_sources(cfg, tokens | {"heldout": heldout})
    assert not capsys.readouterr().out
    for split in tokens:
        warn_of_short_sources(cfg, tokens | {"heldout": heldout, split: [short]})
        assert re.search(f"warning: .*{split}: mine", capsys.readouterr().out)
    warn_of_short_sources(cfg, tokens | {"heldout": [enough]})
    assert "heldout: prose" in capsys.readouterr().out
    # As if all documents of "mine" repeated an earlier source.
    warn_of_short_sources(cfg, tokens | {"heldout": heldout, "train": []})
    assert "train: mine; cannot have a weight" in capsys.readouterr().out


def test_a_held_out_source_without_a_whole_sequence_is_refused() -> None:
    """Sequences of 4 tokens start at multiples of 4, so any 7 consecutive tokens have a whole one.

    "law" follows the 5 tokens of "prose". Its 6 tokens, 5 to 10, do not include 8 to 11.
    """
    cfg = PrepareDataConfig(
        sources=["mine.txt"], heldout_sources=["prose.txt", "law.txt"], seq_length=4
    )
    require_heldout_sources(cfg, {"prose": 5, "law": 7})
    for tokens in ({"prose": 5, "law": 6}, {"prose": 3, "law": 7}, {"prose": 5}, {}):
        with pytest.raises(RecipeError, match=r"(?s)heldout: (prose|law).*7 tokens"):
            require_heldout_sources(cfg, tokens)
    # The text that is trained on may have the same name.
    cfg.prefix, cfg.sources = "corpora/law", []
    with pytest.raises(RecipeError, match="heldout: law"):
        require_heldout_sources(cfg, {"prose": 5})
    # With this input, models are evaluated on that stage's held-out text instead.
    cfg.inputs["held_out"] = "prepare_data"
    require_heldout_sources(cfg, {})


def test_first_selects_the_first_sequences_of_each_source() -> None:
    tokens = torch.arange(10)[:, None].expand(10, 4)
    text = replace(TextSequences.of(tokens), sources={"a": slice(0, 6), "b": slice(6, 10)})
    # 3 / 2 sources is rounded up to 2 sequences each.
    assert text.first(3).tokens[:, 0].tolist() == [0, 1, 6, 7]
    assert TextSequences.of(tokens).first(3).tokens[:, 0].tolist() == [0, 1, 2]
