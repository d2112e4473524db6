"""Functions that all training stages share: checks, the planned workload, results.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TypeVar

from nemo_convert.architecture import Architecture
from recipes.core.compiled import missing_compiler
from recipes.core.errors import did_you_mean
from recipes.core.manifest import manifest_of
from recipes.core.metrics import read_records, steps_of
from recipes.core.stage import Inputs
from recipes.data.results import DatasetResult, TrainedSource
from recipes.data.settings import PrepareDataConfig
from recipes.distillation.results import TrainingResult
from recipes.distillation.settings import (
    FEED_FORWARD,
    FP8_CAPABILITIES,
    FP8_RECIPES,
    CacheLogitsConfig,
    DistillConfig,
    TrainingConfig,
)
from recipes.planning import rules
from recipes.planning.chain import Chain, sequence_problems
from recipes.planning.limits import fp8_problems
from recipes.planning.rules import Problem, first_problems
from recipes.planning.workload import CHECKPOINT_BYTES, Layout, Workload

Config = TypeVar("Config", bound=TrainingConfig)
Weighted = TypeVar("Weighted", bound=TrainingConfig | CacheLogitsConfig)
COMPILED_STEPS = 100
"""Fewest steps for which training on a CPU is compiled by default. With fewer steps, compiling
saves no time."""
CHECKPOINTS = "checkpoints"
"""Name of the directory with checkpoints of training, in the stage's work directory."""
VALIDATE = "validate"
"""Name of validation as a task in the metrics file."""
INITIAL_KL = "initial_kl_fraction"
"""Key, in the metrics file, of the fraction of the KL added by pruning that remains after healing
(a least-squares fit of the pruned model's weights)."""
UNFINISHED = "-unfinished"
"""Suffix of the marker that NeMo keeps beside a checkpoint while it is being written."""


def with_weights(cfg: Weighted, chain: Chain, data: str) -> Weighted:
    """Sets empty ``weights`` to those of the stage ``data``, if the run has this stage."""
    prepare_data = chain.stages.get(data)
    if cfg.weights or not isinstance(prepare_data, PrepareDataConfig):
        return cfg
    return replace(cfg, weights=prepare_data.weights())


def with_hidden_stages(cfg: DistillConfig) -> DistillConfig:
    """Sets ``hidden_pipeline_stages``, if the layer pairs depend on it, to its default.

    The stage's fingerprint then has this number, but not ``pipeline_model_parallel_size`` itself.
    """
    uses_default_pairs = cfg.hidden_weight > 0 and not cfg.intermediate_layer_pairs
    if not uses_default_pairs or cfg.hidden_pipeline_stages:
        return cfg
    return replace(cfg, hidden_pipeline_stages=cfg.pipeline_model_parallel_size)


def resolve_from_chain(cfg: Config, chain: Chain) -> Config:
    """Sets the defaults of ``weights`` and ``compile``, which depend on data and machine."""
    cfg = with_weights(cfg, chain, cfg.inputs.get("data", ""))
    if cfg.compile is not None:
        return cfg
    saves_time = cfg.max_steps >= COMPILED_STEPS and _runs_on_this_cpu(chain)
    return replace(cfg, compile=saves_time and missing_compiler() is None)


def _runs_on_this_cpu(chain: Chain) -> bool:
    return chain.runs_here and not chain.hardware.on_gpu


def training_problems(
    cfg: TrainingConfig, chain: Chain, shapes: Sequence[Architecture]
) -> Iterator[Problem]:
    """Finds settings that would fail once training has started.

    ``shapes`` are all shapes that the trained model may have.
    """
    yield from _schedule_problems(cfg)
    yield from weight_problems(cfg.name, cfg.weights, cfg.inputs.get("data", ""), chain)
    if cfg.fp8 is not None:
        yield from _fp8_problems(cfg, chain)
        yield from first_problems(_fp8_size_problems(cfg, shape) for shape in shapes)
    yield from _compiler_problems(cfg, chain)
    yield from _recompute_problems(cfg, shapes[0].num_moe_experts > 0)
    steps = cfg.profile_steps
    if steps and not (len(steps) == 2 and steps[0] <= steps[1] <= cfg.max_steps):
        yield Problem(
            rules.PROFILE,
            f"invalid profile_steps={steps}: must be [first, last], from 1 to {cfg.max_steps}",
            "for example [10,12]",
        )
    yield from sequence_problems(cfg.seq_length, cfg.inputs, chain)


