"""Fixed windows of tokens, and the order in which training goes through them.

Window w of a part is its tokens from w·S to w·S + S inclusive, documents running on: S inputs, and
the same shifted by one as labels. Nothing about a window is random, so what a teacher says about it
can be stored, and used whatever the seed, the batch or the number of epochs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def read_tokens(artifact: Path, part: str) -> Any:
    """All tokens of a part as one memory-mapped array [tokens].

    Megatron's ``IndexedDataset`` hands out a document at a time, by pointers that run through the
    ``.bin`` without gaps (``_IndexWriter._sequence_pointers``), so the file is one flat array.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from recipes.indexed_dataset import prefix

    path = prefix(artifact, part)
    return np.memmap(f"{path}.bin", dtype=IndexedDataset(str(path)).index.dtype, mode="r")


def count_windows(tokens: Any, seq_length: int) -> int:
    """Whole windows in a part, each with the label of its last token."""
    return (len(tokens) - 1) // seq_length


def window(tokens: Any, seq_length: int, number: int) -> Any:
    """Tokens of a window and the one after it, int64 [seq_length + 1]."""
    start = number * seq_length
    return tokens[start : start + seq_length + 1].astype(np.int64)


def window_order(ids: Any, total: int, seed: int, epoch: int) -> Any:
    """Permutes windows for an epoch; a subset keeps the order that it has in the whole.

    So a cache of the first windows of an epoch gives the batches of a run without one.

    Args:
        ids: Numbers of the windows to order, int64 [n].
        total: Windows in the part.
        seed: Seed of all epochs.
        epoch: Number of the epoch, from 0.
    """
    ranks = np.random.default_rng([seed, epoch]).random(total)
    return ids[np.argsort(ranks[ids], kind="stable")]
