"""Tests training samples: sequences, masks, epochs, source weights, and resumed runs."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_convert import nemo
from recipes.core.errors import RecipeError
from recipes.data.results import SourceTokens
from recipes.data.split_writer import SplitWriter
from recipes.data.token_sequences import read_tokens
from recipes.distillation.data import TrainingData, TrainingSequences

LENGTH, END, SEED, BATCH = 8, 0, 7, 4
"""Tokens of a sequence, id of the token after every document, seed of the order of sequences, and
sequences of a global batch."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes documents of 1 to 29 tokens, each followed by ``END``.

    The tokens of a split are numbered from 1, so apart from ``END`` no token occurs twice.
    """
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    with SplitWriter(folder, ("train", "validation")) as writer:
        for split, documents in (("train", 20), ("validation", 5)):
            start = 1
            for size in generator.integers(1, 30, documents):
                writer.add(split, [*range(start, start + size), END])
                start += size
    return folder


@pytest.fixture(scope="module")
def all_tokens(data: Path) -> list[int]:
    """Reads the tokens of the training split, document by document, with Megatron."""
    documents = IndexedDataset(str(data / "train"))
    return [int(token) for i in range(len(documents)) for token in documents[i]]


class FakeTeacherCache:
    """Replaces ``TeacherCache``: a top-k cache with k = 2.

    All indices of a sequence are the sequence's number n, and all log-probabilities are -n.
    """

    def __init__(self, sequences: list[int]) -> None:
        self.sequences = np.array(sequences)

    def rows(self, sequence: int) -> dict[str, Any]:
        return {
            "indices": torch.full((LENGTH, 2), sequence),
            "log_probs": torch.full((LENGTH, 3), float(-sequence)),  # k tokens and the tail
        }


def sequences_of(data: Path, samples: int, **settings: Any) -> TrainingSequences:
    """Opens the training split. ``settings`` are further fields of ``TrainingSequences``."""
    return TrainingSequences(read_tokens(data, "train"), LENGTH, samples, **settings)


def number_of_sequences(data: Path) -> int:
    return len(sequences_of(data, 0).used_numbers)


def test_sequences_are_consecutive_tokens_of_the_concatenated_documents(
    data: Path, all_tokens: list[int]
) -> None:
    total = (len(all_tokens) - 1) // LENGTH  # the last label needs one more token
    dataset = sequences_of(data, total)
    assert len(dataset) == len(dataset.used_numbers) == total > 2 * BATCH
    for number in range(total):
        item, start = dataset[number], number * LENGTH
        assert item["tokens"].tolist() == all_tokens[start : start + LENGTH]
        assert item["labels"].tolist() == all_tokens[start + 1 : start + LENGTH + 1]
        assert item["position_ids"].tolist() == list(range(LENGTH))
        assert item["loss_mask"].tolist() == [1.0] * LENGTH
        assert {item[name].dtype for name in ("tokens", "labels", "position_ids")} == {torch.int64}
        assert item["loss_mask"].dtype == torch.float32


def test_predictions_after_the_end_of_a_document_are_masked(data: Path) -> None:
    dataset = sequences_of(data, 20, document_end=END)
    masked_count = 0
    for number in range(20):
        item = dataset[number]
        assert torch.equal(item["loss_mask"] == 0, item["tokens"] == END)
        masked_count += int((item["loss_mask"] == 0).sum())
        # The end token itself is predicted.
        assert item["loss_mask"][:-1][item["labels"][:-1] == END].all()
    assert masked_count > 5  # the sequences contain several ends of documents


def test_the_loss_mask_file_is_used_with_a_live_and_a_cached_teacher(
    data: Path, tmp_path: Path
) -> None:
    """Plants a random mask file beside the tokens, as ``prepare_data`` does for conversations."""
    generator = np.random.default_rng(1)
    loss_mask = {}
    for split in ("train", "validation"):
        for ending in ("bin", "idx"):
            (tmp_path / f"{split}.{ending}").symlink_to(data / f"{split}.{ending}")
        loss_mask[split] = generator.random(len(read_tokens(data, split))) < 0.3
        (tmp_path / f"{split}.loss_mask").write_bytes(loss_mask[split].tobytes())
    live = data_module(tmp_path, 2)
    all_numbers = list(range(len(live._train_ds.used_numbers)))
    cached = data_module(tmp_path, 2, cache=FakeTeacherCache(all_numbers))
    for split, dataset in (("train", live._train_ds), ("validation", live._validation_ds)):
        for sample in range(len(dataset)):
            # The mask is by target token, so it starts one token after the sequence.
            start = dataset.number_of(sample) * LENGTH + 1
            expected = loss_mask[split][start : start + LENGTH]
            assert (dataset[sample]["loss_mask"].numpy() > 0).tolist() == expected.tolist()
            if split == "train":  # validation does not use the cache
                with_teacher = cached._train_ds[sample]
                assert torch.equal(with_teacher["loss_mask"], dataset[sample]["loss_mask"])
                assert "teacher_indices" in with_teacher


def test_every_epoch_has_every_sequence_once_in_its_own_order(data: Path) -> None:
    count = number_of_sequences(data)
    dataset = sequences_of(data, 3 * count, seed=SEED)
    order = [dataset.number_of(i) for i in range(3 * count)]
    epochs = [order[e * count : (e + 1) * count] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    # A sample does not depend on the samples that were read before it.
    for sample in (2 * count, 0):
        assert sequences_of(data, 1, seed=SEED).number_of(sample) == order[sample]


def data_module(data: Path, steps: int, cache: Any = None, **settings: Any) -> TrainingData:
    """Returns the data module after ``setup``, for a run of ``steps`` steps.

    ``settings`` are further arguments of ``TrainingData``, and replace the defaults below.
    """
    nemo.initialize(nemo.Parallelism())
    arguments = {
        "tokenizer": SimpleNamespace(eos_id=END),
        "seq_length": LENGTH,
        "micro_batch_size": 2,
        "global_batch_size": BATCH,
        "seed": SEED,
        "output_log": False,
    }
    whole = [SourceTokens("all", len(read_tokens(data, "validation")))]
    arguments |= {"sources": {"train": [], "validation": whole}, "weights": {}, **settings}
    module = TrainingData(data, document_end=END, cache=cache, **arguments)
    module.trainer = SimpleNamespace(max_steps=steps, limit_val_batches=3, global_step=0)  # type: ignore[assignment]
    module.setup()
    return module


def first_tokens(module: TrainingData, split: str, consumed: int = 0) -> list[Any]:
    """Returns the first token of each sequence, as one list per micro batch of NeMo's sampler.

    ``consumed`` is the number of sequences that a resumed run has already used.
    """
    module.data_sampler.init_consumed_samples = consumed
    loader = module.train_dataloader() if split == "train" else module.val_dataloader()
    micro_batches = module.data_sampler.transform_dataloader(loader)
    return [batch["tokens"][:, 0].tolist() for batch in micro_batches]


def blend_settings(data: Path) -> dict[str, Any]:
    """Divides the training split into three sources; returns ``weights`` and ``sources``.

    The weights are not proportional to the sources' sizes.
    """
    length = len(read_tokens(data, "train"))
    sizes = {"small": 3 * LENGTH + 2, "large": 9 * LENGTH, "rest": length - 12 * LENGTH - 2}
    sources = [SourceTokens(name, size) for name, size in sizes.items()]
    return {"weights": {"rest": 1.0, "small": 3.0, "large": 6.0}, "sources": sources}


@pytest.mark.parametrize("weighted", [False, True])
def test_a_resumed_run_continues_at_its_step(data: Path, weighted: bool) -> None:
    settings: dict[str, Any] = {}
    if weighted:
        blend = blend_settings(data)
        validation = [SourceTokens("all", 10 * LENGTH)]
        sources = {"train": blend["sources"], "validation": validation}
        settings = {"weights": blend["weights"], "sources": sources}
    steps = 40  # more than an epoch
    module = data_module(data, steps, **settings)
    assert steps * BATCH > len(module._train_ds.used_numbers)
    uninterrupted = first_tokens(module, "train")
    assert len(uninterrupted) >= steps * 2  # two micro batches per step
    for step in (1, 7, 33):
        resumed = first_tokens(data_module(data, steps, **settings), "train", step * BATCH)
        assert resumed == uninterrupted[step * 2 :]
    # A run that is killed after its last step resumes without a step to train. This must not fail.
    first_tokens(data_module(data, steps, **settings), "train", steps * BATCH)


def test_weights_set_the_fractions_of_sources_and_each_source_has_epochs(data: Path) -> None:
    blend = blend_settings(data)
    dataset = sequences_of(data, 1000, seed=SEED, **blend)
    numbers = [dataset.number_of(i) for i in range(1000)]
    # The sources have 26, 72 and the other tokens of the split. So sequences 3 (tokens 24 to 31)
    # and 12 (tokens 96 to 103) span two sources, and are not used.
    spans = {"small": range(3), "large": range(4, 12), "rest": range(13, number_of_sequences(data))}
    by_source = {name: [n for n in numbers if n in span] for name, span in spans.items()}
    for name, weight in blend["weights"].items():
        # The weights add up to 10, so a weight of 1 means 100 of the 1000 samples.
        assert abs(len(by_source[name]) - 100 * weight) <= 1
        size = len(spans[name])  # sequences of an epoch of this source
        for start in range(0, len(by_source[name]) - size, size):
            assert sorted(by_source[name][start : start + size]) == list(spans[name])
    # A source has its fraction (0.3 for ``small``) of the samples at any time during training.
    for samples in range(1, 1000):
        small = sum(n in spans["small"] for n in numbers[:samples])
        assert abs(small - 0.3 * samples) <= 1
    # A sample does not depend on the samples read before it, nor on the length of training.
    shorter = sequences_of(data, 800, seed=SEED, **blend)
    for sample in (799, 3, 431):
        assert shorter.number_of(sample) == numbers[sample]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_cache_of_the_first_sequences_gives_the_batches_of_a_live_teacher(
    data: Path, weighted: bool
) -> None:
    blend = blend_settings(data) if weighted else {}
    live = sequences_of(data, 12, seed=SEED, **blend)
    first_numbers = [live.number_of(i) for i in range(12)]
    cache = FakeTeacherCache(sorted(set(first_numbers)))
    cached = sequences_of(data, 24, seed=SEED, cache=cache, **blend)
    assert [cached.number_of(i) for i in range(12)] == first_numbers
    if not weighted:  # the second epoch
        assert sorted(cached.number_of(i) for i in range(12, 24)) == sorted(first_numbers)
    for sample in range(24):
        item, sequence = cached[sample], cached.number_of(sample)
        assert torch.equal(item["teacher_indices"], torch.full((LENGTH, 2), sequence))
        assert torch.equal(item["teacher_log_probs"], torch.full((LENGTH, 3), float(-sequence)))
        # ``sequences_of(data, 99)`` has no seed, so its sample n is sequence n.
        assert torch.equal(item["tokens"], sequences_of(data, 99)[sequence]["tokens"])


def test_a_cache_without_a_weighted_source_is_refused(data: Path) -> None:
    without_rest = FakeTeacherCache([0, 5])  # one sequence of ``small`` and one of ``large``
    with pytest.raises(RecipeError, match=r"no sequence of source 'rest'.*\n.*num_sequences"):
        sequences_of(data, 60, seed=SEED, cache=without_rest, **blend_settings(data))


def test_a_weighted_source_needs_a_whole_sequence_and_its_next_token(data: Path) -> None:
    sources = [SourceTokens("large", 5 * LENGTH), SourceTokens("tiny", LENGTH - 1)]
    with pytest.raises(RecipeError, match="source 'tiny' has a weight, but not one sequence of 8"):
        sequences_of(data, 4, weights={"large": 1.0, "tiny": 1.0}, sources=sources)
    tokens = read_tokens(data, "train")
    length = len(tokens) // LENGTH * LENGTH  # tokens of all whole sequences
    sources = [SourceTokens("large", length - LENGTH), SourceTokens("last", LENGTH)]
    weights = {"last": 1.0, "large": 1.0}
    with pytest.raises(RecipeError, match=r"source 'last' has a weight.* next token"):
        TrainingSequences(tokens[:length], LENGTH, 4, weights=weights, sources=sources)
    longer = TrainingSequences(tokens[: length + 1], LENGTH, 4, weights=weights, sources=sources)
    # Sample 0 is from ``last``, the first source in ``weights``.
    assert longer.number_of(0) == length // LENGTH - 1


def test_weights_take_less_than_64_bytes_per_sequence(tmp_path: Path) -> None:
    """The tokens are a sparse file without data."""
    length, total = 4096, 10**10 // 4096  # tokens of a sequence, and number of sequences
    with (tmp_path / "train.bin").open("wb") as file:
        file.truncate(4 * length * (total + 1))  # 4 bytes per token
    tokens = np.memmap(tmp_path / "train.bin", dtype=np.int32, mode="r")
    sources = [SourceTokens(name, length * total // 2) for name in ("web", "chats")]
    tracemalloc.start()
    weights = {"web": 0.7, "chats": 0.3}
    dataset = TrainingSequences(tokens, length, total, SEED, weights=weights, sources=sources)
    assert dataset[total - 1]["tokens"].shape == (length,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / total < 64


def test_each_validation_has_the_same_whole_batches(data: Path) -> None:
    module = data_module(data, 5)
    text = read_tokens(data, "validation")
    count = (len(text) - 1) // LENGTH
    batches = min(3, count // BATCH)  # 3 is the ``limit_val_batches`` of ``data_module``
    expected = [int(text[number * LENGTH]) for number in range(batches * BATCH)]
    for _ in range(2):
        first = [token for batch in first_tokens(module, "validation") for token in batch]
        assert first == expected


def test_validation_sees_every_source(data: Path) -> None:
    """Sources alternate, and no sequence spans two sources."""
    text = read_tokens(data, "validation")
    size_of_one = 3 * LENGTH + 3
    sources = [SourceTokens("one", size_of_one), SourceTokens("two", len(text) - size_of_one)]
    splits = {"train": [], "validation": sources}
    module = data_module(data, 5, sources=splits, micro_batch_size=1, global_batch_size=2)
    tokens = [token for batch in first_tokens(module, "validation") for token in batch]
    # "one" has sequences 0 to 2, and "two" starts with sequence 4. Sequence 3 spans both sources.
    assert tokens == [int(text[number * LENGTH]) for number in (0, 4, 1, 5, 2, 6)]


@pytest.mark.parametrize(("one", "two"), [(LENGTH - 1, LENGTH + 1), (LENGTH - 1, LENGTH - 1)])
def test_validation_without_a_labelled_sequence_is_refused(
    data: Path, tmp_path: Path, one: int, two: int
) -> None:
    """``one`` and ``two`` are the tokens of two sources.

    The split is longer than a sequence. But each sequence spans both sources, or has no next token.
    """
    for ending in ("bin", "idx"):
        (tmp_path / f"train.{ending}").symlink_to(data / f"train.{ending}")
    with SplitWriter(tmp_path, ("validation",)) as writer:
        writer.add("validation", list(range(one + two)))
    splits = {"train": [], "validation": [SourceTokens("one", one), SourceTokens("two", two)]}
    with pytest.raises(RecipeError, match=r"of 8 .*\n.*prepare_data.validation_fraction"):
        data_module(tmp_path, 1, sources=splits)


def test_fewer_training_sequences_than_a_batch_are_refused(data: Path) -> None:
    with pytest.raises(RecipeError, match=r"the training data has .* less than one batch"):
        data_module(data, 1, global_batch_size=1000)
    with pytest.raises(RecipeError, match="raise num_sequences of cache_logits"):
        data_module(data, 1, cache=FakeTeacherCache([1, 2, 3]))
