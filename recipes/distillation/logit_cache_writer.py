"""Runs a teacher over sequences of text and caches the teacher's top-k tokens in shards."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce
from torch.utils.data import default_collate

from nemo_convert import nemo
from recipes.core.files import link_or_copy
from recipes.core.metrics import MetricsLog
from recipes.core.precision import dtype_of
from recipes.core.stage import Input, StoppedByDeadlineError, deadline, rank, time_is_up
from recipes.data.results import DatasetResult, SourceTokens
from recipes.data.token_sequences import (
    count_sequences,
    read_loss_mask,
    read_tokens,
    require_seq_length,
    sequence_order,
)
from recipes.distillation.data import TrainingSequences
from recipes.distillation.logit_cache import (
    SHARD,
    CacheIndex,
    cache_metrics,
    is_complete,
    write_index,
    write_shard,
)
from recipes.distillation.losses import token_cross_entropy
from recipes.distillation.results import CacheResult
from recipes.distillation.settings import CacheLogitsConfig, bytes_per_token
from recipes.distillation.vocabulary import TopK, top_k
from recipes.evaluation.predictions import require_better_than_chance


def cache_logits(
    cfg: CacheLogitsConfig, teacher: Path, data: Input, work: Path, out: Path, log: MetricsLog
) -> CacheResult | None:
    """Caches the teacher's top-k tokens for the first sequences that training will read.

    Shards are written in the folder ``work``, where a restart keeps complete shards. When all
    shards are complete, they are linked into ``out``, the artifact's folder.

    Returns:
        The metrics over all shards, on rank 0; ``None`` on other ranks.

    Raises:
        StoppedByDeadlineError: The deadline was reached before the last shard. All ranks raise it.
    """
    parallel = nemo.Parallelism(tensor=cfg.tensor_model_parallel_size)
    nemo.initialize(parallel)
    model, dtype = nemo.restore_model(teacher), dtype_of(cfg.precision)
    core = nemo.build_core(model, parallel, dtype, training=True).eval()  # the training layers
    nemo.load_weights(core, teacher)
    require_seq_length(data, cfg.seq_length)
    tokens = read_tokens(data.artifact, "train")
    data_result = data.manifest.result(DatasetResult)
    dataset = TrainingSequences(
        tokens,
        cfg.seq_length,
        num_samples=0,  # sequences are read by number, not as samples of epochs
        document_end=data_result.document_end,
        loss_mask=read_loss_mask(data.artifact, "train"),
        numbers=_numbers_to_cache(cfg, tokens, data_result.source_tokens["train"]),
    )
    vocabulary = nemo.architecture_of(teacher).vocab_size
    shards = math.ceil(len(dataset.used_numbers) / cfg.sequences_per_shard)
    index = CacheIndex(
        vocabulary, cfg.seq_length, cfg.top_k, cfg.temperature, shards, cfg.tail_draws
    )
    work.mkdir(exist_ok=True)
    wrote_all = _write_shards(cfg, core, dataset, index, work, log)
    torch.distributed.barrier()  # rank 0 links the shards of all ranks
    if _any_rank_stops(not wrote_all, next(core.parameters()).device):
        raise StoppedByDeadlineError(
            f"stopped at the deadline before all {shards} shards were written; complete shards are "
            "kept.",
            "run the same command to resume",
        )
    if rank() != 0:
        return None
    for shard in range(shards):
        link_or_copy(work / SHARD.format(shard), out / SHARD.format(shard))
    write_index(out, index)
    return CacheResult(
        sequences=len(dataset.used_numbers),
        sequences_of_text=count_sequences(tokens, cfg.seq_length),
        tokens=len(dataset.used_numbers) * cfg.seq_length,
        bytes_per_token=bytes_per_token(vocabulary, cfg.top_k, cfg.tail_draws),
        **cache_metrics(out, index),
    )


def _numbers_to_cache(
    cfg: CacheLogitsConfig, tokens: np.ndarray, sources: list[SourceTokens]
) -> list[int]:
    """Returns the numbers of the sequences to cache, in the order in which training reads them.

    These are the sequences of the first ``num_sequences`` training samples, without repetitions. By
    default, all sequences are cached. A sequence's number is its index in the text.
    """
    samples = cfg.num_sequences or 0
    dataset = TrainingSequences(
        tokens, cfg.seq_length, samples, cfg.seed, weights=cfg.weights, sources=sources
    )
    if cfg.num_sequences is None:
        total = count_sequences(tokens, cfg.seq_length)
        first_epoch = sequence_order(dataset.used_numbers, total, cfg.seed, 0)
        return first_epoch.tolist()  # type: ignore[no-any-return]
    numbers = [dataset.number_of(sample) for sample in range(samples)]
    return list(dict.fromkeys(numbers))  # without repetitions, in the same order


def _write_shards(
    cfg: CacheLogitsConfig,
    core: torch.nn.Module,
    dataset: TrainingSequences,
    index: CacheIndex,
    work: Path,
    log: MetricsLog,
) -> bool:
    """Writes this data-parallel rank's shards, except shards that an earlier run completed.

    Returns:
        ``True`` if all shards of this rank are complete; ``False`` if the deadline came first.
    """
    start, finished_tokens = time.monotonic(), 0
    first_shard = parallel_state.get_data_parallel_rank()  # data-parallel ranks take turns
    for shard in range(first_shard, index.shards, parallel_state.get_data_parallel_world_size()):
        path = work / SHARD.format(shard)
        if is_complete(path):
            continue
        first = shard * cfg.sequences_per_shard
        numbers = dataset.used_numbers[first : first + cfg.sequences_per_shard].tolist()
        result = _evaluate_teacher(cfg, core, dataset, numbers)
        if result is None:
            return False
        top, loss, loss_tokens = result
        # Only the first shard is checked, because a good teacher could fail the check on a later
        # shard with a few sequences that are hard to predict.
        if finished_tokens == 0:
            require_better_than_chance(loss, index.vocabulary)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            write_shard(path, index, numbers, top, loss, loss_tokens)
        finished_tokens += len(numbers) * cfg.seq_length
        speed = round(finished_tokens / (time.monotonic() - start), 1)  # of this rank
        log.progress("cache", shard + 1, index.shards, teacher_loss=loss, tokens_per_second=speed)
    return True


def _quantiles(cfg: CacheLogitsConfig, number: int) -> Tensor:
    """Returns the quantiles [seq_length, draws] at which to sample each position's tail.

    Sampling is systematic: the first quantile is random, and the next ones follow at equal
    distances. A token's expected number of draws is the same as with independent samples, and the
    variance is lower. The random numbers depend only on the seed and the sequence's number, so all
    tensor-parallel ranks compute the same quantiles.
    """
    first = np.random.default_rng([cfg.seed, number]).random((cfg.seq_length, 1), np.float32)
    draws = np.arange(cfg.tail_draws, dtype=np.float32)
    return torch.from_numpy((first + draws) / cfg.tail_draws)


def _any_rank_stops(
    stopping: bool, device: torch.device, group: ProcessGroup | None = None
) -> bool:
    """Returns whether any rank of a group (by default, of all ranks) stops at the deadline.

    All ranks of the group must stop together, although their clocks differ. A rank that continued
    alone would wait in its next collective forever.
    """
    if deadline() is None:
        return False
    stops = torch.tensor(float(stopping), device=device)
    all_reduce(stops, ReduceOp.MAX, group)
    return bool(stops)


@torch.no_grad()
def _evaluate_teacher(
    cfg: CacheLogitsConfig, core: torch.nn.Module, dataset: TrainingSequences, numbers: list[int]
) -> tuple[TopK, float, int] | None:
    """Runs the teacher on the n sequences with these numbers.

    Returns:
        The top-k tokens [n, seq_length, …], the mean LM loss over unmasked tokens in nats, and the
        number of unmasked tokens; ``None`` if the deadline was reached.
    """
    device = next(core.parameters()).device
    # With one tensor-parallel rank, ``group`` is ``None``. To ``_any_rank_stops``, ``None`` would
    # mean all ranks, so the deadline is checked with ``tensor_ranks``.
    tensor_ranks, group = parallel_state.get_tensor_model_parallel_group(), nemo.tensor_group()
    tops, losses, masks = [], [], []
    for start in range(0, len(numbers), cfg.micro_batch_size):
        if _any_rank_stops(time_is_up(), device, tensor_ranks):
            return None
        micro_batch = numbers[start : start + cfg.micro_batch_size]
        batch = default_collate([dataset.sequence(number) for number in micro_batch])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = core(batch["tokens"], batch["position_ids"], None).flatten(0, 1)
        quantiles = None
        if cfg.tail_draws:
            quantiles = torch.cat([_quantiles(cfg, number) for number in micro_batch]).to(device)
        tops.append(top_k(logits, cfg.top_k, cfg.temperature, group, quantiles=quantiles))
        losses.append(token_cross_entropy(logits, batch["labels"].flatten(), group))
        masks.append(batch["loss_mask"].flatten())
    top = TopK.concatenate(tops).map(lambda t: t.view(len(numbers), cfg.seq_length, -1))
    mask = torch.cat(masks)
    loss_tokens = mask.sum()
    mean = (torch.cat(losses) * mask).sum() / loss_tokens.clamp_min(1)
    return top, mean.item(), int(loss_tokens)
