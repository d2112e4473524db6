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


def upstream(inputs: Inputs) -> dict[str, Manifest]:
    """Returns all stages that the inputs depend on, without the inputs themselves.

    A stage must have the fingerprint that a later stage recorded, so results of older settings in
    the same directory are left out. If several stages have one name, all but one get their
    fingerprint in addition.
    """
    runs = _run_directories(item.directory.parent for item in inputs.values())
    folders = [path for run in runs for path in sorted(run.iterdir()) if path.is_dir()]
    complete = ((path.name, read_manifest(path)) for path in folders)
    by_fingerprint = {m.fingerprint: (name, m) for name, m in complete if m is not None}
    visited = {item.manifest.fingerprint for item in inputs.values()}
    used_names = {item.directory.name for item in inputs.values()}
    # Fingerprints of stages that are still to be visited.
    queue = [f for item in inputs.values() for f in item.manifest.inputs.values()]
    stages: dict[str, Manifest] = {}
    while queue:
        fingerprint = queue.pop()
        if fingerprint not in visited and fingerprint in by_fingerprint:
            name, manifest = by_fingerprint[fingerprint]
            is_used = name in used_names or name in stages
            stages[f"{name} {fingerprint[:8]}" if is_used else name] = manifest
            queue += manifest.inputs.values()
        visited.add(fingerprint)
    return stages


def _run_directories(runs: Iterable[Path]) -> list[Path]:
    """Returns runs and all other runs that their stages have inputs from, directly or indirectly.

    A run that was deleted is left out.
    """
    queue, visited = list(runs), dict[Path, None]()
    while queue:
        run = queue.pop().resolve()
        if run in visited or not run.is_dir():
            continue
        visited[run] = None
        for file in sorted(run.glob(f"*/{REQUEST}")):
            inputs = read_request(file.parent).inputs.values()
            queue += [reference.directory.parent for reference in inputs]
    return list(visited)


def inputs_from_other_runs(stages: Mapping[str, StageConfig]) -> dict[str, Input]:
    """Returns the complete inputs that a run's stages take from other runs, by directory."""
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
