"""Runs a teacher over windows of text and keeps its likeliest tokens, shard by shard."""

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
from recipes.core.deadline import StoppedByClockError, deadline, time_is_up
from recipes.core.files import link_or_copy
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Input, rank
from recipes.data.results import DatasetResult
from recipes.data.token_windows import (
    count_windows,
    counted,
    read_learnt,
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
from recipes.evaluation.sanity import require_better_than_chance


def cache_logits(
    cfg: CacheLogitsConfig, teacher: Path, data: Input, shards: Path, out: Path, log: MetricsLog
) -> CacheResult | None:
    """Caches the windows with which training begins; those in ``shards`` are not made again.

    Returns figures of all shards, on rank 0.

    Raises:
        StoppedByClockError: The deadline came before the last shard; on all ranks.
    """
    parallel = nemo.Parallelism(tensor=cfg.tensor_model_parallel_size)
    nemo.initialize(parallel)
    model = nemo.restore_model(teacher)
    core = nemo.build_core(model, parallel, cfg.dtype, training=True).eval()
    nemo.load_weights(core, teacher)
    vocabulary = nemo.architecture_of(teacher).vocab_size
    require_windows(data, cfg.seq_length)
    tokens, learnt = read_tokens(data.artifact, "train"), read_learnt(data.artifact, "train")
    end = data.manifest.result(DatasetResult).document_end
    total = count_windows(tokens, cfg.seq_length)
    numbers = window_order(np.arange(total), total, cfg.seed, 0)[: cfg.num_windows]
    parts = [
        numbers[start : start + cfg.windows_per_shard].tolist()
        for start in range(0, len(numbers), cfg.windows_per_shard)
    ]
    index = CacheIndex(
        vocabulary, cfg.seq_length, cfg.top_k, cfg.temperature, len(parts), cfg.tail_draws
    )
    shards.mkdir(exist_ok=True)
    began = time.monotonic()
    made, stopped = 0, False
    for shard in _mine(len(parts)):
        if is_whole(path := shards / SHARD.format(shard)):
            continue
        texts = [window(tokens, cfg.seq_length, number) for number in parts[shard]]
        counts = [counted(tokens, learnt, cfg.seq_length, number, end) for number in parts[shard]]
        found = _teach(
            cfg, core, torch.from_numpy(np.stack(texts)), torch.stack(counts), parts[shard]
        )
        if stopped := found is None:
            break
        taught, loss = found
        if made == 0:
            require_better_than_chance(loss, vocabulary)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            write_shard(path, index, parts[shard], taught, loss)
        made += len(parts[shard])
        speed = round(made * cfg.seq_length / (time.monotonic() - began), 1)
        log.progress("cache", shard + 1, len(parts), teacher_loss=loss, tokens_per_second=speed)
    torch.distributed.barrier()
    _require_all(stopped, len(parts), next(core.parameters()).device)
    if rank() != 0:
        return None
    for shard in range(len(parts)):
        link_or_copy(shards / SHARD.format(shard), out / SHARD.format(shard))
    write_index(out, index)
    return CacheResult(
        windows=len(numbers),
        windows_of_text=total,
        tokens=len(numbers) * cfg.seq_length,
        bytes_per_token=bytes_per_token(vocabulary, cfg.top_k, cfg.tail_draws),
        **cache_figures(out, index),
    )


def _places(cfg: CacheLogitsConfig, number: int) -> NDArray[np.float32]:
    """Where draws are at each position of a window, whichever rank and run comes to it.

    Systematic: equally spaced, the first at a random place. In the mean each token is drawn as
    often as by independent draws, and its number varies less. [seq_length, draws]
    """
    first = np.random.default_rng([cfg.seed, number]).random((cfg.seq_length, 1), np.float32)
    draws = np.arange(cfg.tail_draws, dtype=np.float32)
    return (first + draws) / max(1, cfg.tail_draws)


def _mine(shards: int) -> range:
    """Shards of this data-parallel rank."""
    first = parallel_state.get_data_parallel_rank()
    return range(first, shards, parallel_state.get_data_parallel_world_size())


def _require_all(stopped: bool, shards: int, device: torch.device) -> None:
    if _any(stopped, device):
        raise StoppedByClockError(
            f"stopped by the clock; of {shards} shards those that are whole are kept.",
            "run the same command to go on",
        )


def _any(stopping: bool, device: torch.device, group: ProcessGroup | None = None) -> bool:
    """Whether a rank of a group, of all by default, stops; without a deadline none does.

    All ranks must be told: their clocks differ, and one that goes on would wait for the others.
    """
    if deadline() is None:
        return False
    told = torch.tensor(float(stopping), device=device)
    all_reduce(told, ReduceOp.MAX, group)
    return bool(told)


@torch.no_grad()
def _teach(
    cfg: CacheLogitsConfig,
    core: torch.nn.Module,
    texts: Tensor,
    counts: Tensor,
    numbers: Sequence[int],
) -> tuple[TopK, float] | None:
    """What the teacher says about windows [w, seq_length + 1], and its own mean loss.

    That is of the predictions that count [w, seq_length], as training has it. Draws depend on the
    windows' numbers. ``None`` if the time is up before it has said all of it.
    """
    device = next(core.parameters()).device
    positions = torch.arange(cfg.seq_length, device=device)[None]
    parts, losses = [], []
    split, group = parallel_state.get_tensor_model_parallel_group(), nemo.tensor_group()
    size = cfg.micro_batch_size
    places = torch.from_numpy(np.stack([_places(cfg, number) for number in numbers]))
    for batch, drawn in zip(texts.split(size), places.split(size), strict=True):
        if _any(time_is_up(), device, split):
            return None
        inputs, labels = batch[:, :-1].to(device), batch[:, 1:].to(device)
        logits = core(inputs, positions.expand_as(inputs), None).flatten(0, 1)
        at = drawn.flatten(0, 1).to(device) if cfg.tail_draws else None
        parts.append(top_k(logits, cfg.top_k, cfg.temperature, group, quantiles=at))
        losses.append(token_cross_entropy(logits, labels.flatten(), group))
    shape = (*texts[:, 1:].shape, -1)
    taught = TopK(
        *(
            None if each[0] is None else torch.cat(each).view(shape)
            for each in zip(*parts, strict=True)
        )
    )
    weights = counts.flatten().to(device)
    mean = (torch.cat(losses) * weights).sum() / weights.sum().clamp_min(1)
    return taught, mean.item()
