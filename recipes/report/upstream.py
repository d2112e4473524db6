"""Finds the stages that a result depends on, also in other runs, and their licences.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from nemo_convert.results import ImportResult
from recipes.core.manifest import Manifest, manifest_of, read_manifest
from recipes.core.run_state import REQUEST, read_request
from recipes.core.stage import Input, Inputs, StageConfig
from recipes.data.results import DatasetResult
from recipes.distillation.results import DistillationResult


def upstream(inputs: Inputs) -> dict[str, Manifest]:
    """Returns the manifests of all stages that the inputs depend on, without the inputs themselves.

    Each stage recorded the fingerprints of its inputs. If an input was computed again with other
    settings, its new result has another fingerprint, and is left out. The keys are stage names,
    with the start of the fingerprint if an input or another stage has the same name.
    """
    runs = _run_directories(item.directory.parent for item in inputs.values())
    folders = [path for run in runs for path in sorted(run.iterdir()) if path.is_dir()]
    manifests = ((path.name, read_manifest(path)) for path in folders)  # ``None``: not complete
    by_fingerprint = {m.fingerprint: (name, m) for name, m in manifests if m is not None}
    input_names = {item.directory.name for item in inputs.values()}
    visited = {item.manifest.fingerprint for item in inputs.values()}
    # Fingerprints of stages that the inputs take inputs from.
    queue = [f for item in inputs.values() for f in item.manifest.inputs.values()]
    stages: dict[str, Manifest] = {}
    while queue:
        fingerprint = queue.pop()
        if fingerprint not in visited and fingerprint in by_fingerprint:
            name, manifest = by_fingerprint[fingerprint]
            is_taken = name in input_names or name in stages
            stages[f"{name} {fingerprint[:8]}" if is_taken else name] = manifest
            queue += manifest.inputs.values()
        visited.add(fingerprint)
    return stages


def _run_directories(runs: Iterable[Path]) -> list[Path]:
    """Returns the runs, and all runs from which they take inputs, directly or indirectly."""
    queue, visited = list(runs), list[Path]()
    while queue:
        run = queue.pop().resolve()
        if run in visited or not run.is_dir():  # a deleted run is left out
            continue
        visited.append(run)
        for file in sorted(run.glob(f"*/{REQUEST}")):
            inputs = read_request(file.parent).inputs.values()
            queue += [reference.directory.parent for reference in inputs]
    return visited


def phases_of(model: Manifest, earlier: Iterable[Manifest]) -> list[Manifest]:
    """Returns the distillations that made a model one after the other, from first to last.

    The list is empty if no distillation made the model. ``earlier`` are all stages upstream of the
    model.
    """
    by_fingerprint = {manifest.fingerprint: manifest for manifest in earlier}
    phases: list[Manifest] = []
    manifest: Manifest | None = model
    while manifest and manifest.result_if("distill", DistillationResult):
        phases.insert(0, manifest)
        manifest = by_fingerprint.get(manifest.inputs.get("student", ""))
    return phases


def inputs_from_other_runs(stages: Mapping[str, StageConfig]) -> dict[str, Input]:
    """Returns the complete inputs that a run's stages take from other runs.

    The keys are the inputs' directories, as in the settings. ``stages`` are all stages of the run.
    """
    # A source is a stage of this run or the directory of another run's stage.
    sources = {source for config in stages.values() for source in config.inputs.values()}
    manifests = {source: manifest_of(source) for source in sorted(sources - stages.keys())}
    return {source: Input(Path(source).resolve(), m) for source, m in manifests.items() if m}


def recorded_licences(inputs: Inputs) -> set[str]:
    """Returns the licences of all texts and models that the inputs are or depend on."""
    licences = set()
    for manifest in (*(item.manifest for item in inputs.values()), *upstream(inputs).values()):
        if dataset := manifest.result_if("prepare_data", DatasetResult):
            licences |= set(map(dataset.licence, dataset.sources))
        if imported := manifest.result_if("import_hf", ImportResult):
            licences.add(imported.licence)
    return licences
