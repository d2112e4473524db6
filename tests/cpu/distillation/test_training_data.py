"""Training samples: sequences, masks, epochs, weights, and where a resumed run continues."""

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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 1 to 29 tokens and ``END``. In a split, all other tokens are different."""
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
    split = IndexedDataset(str(data / "train"))
    return [int(token) for i in range(len(split)) for token in split[i]]


class Cache:
    """Replaces a cached teacher. All values of a sequence are the sequence's number."""

    def __init__(self, sequences: list[int]) -> None:
        self.sequences = np.array(sequences)

    def rows(self, sequence: int) -> dict[str, Any]:
        return {
            "indices": torch.full((LENGTH, 2), sequence),
            "log_probs": torch.full((LENGTH, 3), float(-sequence)),
        }


def sequences_of(data: Path, samples: int, **settings: Any) -> TrainingSequences:
    return TrainingSequences(read_tokens(data, "train"), LENGTH, samples, **settings)


def test_sequences_are_those_of_the_concatenated_documents(
    data: Path, all_tokens: list[int]
) -> None:
    total = (len(all_tokens) - 1) // LENGTH
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
    masked = 0
    for number in range(20):
        item = dataset[number]
        assert torch.equal(item["loss_mask"] == 0, item["tokens"] == END)
        masked += int((item["loss_mask"] == 0).sum())
        # The end token itself is predicted.
        assert item["loss_mask"][:-1][item["labels"][:-1] == END].all()
    assert masked > 5


def test_the_loss_mask_of_the_data_is_used_with_both_teachers(data: Path, tmp_path: Path) -> None:
    """Only conversations have a loss mask. The data module finds the mask's file beside the tokens.

    The teachers are a live and a cached one.
    """
    generator = np.random.default_rng(1)
    loss_mask = {}
    for split in ("train", "validation"):
        for ending in ("bin", "idx"):
            (tmp_path / f"{split}.{ending}").symlink_to(data / f"{split}.{ending}")
        loss_mask[split] = generator.random(len(read_tokens(data, split))) < 0.3
        (tmp_path / f"{split}.loss_mask").write_bytes(loss_mask[split].tobytes())
    live = data_module(tmp_path, 2)
    cached = data_module(tmp_path, 2, cache=Cache(list(range(len(live._train_ds.used_numbers)))))
    for split, dataset in (("train", live._train_ds), ("validation", live._validation_ds)):
        for sample in range(len(dataset)):
            start = dataset.number_of(sample) * LENGTH + 1
            expected = loss_mask[split][start : start + LENGTH]
            assert (dataset[sample]["loss_mask"].numpy() > 0).tolist() == expected.tolist()
            if split == "train":
                with_teacher = cached._train_ds[sample]
                assert torch.equal(with_teacher["loss_mask"], dataset[sample]["loss_mask"])
                assert "teacher_indices" in with_teacher


