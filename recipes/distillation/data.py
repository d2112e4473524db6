"""Training data: sequences of text, and the top-k of a cached teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nemo.collections import llm
from torch import Tensor
from torch.utils.data import Dataset

from recipes.backend.device import device
from recipes.core.errors import RecipeError
from recipes.core.stage import Input
from recipes.data.results import DatasetResult, SourceTokens
from recipes.data.token_sequences import (
    blend,
    count_sequences,
    read_loss_mask,
    read_tokens,
    require_seq_length,
    sequence_order,
    sequence_prediction_mask,
    sequence_tokens,
    sequences_by_source,
    weighted_sequences,
)
from recipes.distillation.logit_cache import TeacherCache
from recipes.distillation.settings import TrainingConfig

TEACHER_PREFIX = "teacher_"
"""Prefix of the names of a cached teacher's tensors in a batch."""


@dataclass(eq=False)
class TrainingSequences(Dataset):
    """Dataset of training samples: any number of epochs over the n sequences of a split.

    The number of a sequence is its index in the split. Without ``weights``, sample i is the
    sequence at position i mod n in the order of epoch i // n. With ``weights``, ``blend`` assigns
    samples to sources. Each source then has its own epochs, and sequences that span two sources
    are omitted.
    """

    tokens: np.ndarray
    """All tokens of the split."""
    seq_length: int
    num_samples: int
    """Length of the dataset: the number of samples of all epochs together."""
    seed: int | None = None
    """Seed that shuffles every epoch; ``None`` keeps the order of the text."""
    document_end: int | None = None
    """Id of the token that ends documents. The next token is not a target of the loss. ``None``
    masks no token. If ``loss_mask`` is set, ``document_end`` is not read."""
    loss_mask: np.ndarray | None = None
    """For each token of the split, whether it is a target of the loss."""
    attention_mask: Tensor | None = None
    """Attention mask that every sample gets; ``None`` gives samples no attention mask."""
    cache: TeacherCache | None = None
    """Cached teacher. Without ``numbers``, the dataset has only the sequences in the cache."""
    numbers: list[int] | None = None
    """Numbers of the sequences to use, in this order; ``None`` uses all sequences."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights by source. Without weights, the whole split counts as one source."""
    sources: Sequence[SourceTokens] = ()
    """Sources of the split; only read with ``weights``."""
    used_numbers: np.ndarray = field(init=False)
    """Numbers of all sequences that samples are taken from."""

    def __post_init__(self) -> None:
        total = self._total = count_sequences(self.tokens, self.seq_length)
        if self.numbers is not None:
            # ``total`` excludes a last sequence that has no next token to predict.
            available = np.array([n for n in self.numbers if n < total])
        elif self.cache is not None:
            available = self.cache.sequences
        else:
            available = np.arange(total)
        self._numbers_by_source = [available]
        if self.weights:
            by_source = weighted_sequences(self.weights, self.sources, self.seq_length, total)
            self._numbers_by_source = [np.intersect1d(numbers, available) for numbers in by_source]
            for name, numbers in zip(self.weights, self._numbers_by_source, strict=True):
                if not len(numbers):  # only with a cache; else ``weighted_sequences`` has failed
                    raise RecipeError(
                        f"the cached teacher has no sequence of source '{name}'.",
                        "raise num_sequences of cache_logits",
                    )
            # The source of each sample, and the sample's index among the samples of this source.
            self._blend = blend(list(self.weights.values()), self.num_samples)
        self.used_numbers = np.concatenate(self._numbers_by_source)
        # For each source, the epoch that was read last (-1 before the first) and the order of its
        # sequences. Samples are read in order, so no other epoch's order is needed.
        self._orders = [(-1, numbers) for numbers in self._numbers_by_source]
        self._positions = torch.arange(self.seq_length)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        """Returns the tensors of ``sequence``, and ``attention_mask`` if it is set.

        With a cached teacher, the result also has the tensors of ``TopK`` [seq_length, …]. Their
        names start with ``TEACHER_PREFIX``.
        """
        number = self.number_of(sample)
        item = self.sequence(number)
        if self.attention_mask is not None:
            item["attention_mask"] = self.attention_mask
        if self.cache is not None:
            top_k = self.cache.rows(number)
            item |= {f"{TEACHER_PREFIX}{name}": tensor for name, tensor in top_k.items()}
        return item

    def sequence(self, number: int) -> dict[str, Tensor]:
        """Returns tensors [seq_length] by name: a float32 ``loss_mask``, and others in int64."""
        tokens = torch.from_numpy(sequence_tokens(self.tokens, self.seq_length, number))
        mask = sequence_prediction_mask(
            self.tokens, self.loss_mask, self.seq_length, number, self.document_end
        )
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "position_ids": self._positions,
            "loss_mask": mask.float(),
        }

    def number_of(self, sample: int) -> int:
        """Returns the number of a sample's sequence."""
        source, index_in_source = 0, sample
        if self.weights:
            source, index_in_source = (int(values[sample]) for values in self._blend)
        numbers = self._numbers_by_source[source]
        epoch, position = divmod(index_in_source, len(numbers))
        if self.seed is None:
            return int(numbers[position])
        last_epoch, order = self._orders[source]
        if epoch != last_epoch:
            order = sequence_order(numbers, self._total, self.seed, epoch)
            self._orders[source] = (epoch, order)
        return int(order[position])