def weight_problems(
    name: str, weights: Collection[str], data: str, chain: Chain
) -> Iterator[Problem]:
    """Finds weights of unknown sources, and text of another run whose sources have no weights.

    The user sets ``weights`` in ``stages.<name>``. ``data`` is the name of the stage that prepares
    the text, or the directory of such a stage in another run.
    """
    prepare_data, manifest = chain.stages.get(data), manifest_of(data)
    if isinstance(prepare_data, PrepareDataConfig):
        sources = prepare_data.training_names()
    elif manifest is not None:  # ``data`` is a directory of another run
        text = manifest.result(DatasetResult)
        sources = [source.source for source in text.source_tokens["train"]]
        if len(sources) > 1 and not weights:
            example = ", ".join(f"{source}: 1" for source in sources)
            yield Problem(
                rules.SOURCE_WEIGHTS,
                f"weights is empty, so longer sources of {data} count more: weights of "
                "the run that prepared it do not apply",
                f"to set weights: '+stages.{name}.weights={{{example}}}'",
            )
    else:
        return  # the names of the sources are not known yet
    for source in weights:
        if source not in sources:
            yield Problem(
                rules.DATA_SOURCES,
                f"weights has '{source}', which is not a training source of {data}."
                f"{did_you_mean(source, sources)}",
                f"use one of: {', '.join(sources)}",
            )


def _schedule_problems(cfg: TrainingConfig) -> Iterator[Problem]:
    if cfg.warmup_steps >= cfg.max_steps:
        yield Problem(
            rules.SCHEDULE,
            f"warmup_steps={cfg.warmup_steps} is not less than max_steps={cfg.max_steps}",
            "set warmup_steps lower",
        )
    if cfg.min_lr > cfg.lr:
        yield Problem(
            rules.SCHEDULE,
            f"min_lr={cfg.min_lr} is above the peak learning rate, lr={cfg.lr}",
            "set min_lr lower",
        )


def _compiler_problems(cfg: TrainingConfig, chain: Chain) -> Iterator[Problem]:
    if cfg.compile and _runs_on_this_cpu(chain) and (file_and_fix := missing_compiler()):
        file, fix = file_and_fix
        yield Problem(
            rules.COMPILER, f"compile=true, but there is no {file}", f"{fix}; or do not set compile"
        )


def _recompute_problems(cfg: TrainingConfig, is_moe: bool) -> Iterator[Problem]:
    """Finds ``recompute_modules`` that the model does not have, which Megatron would ignore."""
    dense, experts = FEED_FORWARD
    present, absent = (experts, dense) if is_moe else (dense, experts)
    if cfg.recompute_granularity == "selective" and absent in cfg.recompute_modules:
        yield Problem(
            rules.RECOMPUTE,
            f"recompute_modules has {absent}, but this model's feed-forward network is {present}",
            f"recompute_modules=[{present}]",
        )


def _fp8_problems(cfg: TrainingConfig, chain: Chain) -> Iterator[Problem]:
    if not chain.hardware.on_gpu or cfg.precision != "bf16-mixed":
        yield Problem(
            rules.FP8,
            f"fp8={cfg.fp8} needs a GPU and precision=bf16-mixed, but the settings are "
            f"hardware={chain.hardware.name} and precision={cfg.precision}",
            "do not set fp8; or set hardware to a GPU's profile and precision=bf16-mixed",
        )
    available = chain.hardware.compute_capability or 0
    supported = [recipe for recipe, needed in FP8_CAPABILITIES.items() if needed <= available]
    fix = f"set fp8_recipe={supported[0]}" if supported else "do not set fp8"
    yield from fp8_problems(chain.hardware, FP8_CAPABILITIES[cfg.fp8_recipe], fix)


