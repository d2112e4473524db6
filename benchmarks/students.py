"""Students that differ in how they were pruned: trained alike, and measured on the same text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from benchmarks.contenders import launch, manifest_of
from recipes.core.files import write_json
from recipes.distillation.results import TrainingResult
from recipes.evaluation.results import EvaluationResult


@dataclass(frozen=True, kw_only=True)
class Student:
    """What a student came to on held-out text; perplexities, and the distilled one's likeness."""

    pruned: float
    distilled: float
    kl_to_teacher: float
    top1_agreement: float
    tokens: int
    """That it was trained on."""


StudentT = TypeVar("StudentT", bound=Student)


def schedule(steps: int) -> dict[str, object]:
    """Settings of a training that is validated and saved only at its end."""
    return {
        "distill.max_steps": steps,
        "distill.warmup_steps": steps // 10,
        "distill.checkpoint_interval": steps,
        "distill.val_check_interval": steps,
    }


def make_student(
    base: Path, scores: Path, out: Path, steps: int, settings: Mapping[str, object]
) -> None:
    """Prunes, distils and evaluates, unless that is complete.

    Args:
        base: Run with ``import_hf`` and ``prepare_data``.
        scores: Stage that scored the teacher.
        out: Run directory.
        steps: Of distillation.
        settings: Further fields below ``stages``, among them what to prune to.
    """
    common: dict[str, object] = {
        "prune.inputs.checkpoint": base / "import_hf",
        "prune.inputs.importance": scores,
        "distill.inputs.teacher": base / "import_hf",
        "distill.inputs.data": base / "prepare_data",
        **schedule(steps),
        "evaluate.inputs.teacher": base / "import_hf",
        "evaluate.inputs.data": base / "prepare_data",
        "evaluate.num_generations": 1,
        "evaluate.new_tokens": 1,
    }
    launch(base, out, ("prune", "distill", "evaluate"), {**common, **settings})


def figures(out: Path) -> dict[str, Any]:
    """A student's fields, from the manifests of its run."""
    evaluation = manifest_of(out / "evaluate").result(EvaluationResult)
    return {
        "pruned": evaluation.pruned.perplexity,
        "distilled": evaluation.distilled.perplexity,
        "kl_to_teacher": evaluation.distilled.kl_to_teacher,
        "top1_agreement": evaluation.distilled.top1_agreement,
        "tokens": manifest_of(out / "distill").result(TrainingResult).tokens,
    }


def collect(students: Iterable[StudentT], file: Path, console: Console) -> list[StudentT]:
    """Prints each when it is there, and writes all so far: a killed benchmark leaves them."""
    found: list[StudentT] = []
    for student in students:
        found.append(student)
        console.print(student)
        plain = [asdict(one) for one in found]
        write_json(file, plain)
    return found
