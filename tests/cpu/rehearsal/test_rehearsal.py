"""Shipped recipes rehearsed at their own shapes and layouts, large ones cut short; defects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np
import pytest

from launch.rehearse import KINDS, by_kind, planned, too_large
from recipes.core.files import REPO_ROOT
from recipes.planning.chain import Chain
from recipes.rehearsal.job import RankJob, Rehearsed
from recipes.rehearsal.peers import unmatched
from tests.cpu.rehearsal import planted
from tests.support.rehearsals import MIXTURE, cut_down

D = "stages.distill."
PIPELINE = (
    f"{D}pipeline_model_parallel_size=3",
    f"{D}tensor_model_parallel_size=4",
    f"{D}sequence_parallel=true",
)
RECOMPUTED = (f"{D}recompute_granularity=full", f"{D}micro_batch_size=4")
SPLIT = (f"{D}context_parallel_size=2", f"{D}fp8=hybrid", f"{D}fp8_teacher=true")
GRAPHS = (f"{D}cuda_graphs=true",)
OVERLAP = ("teacher=cached", f"{D}tp_comm_overlap=true")
COPIES = (f"{D}num_distributed_optimizer_instances=96",)
AGAIN = (f"{D}recompute_granularity=selective", f"{D}recompute_modules=[mlp]")
EXPERTS = (f"model.hf_path={MIXTURE}", f"{D}expert_model_parallel_size=8")
PASSING = ("activations", "logits")
"""What lives for a moment, of which the plan leaves some out."""
FLOAT32, MIXED = (f"{D}precision='32'",), (f"{D}precision=bf16-mixed",)
"""A CPU's recipes train in what the processor multiplies in."""
SHARE = ("hardware.memory_bytes=22e9",)
"""Of 80 GB, for 8 of 32 layers."""


class Case(NamedTuple):
    """One stage of a recipe at one rank, perhaps with a defect."""

    recipe: str
    stage: str = "distill"
    rank: int = 0
    overrides: tuple[str, ...] = ()
    layers: int = 2
    resumed: bool = False
    defect: str | None = None


SMALL, WHOLE = "llama_depth_prune", 30
SOUND = (
    Case(SMALL, "import_hf", layers=WHOLE),
    Case(SMALL, "score", layers=WHOLE),
    Case(SMALL, "evaluate", layers=WHOLE),
    Case(SMALL, "export_hf", layers=WHOLE),
    Case(SMALL, "distill", 0, FLOAT32, WHOLE),
    Case(SMALL, "distill", 0, FLOAT32, resumed=True),
    Case(SMALL, "correct_teacher", 0, ("teacher=corrected",)),
    Case(SMALL, "cache_logits", 0, ("teacher=cached",)),
    Case(SMALL, "distill", 0, ("teacher=cached",)),
    Case("llama_width_prune", "distill", 0, MIXED, WHOLE),
    Case("llama_search", "rank_candidates"),
    Case("llama_search", "successive_halving"),
    Case("shrink", "rank_candidates"),
    Case("qwen3_8b_search", "successive_halving", 7),
    Case("qwen3_8b_depth", "distill", 767, COPIES),
    *(Case("qwen3_8b_depth", "distill", rank, PIPELINE, 6) for rank in (0, 256, 512)),
    Case("qwen3_8b_depth", "distill", 0, RECOMPUTED, 6),
    Case("qwen3_8b_depth", "distill", 1, SPLIT),
    Case("qwen3_8b_depth", "distill", 4, GRAPHS),
    Case("qwen3_8b_depth", "distill", 4, OVERLAP),
    Case("qwen3_8b_depth", "distill", 2, EXPERTS),
    Case("qwen3_8b_depth", "score", 0, EXPERTS[:1]),
    Case("qwen3_8b_depth_2.5b", resumed=True),
    Case("qwen3_8b_depth_2.5b", "distill", 0, AGAIN, 8),
    Case("qwen3_8b_nas", "distill", 5),
    Case("qwen3_8b_nas_2.5b"),
    Case("llama3_1_8b_depth", "distill", 255),
    Case("llama3_1_8b_depth_2.5b"),
    Case("llama3_1_8b_width", "distill", 1),
    Case("llama3_1_8b_width", "score", 0),
    Case("llama3_1_8b_width_2.5b"),
    Case("mistral_nemo_12b_width", "distill", 255),
    Case("mistral_nemo_12b_width_2.5b"),
    Case("llama3_1_8b_width", "evaluate", 0, SHARE, 8),
)
QWEN = ("qwen3_8b_depth", "distill", 0)
BROKEN = (
    (Case(*QWEN, defect="mix_devices"), "at least two devices, fakecuda:0 and cpu"),
    (Case(*QWEN, defect="count_steps_on_cpu"), "expected all tensors on one device"),
    (Case(*QWEN, PIPELINE[1:], defect="gather_too_much"), "MessageError: allgather_: ["),
    (Case(*QWEN, defect="match_names"), "_teacher_model.embedding.word_embeddings.weight has 0"),
    (
        Case(*QWEN, PIPELINE, 6, defect="send_half"),
        "invalid gradient at index 0 - got [1024, 2, 8192]",
    ),
    (Case(SMALL, "score", defect="leave_on_cpu"), "at least two devices"),
    (Case("llama_search", "rank_candidates", defect="index_on_cpu"), "at least two devices"),
    (
        Case(SMALL, "score", defect="widen"),
        "CheckpointError: module.decoder.layers.mlp.linear_fc1.weight is (2, 3072, 576) in the "
        "checkpoint, not (2, 3104, 576)",
    ),
    (
        Case(SMALL, "score", defect="ask_for_more"),
        "q_layernorm.weight is not in a checkpoint of this model",
    ),
    (
        Case(SMALL, "import_hf", defect="lose_a_row"),
        "CheckpointError: module.embedding.word_embeddings.weight at () is made (49151, 576), not "
        "(49152, 576)",
    ),
    (
        Case(*QWEN, (f"{D}tensor_model_parallel_size=3",)),
        "must be a multiple of tensor_model_parallel_size (3)",
    ),
)
BROKEN_IDS = [case.defect or "cannot_be_split" for case, _ in BROKEN]
WIDE = Case(*QWEN, PIPELINE, 6, defect="send_wide")
HELD = Case("llama3_1_8b_width", "evaluate", 0, SHARE, 8, defect="hold_all")


