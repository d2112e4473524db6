"""Cache of a teacher's top-k: the k likeliest next tokens at every position of a text.

The cache is a directory with ``index.json`` and the shards ``00000.safetensors``,
``00001.safetensors`` and so on. A shard has n sequences, in these tensors:

- ``sequences`` int32 [n]: for each sequence, its index in the text;
- ``indices`` uint16 or int32 [n, seq_length, k]: the k likeliest tokens, the likeliest first;
- ``log_probs`` float16 [n, seq_length, k + 1]: the log-probabilities of these tokens, and of the
  tail, which is all other tokens together;
- if the tail was sampled, ``draws`` uint16 or int32 [n, seq_length, draws]: the sampled tokens;
- if the tail was sampled, ``tail_entropy`` float16 [n, seq_length, 1]: -Σ p·log p over the tail.

With a vocabulary of at most 65,536 tokens, the cache takes 130 bytes per token of text for k = 32,
514 for k = 128, and 48 for k = 8 with 6 draws. Rounding a log-probability to float16 changes a
large probability by about 0.05% of its value, and a probability of 1 in 10,000 by 0.4%.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recipes.core.files import read_json, write_json
from recipes.distillation.settings import SMALL_VOCABULARY
from recipes.distillation.vocabulary import TopK

INDEX, SHARD = "index.json", "{:05d}.safetensors"
"""File name of the index, and format of a shard's file name from the shard's number."""


@dataclass(frozen=True)
class CacheIndex:
    """Content of ``index.json``: settings that all shards share, and the number of shards."""

    vocabulary: int
    """Size of the vocabulary."""
    seq_length: int
    top_k: int
    temperature: float
    """Divisor of the teacher's logits before the softmax."""
    shards: int
    tail_draws: int = 0
    """Number of tokens sampled from the tail at each position."""

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, int]]:
        """Maps the name of each stored tensor of ``TopK`` to its dtype and last dimension."""
        id_type = torch.uint16 if self.vocabulary <= SMALL_VOCABULARY else torch.int32
        top_k = {"indices": (id_type, self.top_k), "log_probs": (torch.float16, self.top_k + 1)}
        samples = {"draws": (id_type, self.tail_draws), "tail_entropy": (torch.float16, 1)}
        return top_k | (samples if self.tail_draws else {})


def write_index(folder: Path, index: CacheIndex) -> None:
    """Writes ``index.json``."""
    write_json(folder / INDEX, asdict(index))


def write_shard(
    path: Path,
    index: CacheIndex,
    sequences: list[int],
    top: TopK,
    teacher_loss: float,
    loss_tokens: int,
) -> None:
    """Writes one shard atomically. Metadata in the shard has the metrics for ``cache_metrics``.

    ``top`` [n, seq_length, …] is the teacher's top-k on the n sequences with the numbers
    ``sequences``. ``teacher_loss`` is the teacher's mean LM loss over the unmasked tokens of these
    sequences, and ``loss_tokens`` is the number of these tokens.
    """
    partial = path.with_suffix(".partial")
    tensors = {"sequences": torch.tensor(sequences, dtype=torch.int32)} | {
        name: getattr(top, name).to(dtype).contiguous()
        for name, (dtype, _) in index.tensors.items()
    }
    tail_mass = top.log_probs[..., -1].exp().mean().item()  # the tail's mean probability
    metrics = {"teacher_loss": teacher_loss, "tail_mass": tail_mass, "loss_tokens": loss_tokens}
    metadata = {name: str(value) for name, value in metrics.items()}
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)


def is_complete(path: Path) -> bool:
    """Returns whether a shard exists and is not truncated."""
    try:  # opening fails if the file is shorter or longer than its header says
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def cache_metrics(folder: Path, index: CacheIndex) -> dict[str, float]:
    """Averages the metrics of all shards.

    Returns ``teacher_loss``, the teacher's mean LM loss over unmasked tokens, and ``tail_mass``,
    the mean probability of the tail over all tokens.
    """
    loss = tail = 0.0
    loss_tokens = sequences = 0
    for shard in range(index.shards):
        with safe_open(folder / SHARD.format(shard), framework="pt") as file:
            metrics, count = file.metadata(), len(file.get_tensor("sequences"))
        loss += int(metrics["loss_tokens"]) * float(metrics["teacher_loss"])
        tail += count * float(metrics["tail_mass"])
        loss_tokens += int(metrics["loss_tokens"])
        sequences += count
    return {"teacher_loss": loss / max(1, loss_tokens), "tail_mass": tail / sequences}


class TeacherCache:
    """Reads an artifact of ``cache_logits`` during training."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.index = CacheIndex(**read_json(folder / INDEX))
        self._files: dict[int, Any] = {}
        numbers_by_shard = [
            self._open(shard).get_tensor("sequences").tolist() for shard in range(self.index.shards)
        ]
        # Maps the number of each sequence to its shard and its row in the shard.
        self._locations = {
            number: (shard, row)
            for shard, numbers in enumerate(numbers_by_shard)
            for row, number in enumerate(numbers)
        }
        self.sequences = np.concatenate(numbers_by_shard).astype(np.int64)
        """Numbers of the cached sequences, int64 [n]. In a rehearsal (a run on fake tensors) shards
        are files of zeros, so all numbers are 0."""

    def rows(self, sequence: int) -> dict[str, Tensor]:
        """Reads the tensors [seq_length, …] of ``TopK``, by name, for one sequence number."""
        shard, row = self._locations[sequence]
        file = self._open(shard)
        return {
            name: file.get_slice(name)[row].to(
                torch.float32 if dtype.is_floating_point else torch.int64
            )
            for name, (dtype, _) in self.index.tensors.items()
        }

    def _open(self, shard: int) -> Any:
        """Opens a shard and leaves it open. Open shards take no memory: they are memory-mapped."""
        if shard not in self._files:
            self._files[shard] = safe_open(self._folder / SHARD.format(shard), framework="pt")
        return self._files[shard]
