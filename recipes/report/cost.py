"""What a run cost: hours, memory, and the FLOPs of its training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from nemo_convert.architecture import Architecture
from recipes.core.manifest import Manifest, read_manifest
from recipes.core.stage import Inputs
from recipes.distillation.results import CacheResult, DistillationResult, TrainingResult
from recipes.evaluation.results import EvaluationResult
from recipes.pruning.results import HealResult, PruneResult

MAX_FILES = 200
"""Files listed per stage; a large checkpoint has thousands, and its manifest names them all."""
TRAINING = 3
"""A training step's FLOPs over its forward pass's: the backward pass costs twice as much."""


@dataclass(frozen=True)
class Work:
    """Tokens that passed through models, and their matrix-multiplication FLOPs."""

    label: str
    tokens: int
    student: int
    """FLOPs of the model that is made or measured."""
    teacher: int
    seconds: float | None = None
    """Of the passes alone, where it is known."""

    @property
    def flops(self) -> int:
        """FLOPs of both models."""
        return self.student + self.teacher


def costs(inputs: Inputs, before: Mapping[str, Manifest], passes: list[Work]) -> dict[str, object]:
    """What the templates of cost and provenance show of inputs and the stages ``before`` them."""
    stages = [*before.items(), *((item.directory.name, item.manifest) for item in inputs.values())]
    stages.sort(key=lambda item: item[1].started_at)
    every = [manifest for _, manifest in stages]
    return {
        "stages": [(name, manifest, machine_hours(manifest)) for name, manifest in stages],
        "seconds": sum(m.seconds for m in every),
        "hours": sum(map(machine_hours, every)),
        "processes": max(_processes(m.config) for m in every),
        "work": passes,
        "largest": {
            "bytes": max(m.total_bytes() for m in every) or 1,
            "seconds": max(m.seconds for m in every) or 1,
            "peak": max(m.peak_rss_bytes for m in every) or 1,
            "flops": max((one.flops for one in passes), default=0) or 1,
        },
        "max_files": MAX_FILES,
    }


def versions(manifests: Iterable[Manifest]) -> dict[str, list[str]]:
    """Each library's versions; more than one where stages ran in different environments."""
    found: dict[str, list[str]] = {}
    for manifest in manifests:
        for library, version in manifest.versions.items():
            known = found.setdefault(library, [])
            if version not in known:
                known.append(version)
    return found


def upstream(inputs: Inputs) -> dict[str, Manifest]:
    """Stages that the inputs were made from and that are no inputs of the report themselves.

    They are looked for beside the inputs and known by their fingerprints, so a stage of an older
    run of the same directory is not taken for one.
    """
    found: dict[str, Manifest] = {}
    known = {item.manifest.fingerprint for item in inputs.values()}
    wanted = {f for item in inputs.values() for f in item.manifest.inputs.values()} - known
    run_dirs = {item.directory.parent for item in inputs.values()}
    folders = [path for run in run_dirs for path in sorted(run.iterdir()) if path.is_dir()]
    complete = ((path.name, read_manifest(path)) for path in folders)
    beside = {m.fingerprint: (name, m) for name, m in complete if m is not None}
    while wanted:
        fingerprint = wanted.pop()
        known.add(fingerprint)
        if fingerprint in beside:
            name, manifest = beside[fingerprint]
            found[name] = manifest
            wanted |= set(manifest.inputs.values()) - known
    return found


def machine_hours(manifest: Manifest) -> float:
    """Hours times machines."""
    return manifest.seconds / 3600 * _nodes(manifest.config)


def _processes(config: Mapping[str, Any]) -> int:
    """Ranks: one per GPU, or per gloo process."""
    return _nodes(config) * int(_resources(config).get("devices", 1))


def _nodes(config: Mapping[str, Any]) -> int:
    return int(_resources(config).get("nodes", 1))


def _resources(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("resources") or {}


def flops_per_token(manifest: Manifest) -> int | None:
    """Forward FLOPs of a token; ``None`` for a stage that made no model."""
    if manifest.architecture is None:
        return None
    known = {spec.name for spec in fields(Architecture)}
    shape = {name: value for name, value in manifest.architecture.items() if name in known}
    return Architecture(**shape).forward_flops_per_token()


def work(manifests: Mapping[str, Manifest], before: Mapping[str, Manifest]) -> list[Work]:
    """The passes of a run through its models, as far as their tokens were recorded."""
    teacher = flops_per_token(manifests["teacher"])
    student = flops_per_token(manifests["distilled"])
    if teacher is None or student is None:
        return []
    found = []
    if pruned := manifests["pruned"].result_if("prune", PruneResult):
        tokens = pruned.calibration_tokens
        found.append(Work("Importance for pruning", tokens, 0, tokens * teacher))
    for name, manifest in before.items():
        if corrected := manifest.result_if("correct_teacher", TrainingResult):
            tokens = corrected.tokens
            found.append(Work(name, tokens, 0, TRAINING * tokens * teacher))
        if cached := manifest.result_if("cache_logits", CacheResult):
            found.append(Work(name, cached.tokens, 0, cached.tokens * teacher))
        if healed := manifest.result_if("heal", HealResult):
            tokens = healed.calibration_tokens
            passes = tokens * (flops_per_token(manifest) or 0)
            found.append(Work(name, tokens, passes, tokens * teacher))
        found += _distillation(name, manifest, before, teacher)
    found += _distillation("Distillation", manifests["distilled"], before, teacher)
    tokens = manifests["evaluation"].result(EvaluationResult).tokens
    # The pruned model has the student's shape.
    return [*found, Work("Evaluation", tokens, 2 * tokens * student, tokens * teacher)]


def _distillation(
    label: str, distilled: Manifest, before: Mapping[str, Manifest], teacher: int
) -> list[Work]:
    training = distilled.result_if("distill", DistillationResult)
    student = flops_per_token(distilled)
    if training is None or student is None:
        return []
    tokens = training.tokens
    cached = any(
        manifest.kind == "logit_cache" and manifest.fingerprint == distilled.inputs.get("teacher")
        for manifest in before.values()
    )
    live = 0 if cached else tokens * teacher
    seconds = tokens / training.tokens_per_second
    return [Work(label, tokens, TRAINING * tokens * student, live, seconds)]