def test_every_epoch_has_every_sequence_once_in_another_order(data: Path) -> None:
    count = len(sequences_of(data, 0).used_numbers)
    dataset = sequences_of(data, 3 * count, seed=SEED)
    order = [dataset.number_of(i) for i in range(3 * count)]
    epochs = [order[e * count : (e + 1) * count] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    # A sample does not depend on earlier ones.
    assert [sequences_of(data, 1, seed=SEED).number_of(i) for i in (2 * count, 0)] == [
        order[2 * count],
        order[0],
    ]


def test_a_cache_of_the_first_sequences_gives_the_batches_of_a_live_teacher(data: Path) -> None:
    live = sequences_of(data, 12, seed=SEED)
    first = [live.number_of(i) for i in range(12)]
    cached = sequences_of(data, 24, seed=SEED, cache=Cache(sorted(first)))
    assert [cached.number_of(i) for i in range(12)] == first
    assert sorted(cached.number_of(i) for i in range(12, 24)) == sorted(first)
    for sample in range(24):
        item, sequence = cached[sample], cached.number_of(sample)
        assert torch.equal(item["teacher_indices"], torch.full((LENGTH, 2), sequence))
        assert torch.equal(item["teacher_log_probs"], torch.full((LENGTH, 3), float(-sequence)))
        # Without a seed, sample n is sequence n.
        assert torch.equal(item["tokens"], sequences_of(data, 99)[sequence]["tokens"])


def data_module(data: Path, steps: int, cache: Any = None, **settings: Any) -> TrainingData:
    """Returns the data module after ``setup``."""
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
    """Returns the first token of every sequence in every micro batch of NeMo's sampler."""
    module.data_sampler.init_consumed_samples = consumed
    loader = module.train_dataloader() if split == "train" else module.val_dataloader()
    transformed = module.data_sampler.transform_dataloader(loader)
    return [batch["tokens"][:, 0].tolist() for batch in transformed]


def test_a_resumed_run_continues_at_its_step(data: Path) -> None:
    steps = 40  # more than an epoch
    module = data_module(data, steps)
    assert steps * BATCH > len(module._train_ds.used_numbers)
    uninterrupted = first_tokens(module, "train")
    assert len(uninterrupted) >= steps * 2  # two micro batches per step
    for step in (1, 7, 33):
        assert (
            first_tokens(data_module(data, steps), "train", step * BATCH)
            == uninterrupted[step * 2 :]
        )
    # A run that is killed after its last step resumes without a step to train. This must not fail.
    first_tokens(data_module(data, steps), "train", steps * BATCH)


def blend_settings(data: Path) -> dict[str, Any]:
    """Returns three sources of the training split, with weights unlike the sources' sizes."""
    length = len(read_tokens(data, "train"))
    sizes = {"small": 3 * LENGTH + 2, "large": 9 * LENGTH, "rest": length - 12 * LENGTH - 2}
    sources = [SourceTokens(name, size) for name, size in sizes.items()]
    return {"weights": {"rest": 1.0, "small": 3.0, "large": 6.0}, "sources": sources}


def test_weights_set_the_fraction_of_samples_and_sources_have_epochs(data: Path) -> None:
    blend = blend_settings(data)
    dataset = sequences_of(data, 1000, seed=SEED, **blend)
    numbers = [dataset.number_of(i) for i in range(1000)]
    # Sequences 3 and 12 span two sources, so no source has them.
    spans = {"small": range(3), "large": range(4, 12), "rest": range(13, number_of_sequences(data))}
    by_source = {name: [n for n in numbers if n in span] for name, span in spans.items()}
    for name, weight in blend["weights"].items():
        assert abs(len(by_source[name]) - 100 * weight) <= 1
        size = len(spans[name])
        for start in range(0, len(by_source[name]) - size, size):
            assert sorted(by_source[name][start : start + size]) == list(spans[name])
    for samples in range(1, 1000):  # sources keep their fractions at any time during training
        small = sum(n in spans["small"] for n in numbers[:samples])
        assert abs(small - 0.3 * samples) <= 1
    # A sample does not depend on earlier ones, nor on the length of training.
    again = sequences_of(data, 800, seed=SEED, **blend)
    assert [again.number_of(i) for i in (799, 3, 431)] == [numbers[i] for i in (799, 3, 431)]


def number_of_sequences(data: Path) -> int:
    return len(sequences_of(data, 0).used_numbers)


def test_a_resumed_run_with_weights_continues_at_its_step(data: Path) -> None:
    blend = blend_settings(data)
    settings = {"weights": blend["weights"], "sources": {"train": blend["sources"]}}
    settings["sources"]["validation"] = [SourceTokens("all", 10 * LENGTH)]
    whole = first_tokens(data_module(data, 40, **settings), "train")
    for step in (1, 33):
        resumed = first_tokens(data_module(data, 40, **settings), "train", step * BATCH)
        assert resumed == whole[step * 2 :]


def test_a_cache_gives_the_batches_of_a_live_teacher_with_weights(data: Path) -> None:
    blend = blend_settings(data)
    live = sequences_of(data, 60, seed=SEED, **blend)
    first = [live.number_of(i) for i in range(12)]
    cached = sequences_of(data, 60, seed=SEED, cache=Cache(sorted(set(first))), **blend)
    assert [cached.number_of(i) for i in range(12)] == first
    with pytest.raises(RecipeError, match=r"no sequence of source 'rest'.*\n.*num_sequences"):
        sequences_of(data, 60, seed=SEED, cache=Cache([0, 5]), **blend)


def test_a_weighted_source_needs_a_whole_sequence(data: Path) -> None:
    sources = [SourceTokens("large", 5 * LENGTH), SourceTokens("tiny", LENGTH - 1)]
    with pytest.raises(RecipeError, match="source 'tiny' has a weight, but not one sequence of 8"):
        sequences_of(data, 4, weights={"large": 1.0, "tiny": 1.0}, sources=sources)


def test_a_weighted_source_needs_a_next_token_after_its_sequence(data: Path) -> None:
    """The last sequence ends with the split's last token, so it has no next token to predict."""
    whole = read_tokens(data, "train")
    last = len(whole) // LENGTH * LENGTH
    sources = [SourceTokens("large", last - LENGTH), SourceTokens("last", LENGTH)]
    weights = {"last": 1.0, "large": 1.0}
    with pytest.raises(RecipeError, match=r"source 'last' has a weight.* next token"):
        TrainingSequences(whole[:last], LENGTH, 4, weights=weights, sources=sources)
    longer = TrainingSequences(whole[: last + 1], LENGTH, 4, weights=weights, sources=sources)
    assert longer.number_of(0) == last // LENGTH - 1


def test_weights_take_little_memory_for_100_billion_tokens(tmp_path: Path) -> None:
    """Requires less than 64 bytes per sequence. The tokens are a sparse file, which is not read."""
    length, total = 4096, 10**11 // 4096
    with (tmp_path / "train.bin").open("wb") as file:
        file.truncate(4 * length * (total + 1))
    tokens = np.memmap(tmp_path / "train.bin", dtype=np.int32, mode="r")
    sources = [SourceTokens(name, length * total // 2) for name in ("web", "chats")]
    tracemalloc.start()
    weights = {"web": 0.7, "chats": 0.3}
    dataset = TrainingSequences(tokens, length, total, SEED, weights=weights, sources=sources)
    assert dataset[total - 1]["tokens"].shape == (length,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / total < 64


def test_validation_always_has_the_same_whole_batches(data: Path) -> None:
    module = data_module(data, 5)
    text = read_tokens(data, "validation")
    count = (len(text) - 1) // LENGTH
    # 3 is the ``limit_val_batches`` of ``data_module``.
    expected = [int(text[number * LENGTH]) for number in range(min(3, count // BATCH) * BATCH)]
    for _ in range(2):
        first = [token for batch in first_tokens(module, "validation") for token in batch]
        assert first == expected


def test_validation_sees_every_source(data: Path) -> None:
    """Sources alternate, and no sequence spans two sources."""
    text = read_tokens(data, "validation")
    first = 3 * LENGTH + 3
    sources = [SourceTokens("one", first), SourceTokens("two", len(text) - first)]
    splits = {"train": [], "validation": sources}
    module = data_module(data, 5, sources=splits, micro_batch_size=1, global_batch_size=2)
    tokens = [token for batch in first_tokens(module, "validation") for token in batch]
    assert tokens == [int(text[number * LENGTH]) for number in (0, 4, 1, 5, 2, 6)]


@pytest.mark.parametrize(("one", "two"), [(LENGTH - 1, LENGTH + 1), (LENGTH - 1, LENGTH - 1)])
def test_validation_without_a_labelled_sequence_is_refused(
    data: Path, tmp_path: Path, one: int, two: int
) -> None:
    """The split is longer than a sequence, but no sequence in one source has a next token."""
    for ending in ("bin", "idx"):
        (tmp_path / f"train.{ending}").symlink_to(data / f"train.{ending}")
    with SplitWriter(tmp_path, ("validation",)) as writer:
        writer.add("validation", list(range(one + two)))
    splits = {"train": [], "validation": [SourceTokens("one", one), SourceTokens("two", two)]}
    with pytest.raises(RecipeError, match=r"of 8 .*\n.*prepare_data.validation_fraction"):
        data_module(tmp_path, 1, sources=splits)


def test_less_than_a_batch_is_refused(data: Path) -> None:
    with pytest.raises(RecipeError, match=r"the training data has .* less than one batch"):
        data_module(data, 1, global_batch_size=1000)
    with pytest.raises(RecipeError, match="raise num_sequences of cache_logits"):
        data_module(data, 1, cache=Cache([1, 2, 3]))