def prepared(case: Case) -> tuple[Chain, RankJob]:
    """A case's chain and job."""
    chain, job = cut_down(case.recipe, case.stage, case.rank, case.overrides, case.layers)
    return chain, replace(job, resumed=case.resumed)


Results = dict[Case, tuple[RankJob, Rehearsed]]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All cases in one process, which imports the stack once."""
    cases = [*SOUND, *(case for case, _ in BROKEN), WIDE, HELD]
    jobs = [prepared(case)[1] for case in cases]
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
    assert sum(one.peak.values()) > 0


@pytest.mark.parametrize(("case", "words"), BROKEN, ids=BROKEN_IDS)
def test_a_defect_is_found(case: Case, words: str, rehearsed: Results) -> None:
    _, one = rehearsed[case]
    assert one.error is not None
    assert words in one.error


@pytest.mark.parametrize("case", SOUND, ids=lambda case: f"{case.recipe}-{case.stage}-{case.rank}")
def test_memory_is_as_planned(case: Case, rehearsed: Results) -> None:
    chain, job = prepared(case)
    plan = planned(job, chain)
    assert plan is not None
    peak = by_kind(rehearsed[case][1], plan)
    total = sum(getattr(plan, kind) for kind in KINDS)
    for kind in KINDS:
        near = {"abs": 0.1 * total} if kind in PASSING else {"rel": 0.01}
        assert peak[kind] == pytest.approx(getattr(plan, kind), **near), kind
    assert sum(peak.values()) == pytest.approx(total, rel=0.1)


def test_a_part_that_is_computed_again_is_not_held(rehearsed: Results) -> None:
    [case] = [case for case in SOUND if case.overrides == AGAIN]
    chain, job = prepared(case)
    plan = planned(job, chain)
    assert plan is not None
    held = rehearsed[case][1].peak["activations"]  # 1.8 times as much with all of its parts
    assert held == pytest.approx(plan.activations, rel=0.1)


def test_a_training_that_is_taken_up_again_holds_nothing_of_its_checkpoint(
    rehearsed: Results,
) -> None:
    again = Case("qwen3_8b_depth_2.5b", resumed=True)
    plan = planned(prepared(again)[1], prepared(again)[0])
    assert plan is not None
    assert rehearsed[again][1].peak["activations"] == pytest.approx(plan.activations, rel=0.1)


def test_models_that_are_held_together_have_no_room(rehearsed: Results) -> None:
    for case, few in ((SOUND[-1], 0), (HELD, 1)):
        job, one = rehearsed[case]
        assert one.error is None
        assert len(list(too_large([(job, one)], prepared(case)[0]))) == few


def test_every_recipe_is_rehearsed() -> None:
    recipes = {file.stem for file in (REPO_ROOT / "conf" / "recipe").glob("*.yaml")}
    assert {case.recipe for case in SOUND} == recipes


def pipeline(rehearsed: Results) -> list[tuple[RankJob, Rehearsed]]:
    """The first rank of each of three pipeline stages."""
    return [rehearsed[case] for case in SOUND if case.overrides == PIPELINE]


def test_pipeline_stages_send_what_the_next_expects(rehearsed: Results) -> None:
    found = pipeline(rehearsed)
    for (_, one), ways in zip(found, ({1}, {1, -1}, {-1}), strict=True):
        assert {np.sign(m.destination - m.source) for m in one.sent} == ways
    widths = {message.shape[-1] for message in found[0][1].sent}
    assert widths == {4096, 2 * 4096}  # validation has no teacher
    assert list(unmatched(found)) == []
    assert list(unmatched([found[0], found[2]])) == []


def test_a_message_of_another_shape_is_found(rehearsed: Results) -> None:
    (job, first), middle, _ = pipeline(rehearsed)
    half = [replace(message, shape=[*message.shape[:-1], 4096]) for message in first.sent]
    assert list(unmatched([(job, replace(first, sent=half)), middle])) == [
        f"distill: rank 0 sends {len(half)} of [1024, 2, 4096] bfloat16, but rank 256 expects "
        f"{len(half)} of [1024, 2, 4096] bfloat16 and [1024, 2, 8192] bfloat16"
    ]


def test_a_message_of_another_type_is_found(rehearsed: Results) -> None:
    job, one = rehearsed[WIDE]
    assert one.error is None
    [words] = unmatched([(job, one), pipeline(rehearsed)[1]])
    assert "[1024, 2, 8192] float32, but rank 256 expects" in words
