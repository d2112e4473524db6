"""Distils the teacher into the pruned student with NeMo's trainer.

Reads the student, the teacher or its cached logits, and the prepared text. Writes the student as a
NeMo checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nemo_convert.architecture import Architecture
from nemo_convert.pipeline import last_stage_layers
from recipes.core.errors import RecipeError
from recipes.core.manifest import Outcome, manifest_of
from recipes.core.metrics import steps_of
from recipes.core.stage import Inputs, metrics_file, metrics_log, rank
from recipes.distillation.loss_checks import loss_problems, pair_problems
from recipes.distillation.results import CacheResult, DistillationResult, KeptLayers
from recipes.distillation.settings import (
    CACHE_FIELDS,
    CACHE_KIND,
    TAIL_DRAWS_LOSS,
    CacheLogitsConfig,
    CorrectTeacherConfig,
    DistillConfig,
    hidden_state_bytes,
    uses_teacher,
)
from recipes.distillation.training import (
    INITIAL_KL,
    layout_of,
    resolve_from_chain,
    stop_reason,
    trained_sources,
    training_bytes,
    training_problems,
    training_progress,
    training_result,
    training_workload,
    with_hidden_stages,
    with_weights,
)
from recipes.planning import rules
from recipes.planning.chain import Chain, tokenizer_problems
from recipes.planning.layouts import fits, workloads_on_all_layouts
from recipes.planning.rules import Problem
from recipes.planning.training_cost import hours_text, training_cost
from recipes.planning.workload import LOSS_BUFFERS, TOP_K_LOSS_BUFFERS, Workload
from recipes.pruning.results import HealResult
from recipes.stages.contract import Stage, checkpoint_outcome


def check(cfg: DistillConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems that would stop the training, and a note on layers that the loss omits."""
    yield from training_problems(cfg, chain, chain.shapes_of(cfg.inputs.get("student")))
    yield from loss_problems(cfg, chain.teacher.vocab_size)
    yield from _hidden_state_problems(cfg, chain)
    yield from _unused_teacher_problems(cfg, chain)
    if (cache := _cached_teacher(cfg, chain)) is not None:
        yield from _cache_problems(cfg, cache)
        yield from _sequence_problems(with_weights(cfg, chain, cfg.inputs.get("data", "")), cache)
    if cfg.stop_at_recovered is not None:
        yield from _stop_problems(cfg, workload(cfg, chain).teacher)
    steps = cfg.student_steps  # the student is also saved after these steps
    is_ascending = steps == sorted(set(steps))
    if not is_ascending or any(step >= cfg.max_steps for step in steps):
        yield Problem(
            rules.STUDENT_STEPS,
            f"invalid student_steps={steps}: must be ascending steps from 1 to "
            f"{cfg.max_steps - 1} (max_steps={cfg.max_steps}, whose student is always saved)",
            f"for example [{max(1, cfg.max_steps // 2)}]",
        )
    yield from tokenizer_problems(cfg, chain)


def _stop_problems(cfg: DistillConfig, live_teacher: Architecture | None) -> Iterator[Problem]:
    """Checks that a validation before the end measures the KL, which ``stop_at_recovered`` needs.

    ``live_teacher`` is the shape of a teacher that runs in training; ``None`` if its logits are
    cached or the loss does not use them.
    """
    if live_teacher is None or not cfg.kd_weight:
        yield Problem(
            rules.STOP,
            "stop_at_recovered needs a live teacher and a loss on its logits",
            "use teacher=live with kd_weight above 0, or leave stop_at_recovered out",
        )
    if cfg.pipeline_model_parallel_size > 1:
        yield Problem(
            rules.STOP,
            "stop_at_recovered with pipeline_model_parallel_size="
            f"{cfg.pipeline_model_parallel_size}, where validations run only the student",
            "use pipeline_model_parallel_size=1, or leave stop_at_recovered out",
        )
    if cfg.val_check_interval >= cfg.max_steps:
        yield Problem(
            rules.STOP,
            f"stop_at_recovered with val_check_interval={cfg.val_check_interval}, but the only "
            f"validation is then at the end (max_steps={cfg.max_steps})",
            "set val_check_interval lower",
        )


