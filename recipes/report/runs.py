"""Reads the manifests of runs for a comparison. Does not import torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean

from recipes.core.errors import RecipeError
from recipes.core.files import read_json
from recipes.core.manifest import ARTIFACT, Manifest, read_manifest
from recipes.core.run_state import RUN_FILE, Status, read_last_plan, read_request, stage_states
from recipes.core.statistics import standard_error
from recipes.evaluation.results import EvaluationResult

UNCOMPARED_SETTINGS = ("stage", "inputs", "resources", "title", "description", "recipe")
"""Settings that only name a stage or say where it runs. Comparisons of runs leave them out."""

TextKey = tuple[str, object, int, int | None, str]
"""Hash of the held-out text, sequence length, sequence count, prediction count, and precision of an
evaluation, in this order."""


@dataclass(frozen=True)
class RunRecord:
    """A run directory, with the manifests of its complete stages by name."""

    path: Path
    recipe: str
    stages: Mapping[str, Manifest]
    incomplete: tuple[str, ...] = ()
    """Planned stages that are not complete."""
    losses: tuple[float, ...] = field(default=(), repr=False)
    """The distilled model's loss on each held-out sequence, in nats; empty if not measured."""
    input_datasets: tuple[Manifest, ...] = field(default=(), repr=False)
    """Manifests of data sets of other runs that the evaluations read."""

    def find(self, kind: str) -> Manifest | None:
        """Returns the manifest of the first stage with this ``Manifest.kind``, if there is one."""
        return next((m for m in self.stages.values() if m.kind == kind), None)

    @property
    def exported(self) -> Manifest | None:
        """Manifest of the student's export; ``None`` if there is none."""
        exports = (m for m in self.stages.values() if m.stage == "export_hf")
        # The export of a teacher does not have the input ``evaluation``.
        return next((m for m in exports if "evaluation" in m.inputs), None)

    @cached_property
    def evaluation(self) -> EvaluationResult | None:
        """Quality on held-out text; ``None`` if it was not measured."""
        manifest = self.find("eval_results")
        return manifest.result(EvaluationResult) if manifest else None

    def text_key(self) -> TextKey | None:
        """Identifies the evaluated text; ``None`` without an evaluation.

        Perplexities can be compared if their keys are equal.
        """
        evaluation = self.find("eval_results")
        if evaluation is None or self.evaluation is None:
            return None
        data_hash = evaluation.input_content.get("data", "")  # of all files of the data set
        datasets = (m for m in self.stages.values() if m.kind == "dataset")
        evaluated = (m for m in (*datasets, *self.input_datasets) if m.content_hash() == data_hash)
        files = next((dataset.files for dataset in evaluated), {})
        # The key has only hashes of the held-out files, so that runs with different training text
        # can be compared. If the data set is missing, for example because it was computed again,
        # the key has ``data_hash`` instead.
        heldout = [files[name].sha256 for name in ("heldout.bin", "heldout.idx") if name in files]
        return (
            " ".join(heldout) or data_hash,
            evaluation.config.get("seq_length"),
            self.evaluation.sequences,
            self.evaluation.predictions,
            self.evaluation.precision,
        )


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Returns the run directories among and below the paths, in order, without duplicates.

    Raises ``RecipeError`` if a path is not a directory, or contains no run.
    """
    run_dirs: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise RecipeError(
                f"{path} is not a directory", "name directories of runs or of a sweep"
            )
        runs = [path] if (path / RUN_FILE).is_file() else runs_below(path)
        if not runs:
            raise RecipeError(
                f"{path} is not a run and contains none: {RUN_FILE} is missing",
                "name directories such as runs/llama_depth_prune or runs/sweeps/TIME",
            )
        run_dirs.update(dict.fromkeys(run.resolve() for run in runs))
    return list(run_dirs)


def runs_below(path: Path) -> list[Path]:
    """Returns the runs below a folder, also those of sweeps, in numeric order: 2 before 10."""
    patterns = ("*", "*/*", "*/*/*")  # runs/sweeps/TIME/NUMBER is three levels below runs
    runs = [file.parent for pattern in patterns for file in path.glob(f"{pattern}/{RUN_FILE}")]

    def sort_key(run: Path) -> list[tuple[int, str]]:
        names = run.relative_to(path).parts
        return [(int(name) if name.isdigit() else -1, name) for name in names]  # -1: before numbers

    return sorted(runs, key=sort_key)


def read_run(path: Path) -> RunRecord:
    """Reads the results of a run.

    A stage counts as incomplete if its settings were changed after it ran, because its result does
    not belong to the last plan. Raises ``RecipeError`` if a manifest is damaged.
    """
    plan = read_last_plan(path)
    states = stage_states(path)
    stages = {
        name: state.result
        for name, state in states.items()
        if state.result is not None and state.status is Status.COMPLETE
    }
    incomplete = tuple(name for name in states if name not in stages)
    evaluation_dirs = [path / name for name, m in stages.items() if m.kind == "eval_results"]
    files = (folder / ARTIFACT / "results.json" for folder in evaluation_dirs)
    results = next((read_json(file) for file in files if file.is_file()), {})
    losses = tuple(map(float, results.get("sequence_losses", {}).get("distilled", ())))
    data_inputs = (read_request(folder).inputs.get("data") for folder in evaluation_dirs)
    data_folders = (data.directory for data in data_inputs if data is not None)
    manifests = (read_manifest(folder) for folder in data_folders if folder.parent != path)
    input_datasets = tuple(manifest for manifest in manifests if manifest is not None)
    return RunRecord(path, plan.recipe if plan else "", stages, incomplete, losses, input_datasets)


def common_text(runs: Sequence[RunRecord]) -> TextKey | None:
    """Returns the key of the text that most runs were evaluated on, the first of equal frequency.

    Returns ``None`` if no run was evaluated.
    """
    texts = Counter(run.text_key() for run in runs if run.evaluation is not None)
    return texts.most_common(1)[0][0] if texts else None


def paired_difference(
    losses: Sequence[float], reference: Sequence[float]
) -> tuple[float, float] | None:
    """Returns the mean and the standard error of ``losses`` minus ``reference``.

    Both are losses on the same sequences. Returns ``None`` if their lengths differ or are below 2.
    """
    if len(losses) != len(reference):
        return None
    differences = [a - b for a, b in zip(losses, reference, strict=True)]
    error = standard_error(differences)
    return None if error is None else (fmean(differences), error)


def differing_settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[object]]]:
    """Returns the names of settings that differ between runs, each with its value in every run.

    The value is ``None`` for a run without the setting.
    """
    settings = [dict(_settings(run)) for run in runs]
    names = sorted({name for run_settings in settings for name in run_settings})
    rows = [(name, [run_settings.get(name) for run_settings in settings]) for name in names]
    return [(name, values) for name, values in rows if any(v != values[0] for v in values)]


def _settings(run: RunRecord) -> Iterator[tuple[str, object]]:
    """Yields the recipe's name, and each setting as ``STAGE.SETTING`` with its value."""
    yield "recipe", run.recipe
    for name, manifest in run.stages.items():
        for key, value in manifest.config.items():
            if key not in UNCOMPARED_SETTINGS:
                yield f"{name}.{key}", value
