"""Tests that the cache has the teacher's probabilities, in each layout and after restarts."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from safetensors import safe_open
from safetensors.numpy import load_file

from nemo_convert import convert
from nemo_convert.hf import load_causal_lm
from nemo_convert.nemo import find_checkpoint
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, WORK
from recipes.core.metrics import METRICS, MetricsLog, steps_of
from recipes.core.stage import DEADLINE, Input
from recipes.distillation.logit_cache import (
    SHARD,
    CacheIndex,
    TeacherCache,
    cache_metrics,
    write_shard,
)
from recipes.distillation.logit_cache_writer import cache_logits
from recipes.distillation.objective import _require_same_text
from recipes.distillation.settings import CacheLogitsConfig
from recipes.distillation.vocabulary import TopK
from tests.support.in_process import run_in_process, run_successfully
from tests.support.launcher import run_and_kill
from tests.support.models import EVEN, write_tiny_model
from tests.support.runs import copy_without, manifest_of, settings, tiny

LENGTH, TOP_K, DRAWS, TEMPERATURE, SEQUENCES, PER_SHARD = 48, 16, 5, 1.5, 130, 12
"""Settings of the cache; ``command`` shows their names. The last shard has only 10 sequences."""
ROUNDING = 2.0**-11
"""Relative rounding error of float16, which has 11 significant bits."""


@pytest.fixture(scope="module")
def command(even_llama: Path, text_file: Path) -> list[str]:
    """The overrides of a run that caches a teacher's logits, in the folder ``run``."""
    cache = {
        "top_k": TOP_K,
        "tail_draws": DRAWS,
        "num_sequences": SEQUENCES,
        "sequences_per_shard": PER_SHARD,
        "micro_batch_size": 3,
        "precision": 32,
    }
    return [
        "recipe=llama_depth_prune",
        "teacher=cached",
        *tiny(even_llama, text_file, Path("run"), LENGTH),
        "only=[import_hf,prepare_data,cache_logits]",
        "stages.prune.target_num_layers=2",
        f"stages.distill.temperature={TEMPERATURE}",
        *settings("cache_logits", **cache),
    ]


def stage_of(run_dir: Path, stage: str) -> Input:
    """Returns a complete stage as other stages get it."""
    return Input(run_dir / stage, manifest_of(run_dir, stage))


def open_cache(run_dir: Path) -> TeacherCache:
    return TeacherCache(run_dir / "cache_logits" / ARTIFACT)


