"""Runs a teacher over sequences of text and caches its top-k logits, shard by shard."""

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
    """Caches the teacher's top-k for the first sequences that training will read.

    Args:
        cfg: Settings.
        teacher: Checkpoint of the teacher.
        data: The tokenized text.
        work: Folder in which shards are written. A restart keeps complete shards.
        out: Folder of the artifact. When all shards are complete, they are linked into it.
        log: Receives progress.

    Returns:
        The metrics over all shards, on rank 0; ``None`` on other ranks.

    Raises:
        StoppedByDeadlineError: The deadline was reached before the last shard. All ranks raise it.
    """
    parallel = nemo.Parallelism(tensor=cfg.tensor_model_parallel_size)
    nemo.initialize(parallel)
    core = nemo.build_core(nemo.restore_model(teacher), parallel, cfg.dtype, training=True).eval()
    nemo.load_weights(core, teacher)
    require_seq_length(data, cfg.seq_length)
    tokens = read_tokens(data.artifact, "train")
    result = data.manifest.result(DatasetResult)
    text = TrainingSequences(
        tokens,
        cfg.seq_length,
        num_samples=0,  # sequences are read by number, not as samples of epochs
        document_end=result.document_end,
        loss_mask=read_loss_mask(data.artifact, "train"),
        numbers=_first_sequences(cfg, tokens, result.source_tokens["train"]),
    )
    vocabulary = nemo.architecture_of(teacher).vocab_size
    shards = math.ceil(len(text.used_numbers) / cfg.sequences_per_shard)
    index = CacheIndex(
        vocabulary, cfg.seq_length, cfg.top_k, cfg.temperature, shards, cfg.tail_draws
    )
    work.mkdir(exist_ok=True)
    complete = _write_shards(cfg, core, text, index, work, log)
    torch.distributed.barrier()
    if _any_rank_stops(not complete, next(core.parameters()).device):
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
        sequences=len(text.used_numbers),
        sequences_of_text=count_sequences(tokens, cfg.seq_length),
        tokens=len(text.used_numbers) * cfg.seq_length,
        bytes_per_token=bytes_per_token(vocabulary, cfg.top_k, cfg.tail_draws),
        **cache_metrics(out, index),
    )


def _first_sequences(
    cfg: CacheLogitsConfig, tokens: np.ndarray, sources: list[SourceTokens]
) -> list[int]:
    """Returns the numbers of the first sequences that training reads, in the order of reading.

    A sequence's number is its index in the text. A sequence that training reads again in a later
    epoch is listed once.
    """
    samples = cfg.num_sequences or 0
    text = TrainingSequences(
        tokens, cfg.seq_length, samples, cfg.seed, weights=cfg.weights, sources=sources
    )
    if cfg.num_sequences is None:
        total = count_sequences(tokens, cfg.seq_length)
        return sequence_order(text.used_numbers, total, cfg.seed, 0).tolist()  # type: ignore[no-any-return]
    return list(dict.fromkeys(map(text.number_of, range(samples))))


def _write_shards(
    cfg: CacheLogitsConfig,
    core: torch.nn.Module,
    text: TrainingSequences,
    index: CacheIndex,
    work: Path,
    log: MetricsLog,
) -> bool:
    """Writes those shards of this data-parallel rank that are not complete yet.

    Returns:
        ``True`` if these shards are complete; ``False`` if the deadline was reached first.
    """
    start, done = time.monotonic(), 0
    replica = parallel_state.get_data_parallel_rank()
    replicas = parallel_state.get_data_parallel_world_size()
    for shard in range(replica, index.shards, replicas):
        path = work / SHARD.format(shard)
        if is_complete(path):
            continue
        first = shard * cfg.sequences_per_shard
        numbers = text.used_numbers[first : first + cfg.sequences_per_shard].tolist()
        outputs = _evaluate_teacher(cfg, core, text, numbers)
        if outputs is None:
            return False
        top, loss = outputs
        # Only a rank's first shard is checked. Of many shards, one with few and hard sequences may
        # have a loss near chance, although the teacher is good.
        if done == 0:
            require_better_than_chance(loss, index.vocabulary)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            write_shard(path, index, numbers, top, loss)
        done += len(numbers)
        speed = round(done * cfg.seq_length / (time.monotonic() - start), 1)
        log.progress("cache", shard + 1, index.shards, teacher_loss=loss, tokens_per_second=speed)
    return True


def _quantiles(cfg: CacheLogitsConfig, number: int) -> Tensor:
    """Returns the quantiles [seq_length, draws] at which to sample each position's tail.

    The tail is all tokens outside the top-k. Sampling is systematic: the first quantile is random,
    and the others follow at equal distances. The mean number of draws of a token is the same as
    with independent samples, and the variance is lower. All ranks compute the same quantiles.
    """
    first = np.random.default_rng([cfg.seed, number]).random((cfg.seq_length, 1), np.float32)
    draws = np.arange(cfg.tail_draws, dtype=np.float32)
    return torch.from_numpy((first + draws) / cfg.tail_draws)


def _any_rank_stops(
    stopping: bool, device: torch.device, group: ProcessGroup | None = None
) -> bool:
    """Returns whether any rank of a group (by default, of all ranks) stops at the deadline.

    Ranks must agree because their clocks differ. A rank that continued alone would wait forever for
    the others.
    """
    if deadline() is None:
        return False
    stops = torch.tensor(float(stopping), device=device)
    all_reduce(stops, ReduceOp.MAX, group)
    return bool(stops)


@torch.no_grad()
def _evaluate_teacher(
    cfg: CacheLogitsConfig, core: torch.nn.Module, text: TrainingSequences, numbers: list[int]
) -> tuple[TopK, float] | None:
    """Runs the teacher on the n sequences with these numbers.

    As in training, the loss excludes masked predictions. Samples of the tail depend on a sequence's
    number, not on the shard.

    Returns:
        The top-k [n, seq_length, …] and the mean LM loss; ``None`` if the deadline was reached.
    """
    device = next(core.parameters()).device
    # With one tensor-parallel rank ``group`` is ``None``, for which ``all_reduce`` would use all
    # ranks. So the check of the deadline uses ``tensor_ranks``.
    tensor_ranks, group = parallel_state.get_tensor_model_parallel_group(), nemo.tensor_group()
    tops, losses, masks = [], [], []
    for start in range(0, len(numbers), cfg.micro_batch_size):
        if _any_rank_stops(time_is_up(), device, tensor_ranks):
            return None
        micro_batch = numbers[start : start + cfg.micro_batch_size]
        batch = default_collate([text.sequence(number) for number in micro_batch])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = core(batch["tokens"], batch["position_ids"], None).flatten(0, 1)
        quantiles = None
        if cfg.tail_draws:
            quantiles = torch.cat([_quantiles(cfg, number) for number in micro_batch]).to(device)

        tops.append(top_k(logits, cfg.top_k, cfg.temperature, group, quantiles=quantiles))
        losses.append(token_cross_entropy(logits, batch["labels"].flatten(), group))
        masks.append(batch["loss_mask"].flatten())
    top = TopK(
        *(
            None if field[0] is None else torch.cat(field).view(len(numbers), cfg.seq_length, -1)
            for field in zip(*tops, strict=True)
        )
    )
    mask = torch.cat(masks)
    mean = (torch.cat(losses) * mask).sum() / mask.sum().clamp_min(1)
    return top, mean.item()
