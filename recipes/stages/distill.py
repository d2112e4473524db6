"""Knowledge distillation of the pruned student with NeMo's trainer, from a teacher or its cache."""

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
from recipes.distillation.results import DistillationResult, KeptLayers
from recipes.distillation.settings import CACHED, DRAWN_LOSS, CacheLogitsConfig, DistillConfig
from recipes.distillation.stopping import INITIAL_KL, stop_reason
from recipes.distillation.training import (
    fp8_size_problems,
    resolve_from_chain,
    training_bytes,
    training_problems,
    training_progress,
    training_result,
    training_workload,
)
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.problems import Problem
from recipes.planning.tokenizers import tokenizer_problems
from recipes.planning.workload import Workload
from recipes.pruning.results import HealResult
from recipes.stages.contract import Stage


def check(cfg: DistillConfig, chain: Chain) -> Iterator[Problem]:
    """Finds settings that would fail once training has started."""
    yield from training_problems(cfg, chain)
    if not any((cfg.kd_weight, cfg.hidden_weight, cfg.lm_weight)):
        yield Problem(
            rules.LOSS,
            "kd_weight, hidden_weight and lm_weight are all 0",
            "use at least one that is positive",
        )
    yield from _pair_problems(cfg, chain)
    source = chain.stages.get(cfg.inputs.get("teacher", ""))
    if isinstance(source, CacheLogitsConfig):
        yield from _cache_problems(cfg, source)
    if cfg.hidden_weight and cfg.recompute_granularity == "full":
        yield Problem(
            rules.RECOMPUTE,
            "hidden_weight is set, but recompute_granularity=full runs the layers that it compares "
            "without gradients",
            "use recompute_granularity=none or selective, or hidden_weight=0",
        )
    if cfg.hidden_weight and cfg.cuda_graphs:
        yield Problem(
            rules.CUDA_GRAPHS,
            "cuda_graphs with hidden_weight: a layer that is replayed shows no hidden states",
            "leave one of them out",
        )
    yield from _teacher_problems(cfg, workload(cfg, chain).teacher)
    yield from _stop_problems(cfg, workload(cfg, chain).teacher)
    yield from tokenizer_problems(cfg, chain)


def _teacher_problems(cfg: DistillConfig, live: Architecture | None) -> Iterator[Problem]:
    """What goes with a live teacher only, or not with one."""
    if cfg.tp_comm_overlap and live is not None:
        yield Problem(
            rules.TP_COMM_OVERLAP,
            "tp_comm_overlap with a teacher beside the student, which Megatron's own distillation "
            "refuses",
            "leave it out, or use teacher=cached",
        )
    if not cfg.fp8_teacher:
        return
    if cfg.fp8 is None or live is None or cfg.fp8_recipe == "delayed":
        settings = f"fp8={cfg.fp8} and fp8_recipe={cfg.fp8_recipe}"
        yield Problem(
            rules.FP8,
            f"fp8_teacher with {settings if live else 'no teacher beside the student'}; without "
            "gradients, TransformerEngine finds no delayed scales",
            "leave fp8_teacher out, or use fp8=hybrid, another fp8_recipe and teacher=live",
        )
    else:
        yield from fp8_size_problems(cfg, live, " of the teacher")


def _stop_problems(cfg: DistillConfig, live: Architecture | None) -> Iterator[Problem]:
    """What keeps a training from seeing, before its end, how much it has brought back."""
    if cfg.stop_at_recovered is None:
        return
    if live is None or not cfg.kd_weight:
        yield Problem(
            rules.STOP,
            "stop_at_recovered needs the teacher on validation text, and "
            + ("a loss on its logits" if live else "there is none beside the student"),
            "use teacher=live with kd_weight above 0, or leave stop_at_recovered out",
        )
    if cfg.pipeline_model_parallel_size > 1:
        yield Problem(
            rules.STOP,
            "stop_at_recovered with pipeline_model_parallel_size="
            f"{cfg.pipeline_model_parallel_size}, over which validations pass the student alone",
            "use pipeline_model_parallel_size=1, or leave stop_at_recovered out",
        )
    if cfg.val_check_interval >= cfg.max_steps:
        yield Problem(
            rules.STOP,
            f"val_check_interval={cfg.val_check_interval} leaves no validation before the last of "
            f"max_steps={cfg.max_steps}, so stop_at_recovered has nothing to go by",
            "set val_check_interval lower",
        )


def workload(cfg: DistillConfig, chain: Chain) -> Workload:
    """The training as a planner sees it; a teacher that is cached, or not asked, takes nothing."""
    asked = cfg.kd_weight > 0 or cfg.hidden_weight > 0
    teacher = chain.teacher if asked and not _is_cached(cfg.inputs.get("teacher"), chain) else None
    student = chain.shape_of(cfg.inputs.get("student"))
    terms = (cfg.kd_weight > 0) + (cfg.lm_weight > 0)
    cache = chain.stages.get(cfg.inputs.get("teacher", ""))
    return replace(
        training_workload(cfg, student, teacher, terms),
        compares_hidden_states=cfg.hidden_weight > 0,
        windows=cache.num_windows if isinstance(cache, CacheLogitsConfig) else None,
    )


