"""Chooses an architecture by successive halving (arXiv:1502.07943).

Each round distils all remaining candidates, then drops the worse half. The rounds share the tokens
equally, and so do the candidates of a round. There are two ways to use several devices: either the
ranks train different candidates, or the search has one rank and each training uses all devices.
Every pruning and every training is a stage below ``work/``, so a killed search resumes.

Reads the teacher, its importance scores, text and the ranked candidates. Writes
``candidates.json``, and the chosen architecture as a recipe, ``recipe.yaml``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from recipes.core.errors import RecipeError, did_you_mean
from recipes.core.files import write_text_atomically
from recipes.core.manifest import MANIFEST, Outcome
from recipes.core.stage import Inputs, StageConfig, metrics_log, rank
from recipes.data.settings import PrepareDataConfig
from recipes.data.sources import source_names, with_option
from recipes.distillation.settings import DistillConfig, hidden_state_bytes
from recipes.distillation.training import (
    loss_problems,
    pair_problems,
    training_problems,
    training_workload,
    weight_problems,
    with_hidden_stages,
    with_weights,
)
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.inference_cost import InferenceCost, Sequences, comparison_cost
from recipes.planning.layouts import shape_layout_problems
from recipes.planning.rules import Problem
from recipes.planning.training_cost import (
    STORAGE_BYTES_PER_SECOND,
    peak_memory,
    stopping_seconds,
    token_compute,
    training_cost,
)
from recipes.planning.transformer import Compute, largest
from recipes.planning.workload import CHECKPOINT_BYTES, workloads_of_shapes
from recipes.pruning.settings import ScoreConfig
from recipes.search.results import Candidate, SearchResult, write_candidates
from recipes.search.settings import SuccessiveHalvingConfig
from recipes.search.space import name_of, prune_settings, search_sizes
from recipes.stages.contract import Stage

RECIPE = "recipe.yaml"
CANDIDATES = "candidates"
"""Folder in ``work/`` with the stages that prune and train each candidate."""
DATA_SETTINGS = (
    *("sources", "heldout_sources", "format", "text_field", "prefix", "document_end"),
    *("max_tokens", "excluded_documents", "seq_length"),
)
"""Settings of ``prepare_data`` that the chosen recipe has in its group ``data``."""
NOT_COPIED = {
    *("stage", "inputs", "resources", "precision", "seq_length", "compile", "weights"),
    *("max_steps", "warmup_steps", "val_check_interval", "checkpoint_interval"),
}
"""Settings of the search's stages that the chosen recipe does not have: it has its own inputs and
number of steps, the hardware profile sets the precision, and weights are options of sources."""
LIST_CANDIDATES = "run with only=[enumerate_shapes] to list the candidates"


def check(cfg: SuccessiveHalvingConfig, chain: Chain) -> Iterator[Problem]:
    """Checks devices, the candidates that ``also`` adds, the tokens, and the first training."""
    if cfg.distill.resources.devices > 1 and cfg.resources.ranks > 1:
        yield Problem(
            rules.SEARCH,
            f"the search has {cfg.resources.ranks} ranks, and each training has "
            f"distill.resources.devices={cfg.distill.resources.devices}: only one may be above 1",
            "set distill.resources.devices, or resources.devices and resources.nodes, to 1",
        )
    if (nodes := cfg.distill.resources.nodes) > 1:
        yield Problem(
            rules.SEARCH,
            f"distill.resources.nodes={nodes}, but each training of a search runs on one node",
            "set distill.resources.nodes=1",
        )
    shapes = chain.shapes.get(cfg.inputs.get("candidates", ""), ())
    if shapes:
        for what in _unknown_candidates(cfg.also, [name_of(shape) for shape in shapes]):
            yield Problem(rules.SEARCH, what, LIST_CANDIDATES)
    round_sizes = cfg.rounds(cfg.max_candidates())  # number of candidates in each round
    if not round_sizes:  # a single candidate is chosen without training
        return
    num_rounds, first_size = len(round_sizes), round_sizes[0]
    if cfg.steps(first_size, num_rounds) < 2:
        step_tokens = cfg.distill.global_batch_size * cfg.distill.seq_length
        yield Problem(
            rules.SEARCH,
            f"max_tokens={cfg.max_tokens} is less than two steps for each candidate: {num_rounds} "
            f"rounds share the tokens, and {first_size} candidates share those of the first round",
            f"set max_tokens to at least {2 * num_rounds * first_size * step_tokens}, or use fewer "
            "candidates",
        )
    else:
        training = training_of(cfg, round_sizes, 0)
        yield from training_problems(training, chain)
        yield from loss_problems(training)
        pairs = (list(pair_problems(training, s, chain.teacher)) for s in shapes or [chain.teacher])
        yield from next(filter(None, pairs), [])  # of the largest candidate that has problems
        data = cfg.inputs.get("data", "")
        yield from weight_problems(training.name, training.weights, data, chain)
        # Without known shapes, only the teacher's layout is checked.
        workload = training_workload(training, chain.teacher, chain.teacher)
        yield from shape_layout_problems(workload, shapes, chain.hardware)


def inference_cost(cfg: SuccessiveHalvingConfig, chain: Chain) -> InferenceCost:
    """Estimates the cost of the search: mostly training, and the evaluations after each round.

    The time is that of the largest shape within the budget, or of the teacher's shape if the shapes
    are not known yet. Memory is that of the candidate that needs most.
    """
    candidate = chain.shape_of(cfg.inputs.get("candidates"))
    round_sizes = cfg.rounds(cfg.max_candidates())
    text = Sequences(cfg.num_samples, cfg.distill.seq_length, cfg.distill.micro_batch_size)
    bf16 = cfg.precision == "bf16-mixed"
    evaluation = comparison_cost((chain.teacher, candidate), bf16, text, chain.hardware)
    if not round_sizes:  # a single candidate is chosen without training and evaluation
        return replace(evaluation, compute=Compute())
    num_logits_losses = (cfg.distill.kd_weight > 0) + (cfg.distill.lm_weight > 0)
    trainings = [training_of(cfg, round_sizes, n) for n in range(len(round_sizes))]
    layers = (candidate.num_layers, chain.teacher.num_layers)
    workload = replace(
        training_workload(trainings[0], candidate, chain.teacher, num_logits_losses),
        hidden_state_bytes=hidden_state_bytes(cfg.distill, *layers),
    )
    # Ranks train different candidates at the same time. The ranks of a CPU share its FLOP/s.
    ranks = cfg.resources.ranks if chain.hardware.on_gpu else 1
    sequential = [math.ceil(size / ranks) for size in round_sizes]  # trainings of each round
    steps = sum(t.max_steps * n for t, n in zip(trainings, sequential, strict=True))
    seconds, compute = 0.0, Compute()
    if chain.hardware.on_gpu:
        number = sum(sequential)  # one validation and one checkpoint in each training
        all_steps = replace(workload, steps=steps, checkpoints=number, validations=number)
        seconds = training_cost(all_steps, chain.hardware).hours * 3600
    else:
        compute = token_compute(workload) * replace(workload, steps=steps).tokens
    compute += text.compute(chain.teacher, bf16) * len(round_sizes)
    compute += text.compute(candidate, bf16) * sum(round_sizes)
    shapes = chain.shapes.get(cfg.inputs.get("candidates", ""), ())
    workloads = workloads_of_shapes(workload, shapes)
    peak = largest(*(peak_memory(workload, chain.hardware) for workload in workloads))
    # The search's process keeps its CUDA context while another process trains.
    peak = replace(peak, reserved=peak.reserved + chain.hardware.reserved_bytes)
    # A training that has just started first loads both models, in bfloat16. A pruning that has just
    # started reads one and writes the other.
    load = 2 * (chain.teacher.parameters() + candidate.parameters()) / STORAGE_BYTES_PER_SECOND
    return InferenceCost(
        largest(evaluation.memory, peak),
        compute,
        workload.bf16,
        training_seconds=seconds,
        stopping_seconds=load + stopping_seconds(workload, chain.hardware),
    )


def disk_bytes(cfg: SuccessiveHalvingConfig, chain: Chain) -> int:
    """Returns the size of all pruned and trained candidates, and of each rank's checkpoint.

    A training has one checkpoint, at its end, which is deleted when the training is complete.
    """
    round_sizes = cfg.rounds(cfg.max_candidates())
    if not round_sizes:  # a single candidate is chosen without training
        return 0
    models = round_sizes[0] + sum(round_sizes)
    trainings = min(cfg.resources.ranks, round_sizes[0])  # at the same time
    parameters = chain.shape_of(cfg.inputs.get("candidates")).parameters()
    return parameters * (4 * models + CHECKPOINT_BYTES * trainings)


def progress(work: Path) -> str | None:
    """Returns the number of complete trainings of unfinished work."""
    count = len(list((work / CANDIDATES).glob(f"*/round-*/{MANIFEST}")))
    return f"{count} training{'s' * (count > 1)}" if count else None


def _unknown_candidates(names: Sequence[str], known: Collection[str]) -> list[str]:
    """Returns an error message for each entry of the setting ``also`` that is not a candidate."""
    return [
        f"invalid also={name}: must be a candidate.{did_you_mean(name, known)}"
        for name in names
        if name not in known
    ]


def training_of(
    cfg: SuccessiveHalvingConfig, round_sizes: Sequence[int], round_number: int
) -> DistillConfig:
    """Returns the settings of the distillation in one round."""
    steps = cfg.steps(round_sizes[round_number], len(round_sizes))
    settings: dict[str, Any] = {
        "stage": "distill",
        "seed": cfg.distill.seed + round_number,  # else, all rounds would read the same sequences
        "max_steps": steps,
        "warmup_steps": min(cfg.distill.warmup_steps, steps // 5),
        "val_check_interval": steps,  # one validation and one checkpoint, at the end
        "checkpoint_interval": max(steps, 1),
        "stop_at_recovered": None,  # all candidates must train on the same number of tokens
    }
    training = replace(cfg.distill, **settings)
    training.name = f"{cfg.name}.distill"
    return training


def run(cfg: SuccessiveHalvingConfig, inputs: Inputs, out: Path) -> Outcome:
    """Runs all rounds and writes the candidates and the chosen recipe."""
    from recipes.search.halving import HalvingRun

    search = inputs["candidates"].manifest.result(SearchResult)
    ranked = {candidate.name: candidate for candidate in search.candidates}  # the best first
    for what in _unknown_candidates(cfg.also, ranked):
        raise RecipeError(what, LIST_CANDIDATES)
    remaining = [
        name for i, name in enumerate(ranked) if i < cfg.num_candidates or name in cfg.also
    ]
    ranking = inputs["candidates"].manifest.config
    method, metric = ranking["layer_importance"], ranking["proxy"]
    halving = HalvingRun(cfg, inputs, out.parent / CANDIDATES, method)
    log = metrics_log(out)
    round_sizes = cfg.rounds(len(remaining))
    for round_number in range(len(round_sizes)):
        training = training_of(cfg, round_sizes, round_number)
        candidates = [ranked[name] for name in remaining]
        halving.train(candidates, round_number, training)
        tokens = training.max_steps * training.global_batch_size * training.seq_length
        qualities = halving.measure(candidates, round_number)
        for candidate, quality in zip(candidates, qualities, strict=True):
            ranked[candidate.name] = replace(
                candidate, **vars(quality), tokens=candidate.tokens + tokens
            )
        # Lower is better for every metric that ``proxy`` allows.
        remaining.sort(key=lambda name: _nan_last(float(getattr(ranked[name], metric))))
        log.progress("successive_halving", round_number + 1, len(round_sizes), leader=remaining[0])
        remaining = remaining[: math.ceil(len(remaining) / 2)]
    winner = ranked[remaining[0]] = replace(ranked[remaining[0]], chosen=True)
    if rank() == 0:
        write_candidates(out, list(ranked.values()))
        write_text_atomically(out / RECIPE, recipe_yaml(cfg, inputs, winner, method))
    return Outcome(
        SearchResult(list(ranked.values()), search.budget),
        architecture=winner.shape.as_dict(),
        parameters=winner.parameters,
    )


def _nan_last(score: float) -> tuple[bool, float]:
    return math.isnan(score), score


def recipe_yaml(
    cfg: SuccessiveHalvingConfig, inputs: Inputs, winner: Candidate, method: str
) -> str:
    """Returns the YAML of a recipe that prunes the teacher to the winner's shape and distils it."""
    teacher = inputs["checkpoint"].manifest
    shape, sizes = teacher.architecture or {}, search_sizes(winner.shape)
    changed = {axis: size for axis, size in sizes.items() if size != shape[axis]}
    score = inputs["importance"].manifest.config
    data = inputs["data"].manifest.config
    distill = asdict(cfg.distill)
    names = source_names([*data["heldout_sources"], *data["sources"]])
    weights = {names[name]: weight for name, weight in cfg.distill.weights.items() if name in names}
    sources = [
        with_option(source, "weight", weights[source]) if source in weights else source
        for source in data["sources"]
    ]
    if cfg.distill.hidden_pipeline_stages == cfg.distill.pipeline_model_parallel_size:
        del distill["hidden_pipeline_stages"]  # the default
    chain, hardware = {"/chain@_global_": "prune_distill"}, {"override /hardware": cfg.hardware}
    content = {
        "defaults": [chain, hardware, "_self_"],
        "description": f"{winner.name}, {winner.parameters / 1e6:,.1f} M parameters",
        "model": {"hf_path": teacher.config["hf_path"]},
        "data": {name: data[name] for name in DATA_SETTINGS} | {"sources": sources},
        "stages": {
            "prepare_data": _changed(data, PrepareDataConfig(), DATA_SETTINGS),
            "score": {
                **_changed(score, ScoreConfig()),
                "resources": {name: score["resources"][name] for name in ("nodes", "devices")},
            },
            "prune": prune_settings(changed, method),
            "distill": {
                **{name: distill[name] for name in ("lr", "min_lr", "lm_weight")},
                **_changed(distill, DistillConfig()),
                "resources": {"devices": cfg.distill.resources.devices},
            },
        },
    }
    header = f"# @package _global_\n# Chosen by a search for {teacher.config['hf_path']}\n"
    if data["max_tokens"]:
        header += "# To train longer, also raise data.max_tokens, which the search had.\n"
    return header + OmegaConf.to_yaml(content)


def _changed(
    settings: Mapping[str, Any], default: StageConfig, excluded: Collection[str] = ()
) -> dict[str, Any]:
    """Returns the settings that are not the default, without those that are not copied."""
    defaults = asdict(default)
    return {
        name: value
        for name, value in settings.items()
        if value != defaults[name] and name not in NOT_COPIED and name not in excluded
    }


STAGE = Stage(
    config=SuccessiveHalvingConfig,
    kind="search_results",
    run=run,
    check=check,
    inference_cost=inference_cost,
    disk_bytes=disk_bytes,
    progress=progress,
    starts=("prune", "distill"),
    resolve_from_chain=lambda config, chain: replace(
        config,
        distill=with_hidden_stages(
            with_weights(config.distill, chain, config.inputs.get("data", ""))
        ),
    ),
    devices=lambda config, chain: max(config.resources.devices, config.distill.resources.devices),
    inputs={
        "checkpoint": ("checkpoint_nemo",),
        "importance": ("importance",),
        "data": ("dataset",),
        "candidates": ("search_results",),
    },
)