@pytest.fixture(scope="module")
def tokens_and_logits(one_rank: Path, even_llama: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [n, S + 1] of the cached sequences, and transformers' logits [n, S, vocabulary]."""
    documents = IndexedDataset(str(one_rank / "prepare_data" / ARTIFACT / "train"))
    text = np.concatenate([documents[i] for i in range(len(documents))]).astype(np.int64)
    # A row has one more token than a sequence, because the targets are shifted by one.
    rows = [text[n * LENGTH : (n + 1) * LENGTH + 1] for n in open_cache(one_rank).sequences]
    tokens = torch.from_numpy(np.stack(rows))
    with torch.no_grad():
        logits = load_causal_lm(even_llama)(tokens[:, :-1]).logits.double()
    return tokens, logits


def test_cached_probabilities_equal_those_of_transformers(
    one_rank: Path, tokens_and_logits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    cache, (_, logits) = open_cache(one_rank), tokens_and_logits
    assert len(cache.sequences) == len(set(cache.sequences.tolist())) == SEQUENCES
    expected_log_probs = (logits / TEMPERATURE).log_softmax(dim=-1)
    for number, expected in zip(cache.sequences, expected_log_probs, strict=True):
        rows = cache.rows(int(number))
        indices, log_probs = rows["indices"], rows["log_probs"]
        assert indices.shape == (LENGTH, TOP_K)
        assert log_probs.shape == (LENGTH, TOP_K + 1)
        assert len(set(indices[0].tolist())) == TOP_K
        # Compared by value, because the order of equally likely tokens is arbitrary.
        best, selected = expected.topk(TOP_K, dim=-1).values, expected.gather(-1, indices)
        torch.testing.assert_close(selected, best, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            log_probs[:, :TOP_K].double(), selected, rtol=ROUNDING, atol=1e-4
        )
        log_tail = expected.exp().scatter(-1, indices, 0).sum(dim=-1).log()
        torch.testing.assert_close(log_probs[:, TOP_K].double(), log_tail, rtol=ROUNDING, atol=1e-4)
        tail = expected.scatter(-1, indices, -math.inf)
        # Log-probabilities of -inf are replaced, because -inf · 0 would be NaN.
        entropy = -(tail.exp() * tail.clamp(min=-1e9)).sum(dim=-1, keepdim=True)
        torch.testing.assert_close(
            rows["tail_entropy"].double(), entropy, rtol=2 * ROUNDING, atol=1e-4
        )
        # The tail's probability is divided into DRAWS equal intervals. Draw i is the token at some
        # point of interval i. So the token's range of cumulative probability, from ``starts`` to
        # ``ends``, overlaps the interval.
        assert rows["draws"].shape == (LENGTH, DRAWS)
        interval_lengths = log_tail.exp()[:, None] / DRAWS
        interval_starts = torch.arange(DRAWS) * interval_lengths
        ends = tail.exp().cumsum(dim=-1).gather(-1, rows["draws"])
        starts = ends - tail.exp().gather(-1, rows["draws"])
        assert (ends > interval_starts - 1e-5).all()
        assert (starts < interval_starts + interval_lengths + 1e-5).all()


def test_the_manifest_has_the_teachers_loss_and_tail(
    one_rank: Path, tokens_and_logits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The loss is over the predictions that training does not mask.

    Training masks the prediction after the end of a document.
    """
    tokens, logits = tokens_and_logits
    metrics = stage_of(one_rank, "cache_logits").manifest.metrics
    document_end = stage_of(one_rank, "prepare_data").manifest.metrics["document_end"]
    unmasked = tokens[:, :-1] != document_end
    loss = torch.nn.functional.cross_entropy(logits[unmasked], tokens[:, 1:][unmasked])
    assert metrics["teacher_loss"] == pytest.approx(loss.item(), rel=1e-4)
    probabilities = (logits / TEMPERATURE).softmax(dim=-1)
    tail = 1 - probabilities.topk(TOP_K, dim=-1).values.sum(dim=-1)
    assert metrics["tail_mass"] == pytest.approx(tail.mean().item(), rel=1e-4)
    assert metrics["sequences"] == SEQUENCES < metrics["sequences_of_text"]
    assert metrics["tokens"] == SEQUENCES * LENGTH
    # All values have 2 bytes: ``indices``, ``log_probs``, and ``draws`` with one ``tail_entropy``.
    assert metrics["bytes_per_token"] == 2 * TOP_K + 2 * (TOP_K + 1) + 2 * (DRAWS + 1)
    # The artifact also has an index, the headers of shards, and the numbers of sequences.
    actual_bytes = stage_of(one_rank, "cache_logits").manifest.total_bytes() / metrics["tokens"]
    assert metrics["bytes_per_token"] < actual_bytes < 1.15 * metrics["bytes_per_token"]


def shards_of(run_dir: Path) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """Returns tensors and metadata of each shard of a complete cache, by file name."""
    files = sorted((run_dir / "cache_logits" / ARTIFACT).glob("*.safetensors"))
    return {file.name: (load_file(file), safe_open(file, "np").metadata()) for file in files}


def test_a_killed_and_a_stopped_run_resume_to_the_same_cache(
    one_rank: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Modification time in ns of each shard that the killed run has written, by file name.
    kept_shards: dict[str, int] = {}
    # On a busy machine, a run may end before it is killed. Its working directory is then deleted,
    # and another run is tried.
    for attempt in range(5):
        if kept_shards:
            break
        folder = tmp_path / str(attempt)
        stage = copy_without(one_rank, folder / "run", "cache_logits") / "cache_logits"
        run_and_kill(*command, cwd=folder, metrics=stage / METRICS, records=2)
        kept_shards = {
            path.name: path.stat().st_mtime_ns
            for path in (stage / WORK / "shards").glob("*.safetensors")
        }
    expected = shards_of(one_rank)
    assert 2 <= len(kept_shards) < len(expected) == math.ceil(SEQUENCES / PER_SHARD)
    # A crash of the machine can truncate a shard. A restart must write it again.
    truncated = stage / WORK / "shards" / min(kept_shards)
    os.truncate(truncated, truncated.stat().st_size - 1)
    del kept_shards[truncated.name]

    monkeypatch.setenv(DEADLINE, "1")  # seconds since 1970, so the deadline has passed
    stopped = run_in_process(*command, cwd=folder)
    assert stopped.code == 1
    assert f"stopped at the deadline before all {len(expected)} shards" in stopped.output
    shards_at_deadline = list((stage / WORK / "shards").glob("*.safetensors"))
    assert len(shards_at_deadline) == len(kept_shards) + 1  # these and the truncated shard
    monkeypatch.delenv(DEADLINE)

    run_successfully(*command, cwd=folder)
    for name, time in kept_shards.items():
        assert (stage / ARTIFACT / name).stat().st_mtime_ns == time, f"{name} was written again"
    resumed = shards_of(folder / "run")
    assert resumed.keys() == expected.keys()
    for name, (tensors, metadata) in expected.items():
        resumed_tensors, resumed_metadata = resumed[name]
        assert resumed_metadata == metadata, name
        for key, tensor in tensors.items():
            assert np.array_equal(resumed_tensors[key], tensor), (name, key)
    done = [step["done"] for step in steps_of(stage / METRICS, "cache")]
    assert done[-1] == len(expected)
    assert not (stage / WORK).exists()


@pytest.mark.parametrize("tensor_parallel_size", [1, 2], ids=["DP=2", "TP=2"])
def test_two_ranks_write_the_same_cache_as_one(
    one_rank: Path, command: list[str], tmp_path: Path, tensor_parallel_size: int
) -> None:
    copy = copy_without(one_rank, tmp_path / "run", "cache_logits")
    layout = {"resources.devices": 2, "tensor_model_parallel_size": tensor_parallel_size}
    run_successfully(*command, *settings("cache_logits", **layout), cwd=tmp_path)
    by_one_rank, by_two_ranks = shards_of(one_rank), shards_of(copy)
    assert by_one_rank.keys() == by_two_ranks.keys()
    for name, (expected, metadata) in by_one_rank.items():
        actual, actual_metadata = by_two_ranks[name]
        assert np.array_equal(actual["sequences"], expected["sequences"])
        # The order of equally likely tokens is arbitrary, and sums over ranks round differently.
        for tensor in ("indices", "draws"):
            assert (actual[tensor] == expected[tensor]).mean() > 0.99, (name, tensor)
        np.testing.assert_allclose(
            actual["log_probs"].astype(np.float64),
            expected["log_probs"].astype(np.float64),
            rtol=4 * ROUNDING,
            atol=1e-4,
        )
        for key, value in metadata.items():
            assert float(actual_metadata[key]) == pytest.approx(float(value), rel=1e-4)


def test_a_cache_of_other_text_is_refused(one_rank: Path) -> None:
    cache = stage_of(one_rank, "cache_logits")
    _require_same_text(cache, stage_of(one_rank, "prepare_data"))
    with pytest.raises(RecipeError, match="was cached for other text"):
        # The manifest of a checkpoint stands in for that of other text: its content differs.
        _require_same_text(cache, stage_of(one_rank, "import_hf"))


def test_a_random_teacher_is_refused(one_rank: Path, text_file: Path, tmp_path: Path) -> None:
    hf_teacher = write_tiny_model(tmp_path / "hf", text_file, train=False, **EVEN)
    teacher, shards = tmp_path / "random.nemo", tmp_path / "shards"
    convert.to_nemo(hf_teacher, teacher)
    cfg = CacheLogitsConfig(seq_length=LENGTH, num_sequences=8)
    data = stage_of(one_rank, "prepare_data")
    with pytest.raises(RecipeError, match="hardly below chance"):
        cache_logits(cfg, teacher, data, shards, tmp_path, MetricsLog(None))
    assert not list(shards.iterdir())  # no shard was written


def test_single_sequences_with_a_high_loss_are_accepted(one_rank: Path, tmp_path: Path) -> None:
    """With one sequence per shard, the loss of some shards is above the limit for a teacher.

    Only the first shard is compared with the limit, so the teacher is accepted.
    """
    cfg = CacheLogitsConfig(
        top_k=TOP_K,
        seq_length=LENGTH,
        num_sequences=SEQUENCES,
        sequences_per_shard=1,
        precision="32",
    )
    data = stage_of(one_rank, "prepare_data")
    teacher = find_checkpoint(one_rank / "import_hf" / ARTIFACT)
    out = tmp_path / "out"
    out.mkdir()
    cache_logits(cfg, teacher, data, tmp_path / "shards", out, MetricsLog(None))


def test_ids_of_a_large_vocabulary_take_four_bytes() -> None:
    """Ids below 2^16 take two bytes, as in the other tests."""
    index = CacheIndex(
        vocabulary=(1 << 16) + 1, seq_length=8, top_k=4, temperature=1.0, shards=1, tail_draws=3
    )
    assert index.tensors["indices"] == (torch.int32, 4)
    assert index.tensors["draws"] == (torch.int32, 3)


def test_the_teachers_loss_is_weighted_by_unmasked_tokens(tmp_path: Path) -> None:
    """In the first shard, few tokens are unmasked, as in a conversation with short answers."""
    index = CacheIndex(vocabulary=8, seq_length=4, top_k=1, temperature=1.0, shards=2)
    top = TopK(torch.zeros(1, 4, 1), torch.zeros(1, 4, 2))
    for shard, (loss, loss_tokens) in enumerate(((1.0, 1), (3.0, 3))):
        file = tmp_path / SHARD.format(shard)
        write_shard(file, index, [shard], top, loss, loss_tokens)
    assert cache_metrics(tmp_path, index) == {"teacher_loss": 2.5, "tail_mass": 1.0}