def _fp8_size_problems(cfg: TrainingConfig, shape: Architecture) -> Iterator[Problem]:
    """Finds sizes of matrices that FP8 kernels do not support."""
    divisor = FP8_RECIPES[cfg.fp8_recipe]
    for name, size in _fp8_sizes(cfg, shape).items():
        if size % divisor:
            yield Problem(
                rules.FP8,
                f"{name} is {size} on a rank, not a multiple of {divisor}",
                "prune to another size (in a search: set the divisors of its space), lower "
                "tensor_model_parallel_size, or do not set fp8",
            )


def _fp8_sizes(cfg: TrainingConfig, shape: Architecture) -> dict[str, int]:
    """Returns the sizes of a rank's matrices, by name."""
    tensor = cfg.tensor_model_parallel_size
    ffn = shape.moe_ffn_hidden_size if shape.num_moe_experts else shape.ffn_hidden_size
    qkv_heads = shape.num_attention_heads + 2 * shape.num_query_groups
    sequence_shards = cfg.context_parallel_size * (tensor if cfg.splits_sequence else 1)
    return {
        "hidden_size": shape.hidden_size,
        "the feed-forward size": ffn // tensor,
        "the output size of the QKV projection": qkv_heads * shape.kv_channels // tensor,
        "a micro batch": cfg.micro_batch_size * cfg.seq_length // sequence_shards,
    }


def layout_of(cfg: TrainingConfig) -> Layout:
    """Returns the parallel layout, for plans."""
    return Layout(
        nodes=cfg.resources.nodes,
        devices=cfg.resources.devices,
        tensor=cfg.tensor_model_parallel_size,
        pipeline=cfg.pipeline_model_parallel_size,
        context=cfg.context_parallel_size,
        expert=cfg.expert_model_parallel_size,
        optimizer_instances=cfg.num_distributed_optimizer_instances,
        micro_batch_size=cfg.micro_batch_size,
        sequence_parallel=cfg.splits_sequence,
        recompute_granularity=cfg.recompute_granularity,
        recompute_feed_forward=cfg.recomputes_feed_forward,
    )


def training_workload(
    cfg: TrainingConfig, trained: Architecture, teacher: Architecture | None = None, terms: int = 1
) -> Workload:
    """Returns the workload of a training run, from which plans estimate time and memory.

    ``teacher`` is the shape of a live teacher. ``terms`` is the number of terms of the loss on
    logits (KD and LM).
    """
    bf16 = cfg.precision == "bf16-mixed"
    return Workload(
        trained=trained,
        teacher=teacher,
        layout=layout_of(cfg),
        seq_length=cfg.seq_length,
        global_batch_size=cfg.global_batch_size,
        steps=cfg.max_steps,
        bf16=bf16,
        # TransformerEngine stores a row-wise and a column-wise FP8 copy of each weight
        # (``_fp8_workspaces`` of its modules), with one byte per number.
        weight_copy_bytes=2 if cfg.fp8 else 0,
        gradient_bytes=4 if cfg.grad_reduce_in_fp32 or not bf16 else 2,
        validation_batches=cfg.limit_val_batches,
        # ``max`` avoids a division by 0: plans also get settings with ``max_steps`` 0, from a round
        # of successive halving, before the check of that stage refuses them.
        validations=cfg.max_steps // max(min(cfg.val_check_interval, cfg.max_steps), 1),
        checkpoints=cfg.max_steps // cfg.checkpoint_interval,
        terms=terms,
    )


def training_bytes(cfg: TrainingConfig, parameters: int) -> int:
    """Returns the bytes on disk of the trained model and its checkpoints."""
    model_bytes = 4  # per parameter, in float32
    checkpoints = cfg.keep_checkpoints + 1  # a new one is written before the oldest one is deleted
    return parameters * (model_bytes + CHECKPOINT_BYTES * checkpoints)


