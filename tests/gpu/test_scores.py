"""Importance and the ranking of shapes are on the GPU what they are on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from recipes.core.manifest import ARTIFACT
from recipes.pruning.results import ScoreResult
from recipes.search.results import CANDIDATES_FILE
from tests.gpu.small import Small, record, without_gpu
from tests.support.runs import manifest_of, without

SEARCH = (
    "only=[import_hf,prepare_data,enumerate_shapes,score,rank_candidates]",
    "stages.rank_candidates.precision=32",
)


def test_a_gpu_ranks_as_a_cpu(small: Small, results: Path) -> None:
    runs = small.folder / "search-cpu", small.folder / "search-gpu"
    shutil.rmtree(runs[1], ignore_errors=True)
    with without_gpu():
        small.start(runs[0], *SEARCH, recipe="llama_search")
    without(runs[0], runs[1], "score", "rank_candidates")
    small.start(runs[1], *SEARCH, recipe="llama_search")
    one, two = (manifest_of(run, "score").result(ScoreResult) for run in runs)
    assert two.teacher_loss == pytest.approx(one.teacher_loss, rel=1e-3)
    for method, layers in one.layer_importance.items():
        assert two.layer_importance[method] == pytest.approx(layers, rel=2e-2, abs=1e-4), method
    ranked = [
        {c["name"]: c["kl_to_teacher"] for c in json.loads(file.read_text())}
        for file in (run / "rank_candidates" / ARTIFACT / CANDIDATES_FILE for run in runs)
    ]
    assert ranked[1] == pytest.approx(ranked[0], rel=2e-2)
    record(results, "scores", cpu=ranked[0], gpu=ranked[1])
