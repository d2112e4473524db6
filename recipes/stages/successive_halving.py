"""Chooses an architecture by successive halving (arXiv:1502.07943).

Each round distils all remaining candidates, then drops the worse half. Every round gets the same
number of training tokens, and divides them equally among its candidates. With several devices,
either the ranks train different candidates, or the search has one rank and each training run uses
all devices. Pruning and training of each candidate are stages below ``work/``, so a killed search
resumes.

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
from recipes.core.manifest import MANIFEST, WORK, Outcome
from recipes.core.stage import Inputs, Resources, StageConfig, metrics_log, rank
from recipes.data.settings import PrepareDataConfig
from recipes.data.sources import source_names, with_option
from recipes.distillation.loss_checks import loss_problems, pair_problems
from recipes.distillation.settings import DistillConfig, hidden_state_bytes
from recipes.distillation.training import (
    CHECKPOINTS,
    training_problems,
    training_workload,
    weight_problems,
    with_hidden_stages,
    with_weights,
)
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.hardware import STORAGE_BYTES_PER_SECOND
from recipes.planning.inference_cost import InferenceCost, Sequences, comparison_cost
from recipes.planning.layouts import shape_layout_problems
from recipes.planning.rules import Problem, first_problems
from recipes.planning.training_cost import (
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
"""Folder in ``work/`` with the stages that prune and train the candidates."""
DATA_SETTINGS = (
    "sources", "heldout_sources", "format", "text_field", "prefix", "document_end",
    "max_tokens", "excluded_documents", "seq_length",
)  # fmt: skip
"""Settings of ``prepare_data`` that the chosen recipe has in its group ``data``."""
NOT_COPIED = {
    "stage", "inputs", "resources", "precision", "seq_length", "compile", "weights",
    "max_steps", "warmup_steps", "val_check_interval", "checkpoint_interval",
}  # fmt: skip
"""Settings of the search's stages that are not copied to the recipe. The recipe has its own inputs,
number of steps and hardware profile, which sets the precision. Weights are options of sources."""
CHOSEN_BY_SEARCH = (
    "inputs", "max_steps", "val_check_interval", "checkpoint_interval",
    "stop_at_recovered", "student_steps",
)  # fmt: skip
"""Settings of ``distill`` that the search sets for each training, or that it does not use."""
JOB_SETTINGS = ("env", "cpus_per_task", "time", "sbatch")
"""Settings of a job. A search's trainings cannot have them, as they run in the search's job."""
LIST_CANDIDATES = "run with only=[enumerate_shapes] to list the candidates"


def check(cfg: SuccessiveHalvingConfig, chain: Chain) -> Iterator[Problem]:
    """Checks devices, the names in ``also``, the tokens, and the training of the first round."""
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
    yield from _chosen_setting_problems(cfg)
    shapes = chain.shapes.get(cfg.inputs.get("candidates", ""), ())  # empty if not known yet
    if shapes:
        for what in _unknown_candidates(cfg.also, [name_of(shape) for shape in shapes]):
            yield Problem(rules.SEARCH, what, LIST_CANDIDATES)
    round_sizes = cfg.round_sizes(cfg.max_candidates())  # number of candidates in each round
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
        possible_shapes = shapes or [chain.teacher]
        yield from training_problems(training, chain, possible_shapes)
        yield from loss_problems(training, chain.teacher.vocab_size)
        by_shape = (pair_problems(training, shape, chain.teacher) for shape in possible_shapes)
        yield from first_problems(by_shape)
        data = cfg.inputs.get("data", "")  # ``training`` has no inputs yet
        yield from weight_problems(training.name, training.weights, data, chain)
        workload = training_workload(training, chain.teacher, chain.teacher)
        yield from shape_layout_problems(workload, shapes, chain.hardware)


def _chosen_setting_problems(cfg: SuccessiveHalvingConfig) -> Iterator[Problem]:
    """Refuses settings of ``distill`` that have no effect in a search."""
    for name in CHOSEN_BY_SEARCH:
        if (value := getattr(cfg.distill, name)) != getattr(DistillConfig(), name):
            yield Problem(
                rules.SEARCH,
                f"distill.{name}={value} has no effect: the search chooses it for each training",
                f"leave it out, or set stages.distill.{name} for the chosen student; "
                f"stages.{cfg.name}.max_tokens sets the length of the trainings",
            )
    for name in JOB_SETTINGS:
        if (value := getattr(cfg.distill.resources, name)) != getattr(Resources(), name):
            yield Problem(
                rules.SEARCH,
                f"distill.resources.{name}={value} has no effect: the search is one job",
                f"set stages.{cfg.name}.resources.{name}",
            )


def inference_cost(cfg: SuccessiveHalvingConfig, chain: Chain) -> InferenceCost:
    """Estimates the cost of training in all rounds, and of the evaluation after each round.

    The time is that of candidates with the largest shape, or the teacher's if no shapes are known
    yet. Memory is that of the candidate that needs the most.
    """
    candidate = chain.shape_of(cfg.inputs.get("candidates"))
    round_sizes = cfg.round_sizes(cfg.max_candidates())
    text = Sequences(cfg.num_samples, cfg.distill.seq_length, cfg.distill.micro_batch_size)
    bf16 = cfg.precision == "bf16-mixed"
    evaluation = comparison_cost((chain.teacher, candidate), bf16, text, chain.hardware)
    if not round_sizes:  # a single candidate is chosen without training and evaluation
        return replace(evaluation, compute=Compute())
    num_logits_losses = (cfg.distill.kd_weight > 0) + (cfg.distill.lm_weight > 0)
    trainings = [training_of(cfg, round_sizes, number) for number in range(len(round_sizes))]
    layers = (candidate.num_layers, chain.teacher.num_layers)
    workload = replace(  # of a training run; rounds differ only in the number of steps
        training_workload(trainings[0], candidate, chain.teacher, num_logits_losses),
        hidden_state_bytes=hidden_state_bytes(cfg.distill, *layers),
    )
    # On GPUs, ranks train different candidates at the same time. On a CPU, ranks share the FLOP/s,
    # so the time is the same as if one rank trained all candidates in turn.
    ranks = cfg.resources.ranks if chain.hardware.on_gpu else 1
    # By round: number of training runs of the busiest rank.
    runs_in_turn = [math.ceil(size / ranks) for size in round_sizes]
    steps = sum(t.max_steps * runs for t, runs in zip(trainings, runs_in_turn, strict=True))
    num_runs = sum(runs_in_turn)  # each has one validation and one checkpoint
    all_runs = replace(workload, steps=steps, checkpoints=num_runs, validations=num_runs)
    seconds, compute = 0.0, Compute()  # of the training runs, on GPUs or on a CPU
    if chain.hardware.on_gpu:
        seconds = training_cost(all_runs, chain.hardware).hours * 3600
    else:
        compute = token_compute(workload) * all_runs.tokens
    # The evaluation after each round also runs the teacher.
    compute += text.compute(chain.teacher, bf16) * len(round_sizes)
    compute += text.compute(candidate, bf16) * sum(round_sizes)
    shapes = chain.shapes.get(cfg.inputs.get("candidates", ""), ())
    workloads = workloads_of_shapes(workload, shapes)
    peak = largest(*(peak_memory(workload, chain.hardware) for workload in workloads))
    # A second process trains. Meanwhile, the search's process keeps its CUDA context, the reserve.
    peak = replace(peak, reserved=peak.reserved + chain.hardware.reserved_bytes)
    # A training that has just started cannot stop before it has loaded both models, in bfloat16.
    model_bytes = 2 * (chain.teacher.parameters() + candidate.parameters())
    load_seconds = model_bytes / STORAGE_BYTES_PER_SECOND
    return InferenceCost(
        memory=largest(evaluation.memory, peak),
        compute=compute,
        bf16=workload.bf16,
        extra_seconds=seconds,
        stopping_seconds=load_seconds + stopping_seconds(workload, chain.hardware),
    )


def disk_bytes(cfg: SuccessiveHalvingConfig, chain: Chain) -> int:
    """Returns the bytes of all pruned and trained candidates, and of each rank's checkpoint."""
    round_sizes = cfg.round_sizes(cfg.max_candidates())
    if not round_sizes:  # a single candidate is chosen without training
        return 0
    num_models = round_sizes[0] + sum(round_sizes)  # each is pruned once, and trained in each round
    # A training run writes one checkpoint at its end, and deletes it when the run is complete.
    num_checkpoints = min(cfg.resources.ranks, round_sizes[0])  # runs at the same time
    parameters = chain.shape_of(cfg.inputs.get("candidates")).parameters()
    return parameters * (4 * num_models + CHECKPOINT_BYTES * num_checkpoints)  # 4: if float32