def _hidden_state_problems(cfg: DistillConfig, chain: Chain) -> Iterator[Problem]:
    """Checks the pairs of layers whose hidden states the loss compares.

    With pipeline parallelism, only layers on the last pipeline stage can be compared. A problem or
    note about this says how long a training without pipeline parallelism takes.
    """
    pipeline_size = cfg.pipeline_model_parallel_size
    student, teacher = (chain.shape_of(cfg.inputs.get(role)) for role in ("student", "teacher"))
    layers = student.num_layers
    # ``layout_problems`` reports more pipeline stages than layers, and ranks that cannot be split.
    has_valid_pipeline = 1 < pipeline_size <= layers and layout_of(cfg).data > 0
    if not cfg.hidden_weight or not has_valid_pipeline:
        yield from pair_problems(cfg, student, teacher)
        return
    cost = _cost_without_pipeline(cfg, chain)
    yield from pair_problems(cfg, student, teacher, cost)
    if not cfg.hidden_pipeline_stages:  # the user has not chosen which layers are compared
        first = last_stage_layers(layers, pipeline_size).start
        yield Problem(
            rules.HIDDEN_RANGE,
            f"the loss on hidden states compares only the student's layers {first} to {layers}, "
            f"which are on the last of {pipeline_size} pipeline stages, where ModelOpt computes "
            "losses",
            f"for all layers set pipeline_model_parallel_size=1: {cost}",
        )


def _cost_without_pipeline(cfg: DistillConfig, chain: Chain) -> str:
    """Says how many hours the training takes on the same ranks without pipeline parallelism."""
    configured, hardware = workload(cfg, chain), chain.hardware
    layout = configured.layout
    # ``workloads_on_all_layouts`` keeps the pipeline size if the loss uses hidden states: set to 1.
    unsplit = replace(configured, layout=replace(layout, pipeline=1))
    hours = [
        training_cost(candidate, hardware).hours
        for candidate in workloads_on_all_layouts(unsplit, layout.ranks, layout.devices)
        if fits(candidate, hardware)
    ]
    if not hours:
        return "no such layout of these ranks fits into memory"
    hours_now = hours_text(training_cost(configured, hardware).hours)
    return f"the training then takes about {hours_text(min(hours))} hours instead of {hours_now}"


def _cached_teacher(cfg: DistillConfig, chain: Chain) -> CacheLogitsConfig | None:
    """Returns the settings of the stage that caches the teacher's logits, in this or another run.

    Returns ``None`` for a live teacher, which computes its logits during the training, and for a
    loss without a teacher.
    """
    if not uses_teacher(vars(cfg)):
        return None
    source = cfg.inputs.get("teacher", "")
    stage = chain.stages.get(source)
    if stage is not None:
        return stage if isinstance(stage, CacheLogitsConfig) else None
    manifest = manifest_of(source)  # the source is a directory of another run
    if manifest is None or manifest.kind != CACHE_KIND:
        return None
    settings = {name: manifest.config[name] for name in (*CACHE_FIELDS, "seed", "weights")}
    result = manifest.result(CacheResult)
    has_whole_text = result.sequences == result.sequences_of_text
    return CacheLogitsConfig(**settings, num_sequences=None if has_whole_text else result.sequences)


def _unused_teacher_problems(cfg: DistillConfig, chain: Chain) -> Iterator[Problem]:
    """Refuses stages that prepare the teacher if the loss does not use a teacher."""
    source = cfg.inputs.get("teacher", "")
    stage = chain.stages.get(source)
    if isinstance(stage, CacheLogitsConfig | CorrectTeacherConfig) and not uses_teacher(vars(cfg)):
        yield Problem(
            rules.LOSS,
            f"kd_weight and hidden_weight are 0, so the work of {source} would have no effect",
            "use teacher=live, or set kd_weight above 0",
        )


def _sequence_problems(cfg: DistillConfig, cache: CacheLogitsConfig) -> Iterator[Problem]:
    """Checks that a distillation reads the sequences whose logits a cache has.

    ``cfg`` must have the sources' weights. For a cache of another run, ``inputs.data`` is unknown.
    """
    settings: dict[str, tuple[object, object]] = {  # values of ``cfg`` and ``cache`` by name
        "inputs.data": (cfg.inputs.get("data"), cache.inputs.get("data"))
    }
    if cache.num_sequences is not None:  # seed and weights decide which sequences are cached
        settings["seed"] = (cfg.seed, cache.seed)
        settings["weights"] = (cfg.weights, cache.weights or cfg.weights)  # empty: not set yet
    for name, (value, cached) in settings.items():
        if cached is not None and value != cached:
            yield Problem(
                rules.CACHED_TEACHER,
                f"{name}={value}, but the teacher was cached with {name}={cached}, so the cache "
                "has logits of other sequences",
                f"set {name}={cached}, or cache the teacher again with {name}={value}",
            )


