"""Rules on what a whole chain takes: memory, time and text, against what there is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from recipes.core.manifest import Manifest, read_manifest
from recipes.core.stage import StageConfig
from recipes.core.wheels import source_bytes
from recipes.data.results import DatasetResult
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.estimate import estimate
from recipes.planning.hardware import gpus_here
from recipes.planning.layouts import proposals
from recipes.planning.problems import Problem
from recipes.planning.workload import Layout, Workload

BYTES_PER_TOKEN = 4.0
"""Of English text in a vocabulary of 50,000 and more; only for saying about how many epochs."""
_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")


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
        "resources.nodes": layout.nodes,
        "resources.devices": layout.devices,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "micro_batch_size": layout.micro_batch_size,
        "sequence_parallel": str(layout.sequence_parallel).lower(),
        "recompute": layout.recompute,
    }
    return [f"stages.{stage}.{key}={value}" for key, value in fields.items()]


def seconds_of(time_limit: str) -> int | None:
    """Seconds of Slurm's ``[D-]HH:MM:SS``; ``None`` for anything else."""
    if not (found := _TIME.fullmatch(time_limit)):
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _time_problems(name: str, job: Workload, chain: Chain) -> Iterator[Problem]:
    own = getattr(chain.stages[name].resources, "time", None)
    limit = seconds_of(str(own or chain.time_limit))
    hours = estimate(job, chain.hardware).hours
    if limit is not None and hours * 3600 > limit:
        yield Problem(
            rules.TIME_LIMIT,
            f"{name} takes about {hours:.1f} hours, but a job may take {limit / 3600:.1f}: it will "
            f"be queued {-(-hours * 3600 // limit):.0f} times",
            "raise the limit, use more devices, or let it resume that often",
        )


def _text_problems(name: str, job: Workload, chain: Chain) -> Iterator[Problem]:
    """An error only where no tokenizer could make enough tokens of the text."""
    found = _train_tokens(chain, chain.stages[name].inputs.get("data", ""))
    if found is None:
        return
    about, most = found
    batch = job.global_batch_size * job.seq_length
    if job.trained is not None and most < batch:
        yield Problem(
            rules.TOKENS,
            f"{name} trains on batches of {batch:,} tokens, but the text has {most:,.0f} at most",
            "give more text, or lower global_batch_size or data.seq_length",
        )
    elif job.trained is not None and job.tokens > about:
        yield Problem(
            rules.EPOCHS,
            f"{name} trains on {job.tokens:,} tokens; the text has about {about:,.0f}, so it is "
            f"repeated {job.tokens / about:.1f} times",
            "give more text, or lower max_steps",
        )


def _train_tokens(chain: Chain, data: str) -> tuple[float, float] | None:
    """About how many tokens there are to train on, and how many at most."""
    config = chain.stages.get(data)
    manifest = _result_of(chain, data, config)
    if manifest is not None:
        tokens = float(manifest.result(DatasetResult).tokens["train"])
        return tokens, tokens
    sources = getattr(config, "sources", None)
    if not sources or getattr(config, "max_documents", None) is not None:
        return None
    sizes = [source_bytes(source) for source in sources]
    share = 1 - sum(getattr(config, "fractions")().values())
    if None in sizes:
        return None
    total = sum(size for size in sizes if size is not None)
    # A token is a byte at least; how documents fall into parts is random, so all may train.
    return total * share / BYTES_PER_TOKEN, float(total)


def _result_of(chain: Chain, data: str, config: StageConfig | None) -> Manifest | None:
    """The manifest of the text, if it was prepared before and from the same sources."""
    directory = Path(data) if config is None else (chain.run_dir or Path()) / data
    if not data or (config is not None and chain.run_dir is None):
        return None
    manifest = read_manifest(directory) if directory.is_dir() else None
    if manifest is None or config is None:
        return manifest
    same = all(
        manifest.config.get(field) == getattr(config, field, None)
        for field in ("sources", "max_documents", "text_field")
    )
    return manifest if same else None
