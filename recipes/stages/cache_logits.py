"""Stores what the teacher says about the training text, so that distillation runs without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.distillation.settings import CacheLogitsConfig, bytes_per_token
from recipes.planning import rules
from recipes.planning.chain import Chain, window_problems
from recipes.planning.problems import Problem
from recipes.planning.workload import Layout, Workload
from recipes.stages.contract import Stage

SHARDS = "shards"
"""Directory in the stage's work where finished shards wait for the last one."""


def check(cfg: CacheLogitsConfig, chain: Chain) -> Iterator[Problem]:
    """Finds settings that would fail once the teacher is loaded."""
    if cfg.top_k >= chain.teacher.vocab_size:
        yield Problem(
            rules.TOP_K,
            f"top_k={cfg.top_k} leaves nothing of the vocabulary of {chain.teacher.vocab_size}",
            "use a small part of it, such as 64",
        )
    yield from window_problems(cfg.seq_length, chain)


def workload(cfg: CacheLogitsConfig, chain: Chain) -> Workload:
    """A pass of the teacher over its windows, as a planner sees it; one, if all of the text."""
    tensor = cfg.tensor_model_parallel_size
    resources = cfg.resources
    micro = cfg.micro_batch_size
    layout = Layout(resources.nodes, resources.devices, tensor, micro_batch_size=micro)
    batch = micro * max(1, layout.ranks // tensor)
    return Workload(
        name=cfg.stage,
        trained=None,
        teacher=chain.teacher,
        layout=layout,
        seq_length=cfg.seq_length,
        global_batch_size=batch,
        steps=max(1, (cfg.num_windows or 1) // batch),
        bf16=cfg.precision == "bf16-mixed",
    )


def disk_bytes(cfg: CacheLogitsConfig, chain: Chain) -> int:
    """The cache, where its size does not depend on the text."""
    tokens = (cfg.num_windows or 0) * cfg.seq_length
    return tokens * bytes_per_token(chain.teacher.vocab_size, cfg.top_k, cfg.tail_draws)


def progress(work: Path) -> str | None:
    """How many shards an unfinished run has; they would be lost by starting over."""
    shards = len(list((work / SHARDS).glob("*.safetensors")))
    return f"{shards} shard{'s' * (shards > 1)}" if shards else None


def run(cfg: CacheLogitsConfig, inputs: Inputs, out: Path) -> Outcome:
    """Runs the teacher over the windows that are not stored yet, and publishes all."""
    from nemo_convert import hf, nemo
    from recipes.distillation.logit_cache_writer import cache_logits

    teacher = nemo.find_checkpoint(inputs["teacher"].artifact)
    shards = out.parent / SHARDS
    result = cache_logits(cfg, teacher, inputs["data"], shards, out, metrics_log(out))
    return Outcome(result, tokenizer_sha256=hf.tokenizer_sha256(nemo.side_files(teacher)))


STAGE = Stage(
    config=CacheLogitsConfig,
    kind="logit_cache",
    run=run,
    check=check,
    inputs={"teacher": ("checkpoint_nemo",), "data": ("dataset",)},
    disk_bytes=disk_bytes,
    workload=workload,
    progress=progress,
)

if __name__ == "__main__":
    STAGE.main()