def progress(work: Path) -> str | None:
    """Describes unfinished work by its training runs; ``None`` if none has saved anything."""
    count = len(list((work / CANDIDATES).glob(f"*/round-*/{MANIFEST}")))  # complete runs
    if count:
        return f"{count} trainings" if count > 1 else f"{count} training"
    has_checkpoint = any((work / CANDIDATES).glob(f"*/round-*/{WORK}/{CHECKPOINTS}/*"))
    return "an unfinished training" if has_checkpoint else None


def _unknown_candidates(names: Sequence[str], candidates: Collection[str]) -> list[str]:
    """Returns an error message for each entry of the setting ``also`` that is not a candidate."""
    return [
        f"invalid also={name}: must be a candidate.{did_you_mean(name, candidates)}"
        for name in names
        if name not in candidates
    ]


def training_of(
    cfg: SuccessiveHalvingConfig, round_sizes: Sequence[int], round_number: int
) -> DistillConfig:
    """Returns the settings of the distillation in one round, counted from 0.

    ``round_sizes`` has the number of candidates in each round.
    """
    steps = cfg.steps(round_sizes[round_number], len(round_sizes))
    training = replace(
        cfg.distill,
        stage="distill",
        seed=cfg.distill.seed + round_number,  # so each round reads other sequences
        max_steps=steps,
        warmup_steps=min(cfg.distill.warmup_steps, steps // 5),  # at most 20% of the steps
        val_check_interval=steps,  # one validation and one checkpoint, at the end
        checkpoint_interval=max(steps, 1),  # must be positive, also before ``check``
        stop_at_recovered=None,  # all candidates must train on the same number of tokens
    )
    training.name = f"{cfg.name}.distill"  # problems name a setting as stages.NAME.SETTING
    return training


def run(cfg: SuccessiveHalvingConfig, inputs: Inputs, out: Path) -> Outcome:
    """Runs all rounds and writes the candidates and the chosen recipe."""
    from recipes.search.halving import HalvingRun

    search = inputs["candidates"].manifest.result(SearchResult)
    ranked = {candidate.name: candidate for candidate in search.candidates}  # the best first
    if unknown_candidates := _unknown_candidates(cfg.also, ranked):
        raise RecipeError(unknown_candidates[0], LIST_CANDIDATES)
    remaining = [
        name for i, name in enumerate(ranked) if i < cfg.num_candidates or name in cfg.also
    ]
    ranking_settings, log = inputs["candidates"].manifest.config, metrics_log(out)
    method, metric = ranking_settings["layer_importance"], ranking_settings["proxy"]
    halving = HalvingRun(cfg, inputs, out.parent / CANDIDATES, method)
    round_sizes = cfg.round_sizes(len(remaining))
    for round_number in range(len(round_sizes)):
        training = training_of(cfg, round_sizes, round_number)
        candidates = [ranked[name] for name in remaining]
        halving.train(candidates, round_number, training)
        round_tokens = training.max_steps * training.global_batch_size * training.seq_length
        qualities = halving.measure(candidates, round_number)
        for candidate, quality in zip(candidates, qualities, strict=True):
            ranked[candidate.name] = replace(
                candidate,
                perplexity=quality.perplexity,
                kl_to_teacher=quality.kl_to_teacher,
                tokens=candidate.tokens + round_tokens,
            )
        # Lower is better for every metric that ``proxy`` allows.
        scores = {name: float(getattr(ranked[name], metric)) for name in remaining}
        # NaN, from a diverged training run, sorts after all numbers.
        remaining.sort(key=lambda name: (math.isnan(scores[name]), scores[name]))
        log.progress("successive_halving", round_number + 1, len(round_sizes), leader=remaining[0])
        remaining = remaining[: math.ceil(len(remaining) / 2)]
    winner = replace(ranked[remaining[0]], chosen=True)
    ranked[winner.name] = winner
    if rank() == 0:
        write_candidates(out, list(ranked.values()))
        write_text_atomically(out / RECIPE, recipe_yaml(cfg, inputs, winner, method))
    return Outcome(
        SearchResult(list(ranked.values()), search.budget),
        architecture=winner.shape.as_dict(),
        parameters=winner.parameters,
    )


def recipe_yaml(
    cfg: SuccessiveHalvingConfig, inputs: Inputs, winner: Candidate, method: str
) -> str:
    """Returns the YAML of a recipe that prunes the teacher to the winner's shape and distils it.

    ``method`` is the recipe's ``layer_importance``.
    """
    teacher = inputs["checkpoint"].manifest
    teacher_sizes, winner_sizes = teacher.architecture or {}, search_sizes(winner.shape)
    targets = {axis: size for axis, size in winner_sizes.items() if size != teacher_sizes[axis]}
    score = inputs["importance"].manifest.config
    data = inputs["data"].manifest.config
    distill = asdict(cfg.distill)
    # The search has weights by names of sources. In a recipe, a weight is an option of its source.
    by_name = source_names([*data["heldout_sources"], *data["sources"]])
    weights = {by_name[name]: w for name, w in cfg.distill.weights.items() if name in by_name}
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
            "prepare_data": _non_default_settings(data, PrepareDataConfig(), DATA_SETTINGS),
            "score": {
                **_non_default_settings(score, ScoreConfig()),
                "resources": {name: score["resources"][name] for name in ("nodes", "devices")},
            },
            "prune": prune_settings(targets, method),
            "distill": {
                **{name: distill[name] for name in ("lr", "min_lr", "lm_weight")},  # or default
                **_non_default_settings(distill, DistillConfig()),
                "resources": {"devices": cfg.distill.resources.devices},
            },
        },
    }
    header = f"# @package _global_\n# Chosen by a search for {teacher.config['hf_path']}\n"
    if data["max_tokens"]:
        header += "# To train longer, also raise data.max_tokens, which the search had.\n"
    return header + OmegaConf.to_yaml(content)


def _non_default_settings(
    settings: Mapping[str, Any], default: StageConfig, excluded: Collection[str] = ()
) -> dict[str, Any]:
    """Returns the settings that differ from the default, except ``NOT_COPIED`` and ``excluded``."""
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
