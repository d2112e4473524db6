"""Computes the cost of a run from its manifests: hours, memory and FLOPs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from nemo_convert.architecture import Architecture
from recipes.core.manifest import Manifest
from recipes.core.stage import Inputs
from recipes.data.results import DatasetResult
from recipes.distillation.results import CacheResult, DistillationResult, TrainingResult
from recipes.distillation.settings import uses_teacher
from recipes.evaluation.results import AddLayersResult, EvaluationResult
from recipes.planning.inference_cost import ABLATED_FRACTION, ablation_passes
from recipes.planning.transformer import (
    FORWARDS_PER_BACKWARD,
    forward_flops,
    head_flops,
    least_squares_flops,
)
from recipes.pruning.results import HealResult, ScoreResult

MAX_FILES = 200
"""Maximum number of files that the report lists per stage. A large checkpoint has thousands."""
TRAINING_FACTOR = 1 + FORWARDS_PER_BACKWARD
"""FLOPs of a training step, divided by the FLOPs of its forward pass."""


@dataclass(frozen=True)
class ModelFlops:
    """Tokens that a stage passed through its models, and the FLOPs of the passes."""

    label: str
    """Name of the stage or of its computation, for the report."""
    tokens: int
    student: float
    """FLOPs of the student, and of fitting the student's weights by least squares."""
    teacher: float
    """FLOPs of the teacher."""
    seconds: float | None = None
    """Time of the passes only, not of the whole stage; ``None`` if unknown."""

    @property
    def flops(self) -> float:
        """FLOPs of both models."""
        return self.student + self.teacher


def cost_sections(
    inputs: Inputs, earlier: Mapping[str, Manifest], passes: list[ModelFlops]
) -> dict[str, object]:
    """Returns the template variables of the sections ``cost`` and ``provenance``.

    ``inputs`` are the report's. ``earlier`` has the manifests of all stages upstream of them, by
    name. ``passes`` is the result of ``model_flops``.
    """
    stages = [*earlier.items(), *((item.directory.name, item.manifest) for item in inputs.values())]
    stages.sort(key=lambda item: item[1].started_at)
    manifests = [manifest for _, manifest in stages]
    processes = (_resource(m, "nodes") * _resource(m, "devices") for m in manifests)
    return {
        "stages": [(name, manifest, machine_hours(manifest)) for name, manifest in stages],
        "seconds": sum(m.seconds for m in manifests),
        "hours": sum(map(machine_hours, manifests)),
        "processes": max(processes),
        "passes": passes,
        "largest": {  # the lengths of bars are divided by these maxima, which must not be 0
            "bytes": max(m.total_bytes() for m in manifests) or 1,
            "seconds": max(m.seconds for m in manifests) or 1,
            "peak": max(m.peak_rss_bytes for m in manifests) or 1,
            "flops": max((p.flops for p in passes), default=0) or 1,
        },
        "max_files": MAX_FILES,
    }


def versions(manifests: Iterable[Manifest]) -> dict[str, list[str]]:
    """Returns each library's versions: several if stages ran in different environments."""
    by_library: dict[str, dict[str, None]] = {}  # the inner dict is an ordered set of versions
    for manifest in manifests:
        for library, version in manifest.versions.items():
            by_library.setdefault(library, {})[version] = None
    return {library: list(ordered_set) for library, ordered_set in by_library.items()}


def distillations(
    stages: Mapping[str, Manifest],
) -> list[tuple[str, Manifest, DistillationResult]]:
    """Returns name, manifest and result of all distillations, in the order in which they started.

    ``stages`` has manifests by name, also those of other stages.
    """
    results = [(n, m, m.result_if("distill", DistillationResult)) for n, m in stages.items()]
    phases = [(name, manifest, result) for name, manifest, result in results if result]
    return sorted(phases, key=lambda item: item[1].started_at)


def datasets(stages: Iterable[Manifest]) -> list[DatasetResult]:
    """Returns the results of all stages that prepared text, in the order in which they started."""
    ordered = sorted(stages, key=lambda manifest: manifest.started_at)
    results = (manifest.result_if("prepare_data", DatasetResult) for manifest in ordered)
    return [result for result in results if result]


def machine_hours(manifest: Manifest) -> float:
    """Returns a stage's duration in hours, multiplied by its number of nodes."""
    return manifest.seconds / 3600 * _resource(manifest, "nodes")


def _resource(manifest: Manifest, name: str) -> int:
    """Returns a number in a stage's ``resources``, such as ``nodes``; 1 if it is not set."""
    return int((manifest.config.get("resources") or {}).get(name, 1))


