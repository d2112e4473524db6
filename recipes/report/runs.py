"""What runs left behind, read back for a comparison of them. Torch-free."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from omegaconf import OmegaConf

from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, WORK, Manifest, read_manifest
from recipes.core.stage import REQUEST, RUN_FILE, asked, planned_stages
from recipes.core.statistics import mean, standard_error
from recipes.evaluation.results import EvaluationResult

IGNORED = ("stage", "inputs", "resources", "title", "description", "recipe")
"""Settings that name or place a stage, and so are no difference between runs."""

Text = tuple[str, object, int, int | None, str]
"""Held-out text: hash, length of a window, number of windows, predictions that count; precision."""


@dataclass(frozen=True)
class RunRecord:
    """One run directory: its stages' manifests by their names in the recipe."""

    path: Path
    recipe: str
    stages: Mapping[str, Manifest]
    incomplete: tuple[str, ...] = ()
    """Stages that were requested and are not complete."""
    losses: tuple[float, ...] = field(default=(), repr=False)
    """The distilled model's loss in each held-out window."""

    def find(self, kind: str) -> Manifest | None:
        """The first stage of a kind."""
        return next((m for m in self.stages.values() if m.kind == kind), None)

    @property
    def exported(self) -> Manifest | None:
        """The student's folder; a run may hold an export of the teacher and quantized ones too."""
        every = [m for m in self.stages.values() if m.stage == "export_hf"]
        return next((m for m in every if "evaluation" in m.inputs), None)

    @cached_property
    def evaluation(self) -> EvaluationResult | None:
        """Figures of the evaluation; ``None`` where it did not come so far."""
        found = self.find("eval_results")
        return found.result(EvaluationResult) if found else None

    def text(self) -> Text | None:
        """What perplexities must share to be comparable: the held-out text and how it is cut."""
        evaluation = self.find("eval_results")
        if evaluation is None or self.evaluation is None:
            return None
        read = evaluation.input_content.get("data", "")
        data = self.find("dataset")
        heldout = data.files.get("heldout.bin") if data and data.content() == read else None
        return (
            heldout.sha256 if heldout else read,
            evaluation.config.get("seq_length"),
            self.evaluation.windows,
            self.evaluation.predictions,
            self.evaluation.precision,
        )


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run directories among the paths and below them, in order; refuses a path that holds none."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise RecipeError(f"{path} is not a directory.", "give run directories, or a sweep's")
        runs = [path] if (path / RUN_FILE).is_file() else _sorted_below(path)
        if not runs:
            raise RecipeError(
                f"{path} is no run and holds none: there is no {RUN_FILE} in it.",
                "give directories such as runs/llama_depth_prune or runs/sweeps/TIME",
            )
        found.update(dict.fromkeys(run.resolve() for run in runs))
    return list(found)


def _sorted_below(path: Path) -> list[Path]:
    """Runs of a sweep in the order of their numbers, 2 before 10."""
    runs = [file.parent for file in path.glob(f"*/{RUN_FILE}")]
    runs += [file.parent for file in path.glob(f"*/*/{RUN_FILE}")]

    def order(run: Path) -> list[tuple[int, str]]:
        return [(int(p) if p.isdigit() else -1, p) for p in run.relative_to(path).parts]

    return sorted(runs, key=order)


def read_run(path: Path) -> RunRecord:
    """Reads the manifests of a run.

    A stage without one is incomplete, and so is one that was requested anew since it ran: its
    figures would be those of other settings than the rest. One that was only planned, and is no
    longer, is none of its stages.
    """
    planned = planned_stages(path)
    recipe = str(OmegaConf.select(OmegaConf.load(path / RUN_FILE), "recipe"))
    stages: dict[str, Manifest] = {}
    incomplete = []
    for file in sorted(path.glob(f"*/{REQUEST}")):
        manifest = read_manifest(file.parent)
        of_run = planned is None or file.parent.name in planned or (file.parent / WORK).exists()
        if manifest is None and not of_run:
            continue
        if manifest is None or asked(file.parent) not in (None, manifest.fingerprint):
            incomplete.append(file.parent.name)
        else:
            stages[file.parent.name] = manifest
    return RunRecord(path, recipe, stages, tuple(incomplete), _losses(path, stages))


def _losses(path: Path, stages: Mapping[str, Manifest]) -> tuple[float, ...]:
    for name, manifest in stages.items():
        file = path / name / ARTIFACT / "results.json"
        if manifest.kind == "eval_results" and file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            return tuple(found.get("window_losses", {}).get("distilled", ()))
    return ()


def common_text(runs: Sequence[RunRecord]) -> Text | None:
    """The text that most runs were measured on; of equals, the first run's."""
    texts = Counter(run.text() for run in runs if run.evaluation is not None)
    return texts.most_common(1)[0][0] if texts else None


def paired_difference(
    ours: Sequence[float], reference: Sequence[float]
) -> tuple[float, float] | None:
    """Mean difference of two runs' losses over the same windows, and its standard error."""
    if len(ours) != len(reference) or len(ours) < 2:
        return None
    gaps = [a - b for a, b in zip(ours, reference, strict=True)]
    return mean(gaps), standard_error(gaps)


def differing_settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[object]]]:
    """Settings that are not the same in all runs, with each run's value; ``None`` without one."""
    values = [dict(_settings(run)) for run in runs]
    names = sorted({name for one in values for name in one})
    rows = [(name, [one.get(name) for one in values]) for name in names]
    return [(name, row) for name, row in rows if any(value != row[0] for value in row)]


def _settings(run: RunRecord) -> Iterator[tuple[str, object]]:
    yield "recipe", run.recipe
    for name, manifest in run.stages.items():
        for key, value in manifest.config.items():
            if key not in IGNORED:
                yield f"{name}.{key}", value
