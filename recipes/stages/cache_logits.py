"""Stores the teacher's logits for the training text, so that distillation runs without a teacher.

Reads the teacher and the prepared text. Writes the teacher's ``top_k`` largest log-probabilities at
each position of the text, in several files (shards).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.distillation.settings import CacheLogitsConfig, bytes_per_token
from recipes.distillation.training import weight_problems, with_weights
from recipes.planning import rules
from recipes.planning.chain import Chain, sequence_problems
from recipes.planning.limits import training_tokens
from recipes.planning.rules import Problem
from recipes.planning.workload import Layout, Workload
from recipes.stages.contract import Stage

SHARDS = "shards"
"""Folder in ``work/`` for complete shards. A resumed stage keeps them."""


def check(cfg: CacheLogitsConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of ``top_k``, the sources' weights, ``seq_length`` and the text's size."""
    if cfg.top_k >= chain.teacher.vocab_size:
        yield Problem(
            rules.TOP_K,
            f"top_k={cfg.top_k} must be less than the vocabulary size, {chain.teacher.vocab_size}",
            "set a much smaller number, such as top_k=64",
        )
    # The user sets the weights in ``distill``, so the problems name that stage.
    yield from weight_problems("distill", cfg.weights, cfg.inputs.get("data", ""), chain)
    yield from sequence_problems(cfg.seq_length, cfg.inputs, chain)
    if not planned_sequences(cfg, chain):
        yield Problem(
            rules.UNKNOWN_TEXT,
            f"{cfg.name} caches the logits of the whole text, whose size is not known, so the plan "
            f"has neither the hours nor the disk space of {cfg.name}",
            f"set stages.{cfg.name}.num_sequences, or stages.prepare_data.max_tokens",
        )


def planned_sequences(cfg: CacheLogitsConfig, chain: Chain) -> int:
    """Returns how many sequences are cached, by default all; 0 if the text's size is unknown."""
    if cfg.num_sequences is not None:
        return cfg.num_sequences
    tokens_by_source, _ = training_tokens(chain, cfg.inputs.get("data", ""))
    total = math.fsum(tokens_by_source.values())  # infinite if the size of a source is unknown
    return max(1, int(total / cfg.seq_length)) if total < math.inf else 0


def workload(cfg: CacheLogitsConfig, chain: Chain) -> Workload:
    """Returns the teacher's forward passes, for plans; one step if the text's size is unknown."""
    layout = Layout(
        nodes=cfg.resources.nodes,
        devices=cfg.resources.devices,
        tensor=cfg.tensor_model_parallel_size,
        micro_batch_size=cfg.micro_batch_size,
    )
    data_parallel_size = max(1, layout.ranks // layout.tensor)
    global_batch_size = layout.micro_batch_size * data_parallel_size
    return Workload(
        trained=None,  # no model is trained
        teacher=chain.shape_of(cfg.inputs.get("teacher")),
        layout=layout,
        seq_length=cfg.seq_length,
        global_batch_size=global_batch_size,
        steps=max(1, planned_sequences(cfg, chain) // global_batch_size),
        bf16=cfg.precision == "bf16-mixed",
    )


def disk_bytes(cfg: CacheLogitsConfig, chain: Chain) -> int:
    """Returns the cache's size in bytes; 0 if the number of sequences is unknown."""
    tokens = planned_sequences(cfg, chain) * cfg.seq_length
    return tokens * bytes_per_token(chain.teacher.vocab_size, cfg.top_k, cfg.tail_draws)


def progress(work: Path) -> str | None:
    """Returns the number of complete shards, such as "3 shards"; ``None`` if there are none."""
    count = len(list((work / SHARDS).glob("*.safetensors")))
    plural = "s" if count > 1 else ""
    return f"{count} shard{plural}" if count else None


def run(cfg: CacheLogitsConfig, inputs: Inputs, out: Path) -> Outcome:
    """Runs the teacher on the sequences of missing shards, and links all shards into ``out``."""
    from nemo_convert import hf, nemo
    from recipes.distillation.logit_cache_writer import cache_logits

    teacher = nemo.find_checkpoint(inputs["teacher"].artifact)
    result = cache_logits(cfg, teacher, inputs["data"], out.parent / SHARDS, out, metrics_log(out))
    return Outcome(result, tokenizer_sha256=hf.tokenizer_sha256(nemo.side_folder(teacher)))


STAGE = Stage(
    config=CacheLogitsConfig,
    kind="logit_cache",
    run=run,
    check=check,
    inputs={"teacher": ("checkpoint_nemo",), "data": ("dataset",)},
    resolve_from_chain=lambda config, chain: with_weights(
        config, chain, config.inputs.get("data", "")
    ),
    disk_bytes=disk_bytes,
    workload=workload,
    progress=progress,
)