def training_progress(work: Path) -> str | None:
    """Returns the last saved step, such as "step 20"; ``None`` without a checkpoint."""
    steps = [steps_of_checkpoint(path) for path in complete_checkpoints(work / CHECKPOINTS)]
    return f"step {max(steps)}" if steps else None


def complete_checkpoints(directory: Path) -> list[Path]:
    """Returns the checkpoints that are not marked as unfinished."""
    unfinished = {p.name.removesuffix(UNFINISHED) for p in directory.glob(f"*{UNFINISHED}")}
    return [p for p in directory.glob("step=*") if p.is_dir() and p.name not in unfinished]


def steps_of_checkpoint(checkpoint: Path) -> int:
    """Returns the number of steps before a checkpoint: N + 1 for ``step=N`` and ``step=N-last``."""
    return int(checkpoint.name.rpartition("=")[2].split("-")[0]) + 1


def training_result(cfg: TrainingConfig, file: Path) -> TrainingResult:
    """Reads the result of training from the metrics file.

    The file also has the steps before a restart, which this process did not train.
    """
    steps, validations = steps_of(file, cfg.stage), steps_of(file, VALIDATE)
    # The last step with a finite loss: the file has ``null`` for NaN and infinity.
    last_finite = next((step for step in reversed(steps) if step["loss"] is not None), steps[-1])
    return TrainingResult(
        final_loss=last_finite["loss"],
        final_kd=last_finite.get("kd"),
        final_hidden=last_finite.get("hidden"),
        final_lm=last_finite.get("lm"),
        val_loss=validations[-1]["val_loss"] if validations else None,
        steps=steps[-1]["done"],
        skipped_steps=sum(bool(step.get("skipped")) for step in steps),
        tokens=steps[-1]["done"] * cfg.global_batch_size * cfg.seq_length,
        tokens_per_second=median(step["tokens_per_second"] for step in steps),
    )


def trained_sources(
    cfg: TrainingConfig, result: TrainingResult, inputs: Inputs, cached: Iterable[int] | None = None
) -> list[TrainedSource]:
    """Returns the tokens and epochs of each source that training read.

    ``cached`` has the numbers of the sequences in the logit cache, if the teacher is cached.
    """
    data = inputs["data"].manifest.result(DatasetResult)
    if cached is not None:
        data = data.with_sequences(cached, cfg.seq_length)
    return data.trained_sources(result.tokens, cfg.weights)


def stop_reason(cfg: DistillConfig, file: Path, step: int) -> str:
    """Returns why a distillation stops after ``step``; "" if the distillation continues.

    It stops once healing and training together have recovered enough of the KL added by pruning.
    All validations measure the KL to the teacher on the same sequences. Only records of the metrics
    ``file`` up to ``step`` are read, so a restarted run makes the same decision as the first start.
    """
    if cfg.stop_at_recovered is None or step >= cfg.max_steps:  # a stop at the end is not early
        return ""
    records = steps_of(file, VALIDATE)
    validations = [r for r in records if r["done"] <= step and r.get("val_kd") is not None]
    if len(validations) < 2:
        return ""  # at least one step is trained, even if healing recovered enough
    first, last = validations[0], validations[-1]
    # Fraction of the KL after healing (the first validation) that remains after training.
    remaining = last["val_kd"] / first["val_kd"] if first["val_kd"] else 0.0
    recovered = 1 - initial_kl_fraction(file) * remaining
    if recovered < cfg.stop_at_recovered:
        return ""
    return (
        f"stopped at step {last['done']} of {cfg.max_steps}: recovered {recovered:.0%} of the KL "
        f"added by pruning (stop_at_recovered={cfg.stop_at_recovered:g})"
    )


def initial_kl_fraction(file: Path) -> float:
    """Reads the fraction of the KL added by pruning that remains after healing; 1 if not stored."""
    values = (record.get(INITIAL_KL) for record in read_records(file))
    return next((float(value) for value in values if value is not None), 1.0)
