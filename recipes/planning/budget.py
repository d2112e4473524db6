"""Rules on what a whole chain takes: memory, time and text, against what there is."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace

from recipes.core.manifest import Manifest, manifest_of
from recipes.core.stage import StageConfig
from recipes.data.results import DatasetResult
from recipes.data.settings import PrepareDataConfig
from recipes.data.sources import source_bytes
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.estimate import estimate
from recipes.planning.hardware import gpus_here
from recipes.planning.layouts import proposals
from recipes.planning.problems import Problem
from recipes.planning.reading import Estimates, smaller
from recipes.planning.workload import Layout, Workload

BYTES_PER_TOKEN = 4.0
"""Of English text in a vocabulary of 50,000 and more; only for saying about how many epochs."""
FOREVER = "999999-00:00:00"
"""No limit, in Slurm's words."""


def budget_problems(chain: Chain, wanted: Collection[str]) -> Iterator[Problem]:
    """What the chain needs and there is not; for a chain whose stages have no errors."""
    if chain.from_published_config:
        yield Problem(
            rules.BUNDLED_CONFIG,
            f"config.json of {chain.hf_path} is out of reach; the plan is for its published shape",
            "reach the hub, set HF_TOKEN for a gated model, or give a folder as model.hf_path",
        )
    gpus = gpus_here()
    if gpus and not chain.hardware.on_gpu:
        yield Problem(
            rules.HARDWARE_PROFILE,
            f"this machine has {gpus} GPU(s), but hardware={chain.hardware.name}",
            "set hardware to the GPU's profile, such as hardware=h100",
        )
    for name in chain.readings:
        if name in wanted:
            yield from _reading_problems(name, chain)
    for name, job in chain.workloads.items():
        if name in wanted:
            yield from _memory_problems(name, job, chain)
            yield from _time_problems(name, job, chain)
            yield from _text_problems(name, job, chain)


def _memory_problems(name: str, job: Workload, chain: Chain) -> Iterator[Problem]:
    need = estimate(job, chain.hardware).memory.total
    have = chain.hardware.memory_of_rank(job.layout.devices)
    if need <= have:
        return
    yield Problem(
        rules.MEMORY,
        f"{name} needs about {need / 1e9:.0f} GB on a rank, but {chain.hardware.name} has "
        f"{have / 1e9:.0f} GB",
        _smaller_layout(name, job, chain),
    )


def _reading_problems(name: str, chain: Chain) -> Iterator[Problem]:
    config, estimates = chain.stages[name], chain.readings[name]
    need = estimates(config).memory.total
    have = chain.hardware.memory_of_rank(config.resources.devices)
    if need <= have:
        return
    changes = [c for c in smaller(config) if _fits(replace(config, **c), estimates, chain)]
    settings = [f"stages.{name}.{key}={value}" for c in changes[:1] for key, value in c.items()]
    if ranks := (changes or [{}])[0].get("pipeline_model_parallel_size"):
        settings.append(f"stages.{name}.resources.devices={ranks}")
    yield Problem(
        rules.MEMORY,
        f"{name} needs about {need / 1e9:.0f} GB on a rank, but {chain.hardware.name} has "
        f"{have / 1e9:.0f} GB",
        f"set {' '.join(settings)}" if settings else "use a device with more memory",
    )


def _fits(config: StageConfig, estimates: Estimates, chain: Chain) -> bool:
    have = chain.hardware.memory_of_rank(config.resources.devices)
    return estimates(config).memory.total <= have


def _smaller_layout(name: str, job: Workload, chain: Chain) -> str:
    """The cheapest layout that fits, as overrides."""
    found = proposals(job, chain.hardware, max(8, job.layout.devices))
    same = [p for p in found if p.job.layout.ranks == job.layout.ranks] or found
    if not same:
        return "use devices with more memory, or more of them"
    layout = same[0].job.layout
    return f"for example {' '.join(overrides(name, layout))}"


def overrides(stage: str, layout: Layout) -> list[str]:
    """A layout as command-line overrides of a training stage."""
    fields = {
        **layout.sizes(),
        "sequence_parallel": str(layout.sequence_parallel).lower(),
        "recompute_granularity": layout.recompute_granularity,
    }
    return [f"stages.{stage}.{key}={value}" for key, value in fields.items()]


def slurm_seconds(limit: str) -> int:
    """Seconds of a ``Duration``, ``[D-]HH:MM:SS``."""
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _time_problems(name: str, job: Workload, chain: Chain) -> Iterator[Problem]:
    limit = slurm_seconds(chain.stages[name].resources.time or chain.time_limit or FOREVER)
    hours = estimate(job, chain.hardware).hours
    if hours * 3600 > limit:
        yield Problem(
            rules.TIME_LIMIT,
            f"{name} takes about {hours:.1f} hours, but a job may take {limit / 3600:.1f}: it will "
            f"be queued {-(-hours * 3600 // limit):.0f} times",
            "raise the limit, use more devices, or let it resume that often",
        )


def _text_problems(name: str, job: Workload, chain: Chain) -> Iterator[Problem]:
    """An error only where no tokenizer could make enough tokens of the text."""
    unknown = (math.inf, math.inf)
    found = _train_tokens(chain, chain.stages[name].inputs.get("data", "")) or unknown
    cached = math.inf if job.windows is None else job.windows * job.seq_length
    about, most = (min(tokens, cached) for tokens in found)
    batch = job.global_batch_size * job.seq_length
    if job.trained is not None and most < batch:
        yield Problem(
            rules.TOKENS,
            f"{name} trains on batches of {batch:,} tokens, but there are {most:,.0f} at most",
            "give more text or cached windows, or lower global_batch_size or data.seq_length",
        )
    elif job.trained is not None and job.tokens > about:
        yield Problem(
            rules.EPOCHS,
            f"{name} trains on {job.tokens:,} tokens; there are about {about:,.0f}, each of "
            f"which it sees {job.tokens / about:.1f} times",
            "give more text or cached windows, or lower max_steps",
        )


def _train_tokens(chain: Chain, data: str) -> tuple[float, float] | None:
    """About how many tokens there are to train on, and how many at most."""
    config = chain.stages.get(data)
    if (manifest := _prepared(chain, data, config)) is not None:
        tokens = float(manifest.result(DatasetResult).tokens["train"])
        return tokens, tokens
    if not isinstance(config, PrepareDataConfig) or config.max_documents is not None:
        return None
    sizes = [source_bytes(source) for source in config.sources]
    if not sizes or None in sizes:
        return None
    budget = config.max_tokens or math.inf
    about = sum(min(size / BYTES_PER_TOKEN, budget) for size in sizes if size is not None)
    # A token is a byte at least; how documents fall into parts is random, so all may train.
    most = sum(size for size in sizes if size is not None)
    return about * (1 - sum(config.fractions().values())), float(most)


def _prepared(chain: Chain, data: str, config: StageConfig | None) -> Manifest | None:
    """The manifest of the text, if it was prepared before and from the same sources."""
    if not isinstance(config, PrepareDataConfig):
        return manifest_of(data)
    manifest = manifest_of(str(chain.run_dir / data)) if chain.run_dir else None
    now = {
        "sources": config.sources,
        "max_documents": config.max_documents,
        "max_tokens": config.max_tokens,
        "text_field": config.text_field,
        "format": config.format,
    }
    # A field that was not recorded is a new one, and has its default there.
    if manifest is None or any(
        manifest.config.get(key, value) != value for key, value in now.items()
    ):
        return None
    return manifest
