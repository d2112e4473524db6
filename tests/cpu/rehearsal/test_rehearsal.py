"""Shipped recipes rehearsed at their own widths and layouts, with few layers; planted defects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import NamedTuple

import pytest

from launch.rehearse import KINDS, planned
from recipes.core.files import REPO_ROOT
from recipes.rehearsal.job import Job, Rehearsed
from recipes.rehearsal.peers import unmatched
from tests.cpu.rehearsal import planted
from tests.support.rehearsals import cut_down

PIPELINE = (
    "stages.distill.pipeline_model_parallel_size=2",
    "stages.distill.tensor_model_parallel_size=4",
    "stages.distill.sequence_parallel=true",
)


class Case(NamedTuple):
    """One stage of a recipe at one rank, perhaps with a defect."""

    recipe: str
    stage: str
    rank: int
    overrides: tuple[str, ...] = ()
    defect: str | None = None


SOUND = (
    Case("llama_depth_prune", "distill", 0),
    Case("llama_depth_prune", "score", 0),
    Case("llama_depth_prune", "evaluate", 0),
    Case("llama_depth_prune", "cache_logits", 0, ("teacher=cached",)),
    Case("llama_search", "rank_candidates", 0),
    Case("qwen3_8b_depth", "distill", 767),
    Case("qwen3_8b_depth", "distill", 0, PIPELINE),
    Case("qwen3_8b_depth", "distill", 384, PIPELINE),
    Case("llama3_1_8b_width", "distill", 1),
    Case("mistral_nemo_12b_width", "distill", 255),
)
QWEN = ("qwen3_8b_depth", "distill", 0)
BROKEN = (
    (Case(*QWEN, defect="mix_devices"), "at least two devices, fakecuda:0 and cpu"),
    (Case(*QWEN, PIPELINE[1:], "gather_too_much"), "MessageError: allgather_: ["),
    (Case(*QWEN, defect="match_names"), "_teacher_model.embedding.word_embeddings.weight has 0"),
    (Case(*QWEN, PIPELINE, "send_half"), "invalid gradient at index 0 - got [1024, 2, 8192]"),
    (Case("llama_depth_prune", "score", 0, defect="leave_on_cpu"), "at least two devices"),
    (Case("llama_search", "rank_candidates", 0, defect="index_on_cpu"), "at least two devices"),
)


Results = dict[Case, tuple[Job, Rehearsed]]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All cases in one process, which imports the stack once."""
    cases = [*SOUND, *(case for case, _ in BROKEN)]
    jobs = [cut_down(*case[:4])[1] for case in cases]
    file = tmp_path_factory.mktemp("rehearsal") / "jobs.json"
    pairs = [[asdict(job), case.defect] for job, case in zip(jobs, cases, strict=True)]
    file.write_text(json.dumps(pairs))
    command = [sys.executable, planted.__file__, str(file)]
    env = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [Rehearsed.of(json.loads(line)) for line in done.stdout.splitlines()]
    return dict(zip(cases, zip(jobs, found, strict=True), strict=True))


@pytest.mark.parametrize("case", SOUND, ids=lambda case: f"{case.recipe}-{case.stage}-{case.rank}")
def test_a_sound_stage_runs_to_its_end(case: Case, rehearsed: Results) -> None:
    _, one = rehearsed[case]
    assert one.error is None, one.error
    assert one.peak["weights"] > 0


@pytest.mark.parametrize(("case", "words"), BROKEN, ids=[case.defect for case, _ in BROKEN])
def test_a_defect_is_found(case: Case, words: str, rehearsed: Results) -> None:
    _, one = rehearsed[case]
    assert one.error is not None
    assert words in one.error


@pytest.mark.parametrize(
    "case",
    [case for case in SOUND if case.stage == "distill"],
    ids=lambda case: f"{case.recipe}-{case.rank}",
)
def test_memory_is_as_planned(case: Case, rehearsed: Results) -> None:
    chain, job = cut_down(*case[:4])
    plan = planned(job, chain)
    assert plan is not None
    peak = rehearsed[case][1].peak
    for kind in ("weights", "gradients", "optimizer", "teacher"):
        assert peak[kind] == pytest.approx(getattr(plan, kind), rel=0.01), kind
    total = sum(getattr(plan, kind) for kind in KINDS)
    assert sum(peak.values()) == pytest.approx(total, rel=0.1)


def test_pipeline_stages_send_what_the_next_expects(rehearsed: Results) -> None:
    pair = [rehearsed[case] for case in SOUND if case.overrides == PIPELINE]
    messages = pair[0][1].sent
    widths = {message.shape[-1] for message in messages}
    assert widths == {4096, 2 * 4096}  # validation has no teacher
    assert list(unmatched(pair)) == []


def test_a_message_of_another_shape_is_found(rehearsed: Results) -> None:
    (job, first), last = [rehearsed[case] for case in SOUND if case.overrides == PIPELINE]
    half = [replace(message, shape=[*message.shape[:-1], 4096]) for message in first.sent]
    assert list(unmatched([(job, replace(first, sent=half)), last])) == [
        f"distill: rank 0 sends {len(half)} of [1024, 2, 4096] bfloat16, but rank 384 expects "
        f"{len(half)} of [1024, 2, 4096] bfloat16 and [1024, 2, 8192] bfloat16"
    ]