def model_flops(
    manifests: Mapping[str, Manifest], earlier: Mapping[str, Manifest]
) -> list[ModelFlops]:
    """Returns the FLOPs of each stage that runs models and records the number of tokens.

    The list is empty if the shape of the teacher or of the student is not known. ``manifests`` are
    those of the report's inputs, and ``earlier`` those of all stages upstream of them, by name.
    """
    teacher, student = (_shape(manifests[name]) for name in ("teacher", "distilled"))
    if teacher is None or student is None:
        return []
    rows = []
    for name, manifest in earlier.items():
        rows += _earlier_flops(name, manifest, earlier, teacher)
    rows += _distillation_flops("Distillation", manifests["distilled"], earlier, teacher)
    evaluated = student
    if "sizes" in manifests:  # then the evaluated model is the student with added layers
        rows += _added_layers_flops(manifests["sizes"], teacher)
        evaluated = _shape(manifests["sizes"]) or student
    evaluation = manifests["evaluation"]
    tokens = evaluation.result(EvaluationResult).tokens
    # The evaluation runs three models. The pruned model has the student's shape.
    pruned_flops, student_flops, teacher_flops = (
        tokens * _forward_flops(arch, evaluation) for arch in (student, evaluated, teacher)
    )
    return [*rows, ModelFlops("Evaluation", tokens, pruned_flops + student_flops, teacher_flops)]


def _added_layers_flops(manifest: Manifest, teacher: Architecture) -> list[ModelFlops]:
    """Returns the FLOPs of ``add_layers``, which measures one model for each number of layers."""
    result = manifest.result(AddLayersResult)
    # Layers can be added only to students that have the teacher's widths.
    shapes = [replace(teacher, num_layers=number) for number in result.sizes]
    *students, teacher_flops = (
        result.tokens * _forward_flops(arch, manifest) for arch in (*shapes, teacher)
    )
    return [ModelFlops("Added layers", result.tokens, sum(students), teacher_flops)]


def _earlier_flops(
    name: str, manifest: Manifest, earlier: Mapping[str, Manifest], teacher: Architecture
) -> list[ModelFlops]:
    """Returns the FLOPs of a stage that is upstream of the report's inputs.

    The list is empty if the stage runs no models, or if its FLOPs are not known.
    """
    if scored := manifest.result_if("score", ScoreResult):
        config, tokens = manifest.config, scored.calibration_tokens
        passes = ablation_passes(
            teacher.num_layers, config["num_loss_samples"], config["block_sizes"] or []
        )
        # A pass without some layers costs as much as a full pass over fewer tokens.
        full_pass_tokens = tokens + ABLATED_FRACTION * passes * config["seq_length"]
        flops = full_pass_tokens * _forward_flops(teacher, manifest)
        return [ModelFlops(name, tokens, student=0, teacher=flops)]
    if corrected := manifest.result_if("correct_teacher", TrainingResult):
        flops = TRAINING_FACTOR * corrected.tokens * _forward_flops(teacher, manifest)
        return [ModelFlops(name, corrected.tokens, student=0, teacher=flops)]
    if cached := manifest.result_if("cache_logits", CacheResult):
        flops = cached.tokens * _forward_flops(teacher, manifest)
        return [ModelFlops(name, cached.tokens, student=0, teacher=flops)]
    healed, student = manifest.result_if("heal", HealResult), _shape(manifest)
    if healed and student:
        tokens = healed.calibration_tokens
        student_flops, teacher_flops = (  # the reconstruction computes no logits
            tokens * (_forward_flops(arch, manifest) - head_flops(arch))
            for arch in (student, teacher)
        )
        fit_flops = tokens * least_squares_flops(teacher, student)
        return [ModelFlops(name, tokens, student_flops + fit_flops, teacher_flops)]
    return _distillation_flops(name, manifest, earlier, teacher)


def _distillation_flops(
    label: str, distilled: Manifest, earlier: Mapping[str, Manifest], teacher: Architecture
) -> list[ModelFlops]:
    """Returns the FLOPs of a distillation; an empty list for other stages.

    With a cache of the teacher's logits, the stage in ``earlier`` that wrote the cache has the
    teacher's FLOPs.
    """
    training, student = distilled.result_if("distill", DistillationResult), _shape(distilled)
    if training is None or student is None:
        return []
    tokens = training.tokens
    student_flops = TRAINING_FACTOR * tokens * _forward_flops(student, distilled)
    caches = {m.fingerprint for m in earlier.values() if m.kind == "logit_cache"}
    is_cached = distilled.inputs.get("teacher") in caches
    has_live_teacher = uses_teacher(distilled.config) and not is_cached
    teacher_flops = tokens * _forward_flops(teacher, distilled) if has_live_teacher else 0
    seconds = tokens / training.tokens_per_second
    return [ModelFlops(label, tokens, student_flops, teacher_flops, seconds)]


def _shape(manifest: Manifest) -> Architecture | None:
    """Returns the architecture of a stage's model; ``None`` if the manifest does not have it."""
    return Architecture(**manifest.architecture) if manifest.architecture else None


def _forward_flops(arch: Architecture, stage: Manifest) -> float:
    """Returns the FLOPs of a token's forward pass at a stage's sequence length."""
    return forward_flops(arch, stage.config["seq_length"])