def _is_cached(teacher: str | None, chain: Chain) -> bool:
    """Whether a teacher is a cache: a stage of this run, or another run's."""
    if not teacher:
        return False
    if (source := chain.stages.get(teacher)) is not None:
        return isinstance(source, CacheLogitsConfig)
    manifest = manifest_of(teacher)
    return manifest is not None and manifest.kind == CACHED


def _pair_problems(cfg: DistillConfig, chain: Chain) -> Iterator[Problem]:
    if not cfg.intermediate_layer_pairs:
        return
    if any(len(pair) != 2 for pair in cfg.intermediate_layer_pairs):
        yield Problem(
            rules.HIDDEN_PAIRS,
            f"intermediate_layer_pairs={cfg.intermediate_layer_pairs} is not a list of "
            "[student, teacher] layers",
            "for example [[12,15],[24,30]]",
        )
        return
    student = chain.shape_of(cfg.inputs.get("student"))
    for role, shape, place in (("student", student, 0), ("teacher", chain.teacher, 1)):
        if shape.num_layers < cfg.pipeline_model_parallel_size:
            continue  # said by the rules on layouts
        allowed = last_stage_layers(shape.num_layers, cfg.pipeline_model_parallel_size)
        wrong = [pair[place] for pair in cfg.intermediate_layer_pairs if pair[place] not in allowed]
        if wrong:
            yield Problem(
                rules.HIDDEN_PAIRS,
                f"intermediate_layer_pairs names the {role}'s layers {wrong}; its last pipeline "
                f"stage, where the loss is, has {allowed.start} to {allowed.stop - 1}",
                "choose layers of that range, or a smaller pipeline_model_parallel_size",
            )


def _cache_problems(cfg: DistillConfig, cache: CacheLogitsConfig) -> Iterator[Problem]:
    """A cache holds a few log-probabilities of one temperature for windows of one length."""
    for name in ("seq_length", "temperature"):
        ours, cached = getattr(cfg, name), getattr(cache, name)
        if ours != cached:
            yield Problem(
                rules.CACHED_TEACHER,
                f"{name}={ours}, but the cached teacher's is {cached}",
                "use the same in both stages",
            )
    if cfg.context_parallel_size > 1:
        yield Problem(
            rules.CACHED_TEACHER,
            f"context_parallel_size={cfg.context_parallel_size}, but a cached teacher's windows "
            "are not split",
            "use teacher=live, or context_parallel_size=1",
        )
    if cfg.hidden_weight:
        yield Problem(
            rules.CACHED_TEACHER,
            "hidden_weight is set, but a cached teacher has no hidden states",
            "use teacher=live, or hidden_weight=0",
        )
    if cache.tail_draws and cfg.logits_loss != DRAWN_LOSS:
        yield Problem(
            rules.CACHED_TEACHER,
            f"logits_loss={cfg.logits_loss}, but the cached teacher's tail is drawn",
            f"use {DRAWN_LOSS}, or set stages.{cache.stage}.tail_draws=0",
        )
    if cfg.top_k not in (None, cache.top_k):
        yield Problem(
            rules.CACHED_TEACHER,
            f"top_k={cfg.top_k}, but the cached teacher's is {cache.top_k}",
            "set it in the stage that caches, and leave it out here",
        )


def run(cfg: DistillConfig, inputs: Inputs, out: Path) -> Outcome:
    """Trains, and saves the student as a checkpoint like the one it came from."""
    from nemo_convert import hf, nemo
    from recipes.distillation.objective import Objective
    from recipes.distillation.trainer import train

    student = nemo.find_checkpoint(inputs["student"].artifact)
    _require_same_tokenizer(inputs)
    arch = nemo.architecture_of(student)
    objective, log = Objective.of(cfg, inputs, arch), metrics_log(out)
    if healed := inputs["student"].manifest.result_if("heal", HealResult):
        log.progress("student", 1, 1, **{INITIAL_KL: healed.remaining_kl})
    train(cfg, student, objective, inputs["data"], out / student.name, log)
    kept = inputs["student"].manifest.result(KeptLayers).kept_layers
    return Outcome(
        replace(result(cfg, metrics_file(out)), kept_layers=kept) if rank() == 0 else None,
        architecture=arch.as_dict(),
        parameters=arch.parameters(),
        tokenizer_sha256=hf.tokenizer_sha256(nemo.side_files(student)),
    )


def result(cfg: DistillConfig, file: Path) -> DistillationResult:
    """What the training came to, from its metrics file."""
    first = steps_of(file, cfg.stage)[0]
    found = training_result(cfg, file)
    stopped = stop_reason(cfg, file, found.steps)
    return DistillationResult(
        **vars(found), teacher_loss=first.get("teacher_loss"), stopped=stopped
    )


def _require_same_tokenizer(inputs: Inputs) -> None:
    hashes = {name: item.manifest.tokenizer_sha256 for name, item in inputs.items()}
    if len(set(hashes.values())) > 1:
        raise RecipeError(
            f"teacher, student and data were not made with one tokenizer: {hashes}.",
            "distil between models of one vocabulary, on data tokenized with it",
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
    resolve_from_chain=resolve_from_chain,
    disk_bytes=lambda config, chain: training_bytes(
        config, chain.shape_of(config.inputs["student"]).parameters()
    ),
    workload=workload,
    progress=training_progress,
)

if __name__ == "__main__":
    STAGE.main()