def _cache_problems(cfg: DistillConfig, cache: CacheLogitsConfig) -> Iterator[Problem]:
    """Checks that a distillation can train on the logits of a cache."""
    for name in ("seq_length", "temperature", "top_k"):
        # Distillation with ``top_k=None`` uses the value of the cache.
        value, cached = getattr(cfg, name), getattr(cache, name)
        if value not in (None, cached):
            yield Problem(
                rules.CACHED_TEACHER,
                f"{name}={value}, but the cached teacher has {name}={cached}",
                f"set {name}={cached}, or cache the teacher again",
            )
    if cfg.context_parallel_size > 1:
        yield Problem(
            rules.CACHED_TEACHER,
            f"context_parallel_size={cfg.context_parallel_size}, but a cached teacher has the "
            "logits of whole sequences",
            "use teacher=live, or context_parallel_size=1",
        )
    if cfg.hidden_weight:
        yield Problem(
            rules.CACHED_TEACHER,
            "hidden_weight is set, but a cached teacher has no hidden states",
            "use teacher=live, or hidden_weight=0",
        )
    if cache.tail_draws and cfg.logits_loss != TAIL_DRAWS_LOSS:
        yield Problem(
            rules.CACHED_TEACHER,
            f"logits_loss={cfg.logits_loss}, but the teacher was cached with "
            f"tail_draws={cache.tail_draws}",
            f"use logits_loss={TAIL_DRAWS_LOSS}, or cache the teacher again with tail_draws=0",
        )


def workload(cfg: DistillConfig, chain: Chain) -> Workload:
    """Returns the training's workload, without a teacher whose logits are cached or not used."""
    cache = _cached_teacher(cfg, chain)
    student, teacher = (chain.shape_of(cfg.inputs.get(role)) for role in ("student", "teacher"))
    live_teacher = teacher if cache is None and uses_teacher(vars(cfg)) else None
    num_logits_losses = (cfg.kd_weight > 0) + (cfg.lm_weight > 0)
    training = training_workload(cfg, student, live_teacher, num_logits_losses)
    may_stop_early = cfg.stop_at_recovered is not None
    return replace(
        training,
        loss_buffers=TOP_K_LOSS_BUFFERS if cfg.top_k else LOSS_BUFFERS[cfg.logits_loss],
        # An early stop needs one more validation, before the first step.
        validations=training.validations + (1 if may_stop_early else 0),
        teacher_in_validation=may_stop_early,
        hidden_state_bytes=hidden_state_bytes(cfg, student.num_layers, teacher.num_layers),
        teacher_is_cached=cache is not None,
        cached_sequences=cache.num_sequences if cache else None,
    )


def disk_bytes(cfg: DistillConfig, chain: Chain) -> int:
    """Returns the bytes on disk of the student, its checkpoints and ``student_steps``."""
    parameters = chain.shape_of(cfg.inputs.get("student")).parameters()
    student_bytes = 4 * parameters  # in float32
    return training_bytes(cfg, parameters) + student_bytes * len(cfg.student_steps)


def run(cfg: DistillConfig, inputs: Inputs, out: Path) -> Outcome:
    """Trains the student and saves it as a NeMo checkpoint."""
    from nemo_convert import nemo
    from recipes.distillation.objective import Objective
    from recipes.distillation.trainer import train

    student = nemo.find_checkpoint(inputs["student"].artifact)
    hashes = {name: item.manifest.tokenizer_sha256 for name, item in inputs.items()}
    if len(set(hashes.values())) > 1:
        raise RecipeError(
            f"teacher, student and data have different tokenizers: {hashes}.",
            "distil between models with the same tokenizer, on data tokenized with it",
        )
    objective = Objective.of(cfg, inputs, nemo.architecture_of(student))
    log = metrics_log(out)
    # ``stop_at_recovered`` also counts the KL that healing has removed. ``stop_reason`` reads the
    # remaining fraction from the metrics file.
    if heal_result := inputs["student"].manifest.result_if("heal", HealResult):
        log.progress("student", 1, 1, **{INITIAL_KL: heal_result.remaining_kl})
    train(cfg, student, objective, inputs["data"], out / student.name, log)
    kept_layers = inputs["student"].manifest.result(KeptLayers).kept_layers
    full_result = None
    if rank() == 0:  # only rank 0 writes metrics
        training = result(cfg, metrics_file(out))
        cache = objective.teacher.cache
        sources = trained_sources(cfg, training, inputs, cache.sequences if cache else None)
        full_result = replace(training, kept_layers=kept_layers, sources=sources)
    return checkpoint_outcome(full_result, student)


def result(cfg: DistillConfig, file: Path) -> DistillationResult:
    """Reads the training's result from its metrics file, which has neither layers nor sources."""
    training = training_result(cfg, file)
    return DistillationResult(
        **vars(training),  # ``DistillationResult`` extends ``TrainingResult``
        teacher_loss=steps_of(file, cfg.stage)[0].get("teacher_loss"),
        stopped=stop_reason(cfg, file, training.steps),
    )


STAGE = Stage(
    config=DistillConfig,
    kind="checkpoint_nemo",
    run=run,
    check=check,
    inputs={
        "teacher": ("checkpoint_nemo", "logit_cache"),
        "student": ("checkpoint_nemo",),
        "data": ("dataset",),
    },
    resolve_from_chain=lambda config, chain: with_hidden_stages(resolve_from_chain(config, chain)),
    disk_bytes=disk_bytes,
    workload=workload,
    progress=training_progress,
)
