"""Runs a teacher over sequences of text and stores its likeliest tokens, shard by shard."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from nemo_convert import nemo
from recipes.core.files import link_or_copy
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Input, StoppedByDeadlineError, deadline, rank, time_is_up
from recipes.data.results import DatasetResult
from recipes.data.token_windows import (
    count_windows,
    counted,
    read_loss_mask,
    read_tokens,
    require_windows,
    window,
    window_order,
)
from recipes.distillation.logit_cache import (
    SHARD,
    CacheIndex,
    cache_figures,
    is_whole,
    write_index,
    write_shard,
)
from recipes.distillation.losses import token_cross_entropy
from recipes.distillation.results import CacheResult
from recipes.distillation.settings import CacheLogitsConfig, bytes_per_token
from recipes.distillation.vocabulary import TopK, top_k
from recipes.evaluation.predictions import require_better_than_chance


def cache_logits(
    cfg: CacheLogitsConfig, teacher: Path, data: Input, shards: Path, out: Path, log: MetricsLog
) -> CacheResult | None:
    """Caches the first sequences of a training; complete shards in ``shards`` are kept.

    Returns:
        The result over all shards, on rank 0.

    Raises:
        StoppedByDeadlineError: The deadline was reached before the last shard; on all ranks.
    """
    parallel = nemo.Parallelism(tensor=cfg.tensor_model_parallel_size)
    nemo.initialize(parallel)
    model = nemo.restore_model(teacher)
    core = nemo.build_core(model, parallel, cfg.dtype, training=True).eval()
    nemo.load_weights(core, teacher)
    vocabulary = nemo.architecture_of(teacher).vocab_size
    require_windows(data, cfg.seq_length)
    tokens, loss_mask = read_tokens(data.artifact, "train"), read_loss_mask(data.artifact, "train")
    end = data.manifest.result(DatasetResult).document_end
    total = count_windows(tokens, cfg.seq_length)
    numbers = window_order(np.arange(total), total, cfg.seed, 0)[: cfg.num_sequences]
    parts = [
        numbers[start : start + cfg.sequences_per_shard].tolist()
        for start in range(0, len(numbers), cfg.sequences_per_shard)
    ]
    index = CacheIndex(
        vocabulary, cfg.seq_length, cfg.top_k, cfg.temperature, len(parts), cfg.tail_draws
    )
    shards.mkdir(exist_ok=True)
    start = time.monotonic()
    done, stopped = 0, False
    for shard in _own_shards(len(parts)):
        if is_whole(path := shards / SHARD.format(shard)):
            continue
        texts = [window(tokens, cfg.seq_length, number) for number in parts[shard]]
        counts = [
            counted(tokens, loss_mask, cfg.seq_length, number, end) for number in parts[shard]
        ]
        written = _evaluate_teacher(
            cfg, core, torch.from_numpy(np.stack(texts)), torch.stack(counts), parts[shard]
        )
        if stopped := written is None:
            break
        top, loss = written
        if done == 0:
            require_better_than_chance(loss, vocabulary)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            write_shard(path, index, parts[shard], top, loss)
        done += len(parts[shard])
        speed = round(done * cfg.seq_length / (time.monotonic() - start), 1)
        log.progress("cache", shard + 1, len(parts), teacher_loss=loss, tokens_per_second=speed)
    torch.distributed.barrier()
    _require_all(stopped, len(parts), next(core.parameters()).device)
    if rank() != 0:
        return None
    for shard in range(len(parts)):
        link_or_copy(shards / SHARD.format(shard), out / SHARD.format(shard))
    write_index(out, index)
    return CacheResult(
        sequences=len(numbers),
        sequences_of_text=total,
        tokens=len(numbers) * cfg.seq_length,
        bytes_per_token=bytes_per_token(vocabulary, cfg.top_k, cfg.tail_draws),
        **cache_figures(out, index),
    )


def _quantiles(cfg: CacheLogitsConfig, number: int) -> NDArray[np.float32]:
    """Returns the quantiles of the samples of a sequence [seq_length, draws]; equal on all ranks.

    Systematic sampling: quantiles are equally spaced, the first is random. Each token is expected
    as often as with independent samples, with a lower variance.
    """
    first = np.random.default_rng([cfg.seed, number]).random((cfg.seq_length, 1), np.float32)
    draws = np.arange(cfg.tail_draws, dtype=np.float32)
    return (first + draws) / max(1, cfg.tail_draws)


def _own_shards(shards: int) -> range:
    """Returns the shards of this data-parallel rank."""
    first = parallel_state.get_data_parallel_rank()
    return range(first, shards, parallel_state.get_data_parallel_world_size())


def _require_all(stopped: bool, shards: int, device: torch.device) -> None:
    if _any(stopped, device):
        raise StoppedByDeadlineError(
            f"stopped by the clock; of {shards} shards those that are whole are kept.",
            "run the same command to go on",
        )


def _any(stopping: bool, device: torch.device, group: ProcessGroup | None = None) -> bool:
    """Returns whether any rank of a group, of all ranks by default, stops at the deadline.

    All ranks must agree: their clocks differ, and a rank that continues would wait for the others.
    """
    if deadline() is None:
        return False
    stops = torch.tensor(float(stopping), device=device)
    all_reduce(stops, ReduceOp.MAX, group)
    return bool(stops)


@torch.no_grad()
def _evaluate_teacher(
    cfg: CacheLogitsConfig,
    core: torch.nn.Module,
    texts: Tensor,
    counts: Tensor,
    numbers: Sequence[int],
) -> tuple[TopK, float] | None:
    """Computes the teacher's top-k of sequences [w, seq_length + 1], and its mean LM loss.

    The loss is over the predictions that ``counts`` [w, seq_length] does not mask, as in training.
    Samples depend on the sequences' numbers.

    Returns:
        ``None`` if the deadline is reached before the end.
    """
    device = next(core.parameters()).device
    positions = torch.arange(cfg.seq_length, device=device)[None]
    parts, losses = [], []
    split, group = parallel_state.get_tensor_model_parallel_group(), nemo.tensor_group()
    size = cfg.micro_batch_size
    quantiles = torch.from_numpy(np.stack([_quantiles(cfg, number) for number in numbers]))
    for batch, at in zip(texts.split(size), quantiles.split(size), strict=True):
        if _any(time_is_up(), device, split):
            return None
        inputs, labels = batch[:, :-1].to(device), batch[:, 1:].to(device)
        logits = core(inputs, positions.expand_as(inputs), None).flatten(0, 1)
        rows = at.flatten(0, 1).to(device) if cfg.tail_draws else None
        parts.append(top_k(logits, cfg.top_k, cfg.temperature, group, quantiles=rows))
        losses.append(token_cross_entropy(logits, labels.flatten(), group))
    shape = (*texts[:, 1:].shape, -1)
    top = TopK(
        *(
            None if each[0] is None else torch.cat(each).view(shape)
            for each in zip(*parts, strict=True)
        )
    )
    weights = counts.flatten().to(device)
    mean = (torch.cat(losses) * weights).sum() / weights.sum().clamp_min(1)
    return top, mean.item()