class TrainingData(llm.PreTrainingDataModule):  # type: ignore[misc]
    """NeMo's data module with ``TrainingSequences`` instead of Megatron's ``GPTDataset``.

    The sequences of ``GPTDataset`` depend on the seed and the number of steps, but a cached teacher
    needs fixed sequences. As with ``GPTDataset``, NeMo distributes the samples over data-parallel
    ranks, and a resumed run continues after the samples that were already used.
    """

    def __init__(
        self,
        artifact: Path,
        *,
        document_end: int | None,
        cache: TeacherCache | None,
        sources: Mapping[str, list[SourceTokens]],
        weights: Mapping[str, float],
        **settings: Any,
    ) -> None:
        """``sources`` is by split, ``weights`` by source; ``settings`` are for the base class."""
        # The base class requires existing paths, but ``setup`` reads the splits from ``artifact``.
        super().__init__(paths=[str(artifact / "train")], num_workers=0, **settings)
        self._artifact, self._document_end, self._cache = artifact, document_end, cache
        self._sources, self._weights = sources, weights

    @classmethod
    def of(
        cls, cfg: TrainingConfig, data: Input, tokenizer: Any, cache: TeacherCache | None
    ) -> TrainingData:
        """Returns the data of a training stage.

        Raises:
            RecipeError: The data has conversations that were packed for another ``seq_length``.
        """
        require_seq_length(data, cfg.seq_length)
        text = data.manifest.result(DatasetResult)
        return cls(
            data.artifact,
            document_end=text.document_end if cfg.mask_document_ends else None,
            cache=cache,
            sources=text.source_tokens,
            weights=cfg.weights,
            tokenizer=tokenizer,
            seq_length=cfg.seq_length,
            micro_batch_size=cfg.micro_batch_size,
            global_batch_size=cfg.global_batch_size,
            pin_memory=device() == "cuda",
            seed=cfg.seed,
        )

    def setup(self, stage: str = "") -> None:
        """Opens the splits. The trainer calls this method.

        Raises:
            RecipeError: The training split has less than one batch, or the validation split has no
                sequence.
        """
        batch_size = self.data_sampler.global_batch_size
        # One batch more than training uses. A run that was killed after its last step resumes after
        # all batches that training uses, and NeMo's sampler fails if no batch remains.
        samples = (self.trainer.max_steps + 1) * batch_size
        self._train_ds = self._sequences(
            "train",
            samples,
            seed=self.seed,
            cache=self._cache,
            weights=self._weights,
            sources=self._sources["train"],
        )
        self._require_batch(len(self._train_ds.used_numbers), batch_size)
        max_sequences = self.trainer.limit_val_batches * batch_size
        sources = self._sources["validation"]
        by_source = sequences_by_source(sources, self.seq_length, max_sequences).values()
        # Sources alternate: the first sequence of each, then the second of each, and so on. So
        # dropping an incomplete last batch does not drop a whole source.
        rounds = zip_longest(*by_source)  # has ``None`` after the last sequence of a source
        alternating = [number for numbers in rounds for number in numbers if number is not None]
        # The number of samples follows from the number of sequences, and is set below.
        validation = self._sequences("validation", samples=0, numbers=alternating)
        if not len(validation.used_numbers):
            raise RecipeError(
                f"no source of the validation data has a sequence of {self.seq_length} tokens and "
                "a next token.",
                "add text, raise stages.prepare_data.validation_fraction, or lower data.seq_length",
            )
        # Only whole batches are used. If there is less than one batch, sequences are repeated.
        whole_batches = len(validation.used_numbers) // batch_size
        batches = max(1, min(self.trainer.limit_val_batches, whole_batches))
        validation.num_samples = batches * batch_size
        self._validation_ds = self._test_ds = validation

    def _sequences(self, split: str, samples: int, **settings: Any) -> TrainingSequences:
        """Opens a split. ``settings`` are further fields of ``TrainingSequences``."""
        # Without TransformerEngine, NeMo's step requires an attention mask in the batch, although
        # the local attention does not read this mask.
        mask = torch.zeros(1, 1, 1, dtype=torch.bool) if self.create_attention_mask else None
        return TrainingSequences(
            read_tokens(self._artifact, split),
            self.seq_length,
            samples,
            document_end=self._document_end,
            loss_mask=read_loss_mask(self._artifact, split),
            attention_mask=mask,
            **settings,
        )

    def _require_batch(self, sequences: int, batch_size: int) -> None:
        if sequences >= batch_size:
            return
        source, fix = "training data", "add text, or lower data.seq_length or global_batch_size"
        if self._cache is not None:
            source = "cached teacher"
            fix = "raise num_sequences of cache_logits, or lower global_batch_size"
        raise RecipeError(
            f"the {source} has {sequences} sequences of {self.seq_length} tokens, less than one "
            f"batch of global_batch_size={batch_size}.",
            fix,
        )
