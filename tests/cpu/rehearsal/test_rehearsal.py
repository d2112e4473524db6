"""Recipes run on fake tensors, in their shapes and layouts, but with few layers.

Such a rehearsal must report defects of the code, and must need the memory that was planned.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import pytest
from pydantic import TypeAdapter

from launch.rehearse import (
    KINDS,
    communication_mistakes,
    memory_mistakes,
    peak_by_kind,
    planned_memory,
)
from nemo_convert.hub import read_hf_config
from recipes.core.files import REPO_ROOT
from recipes.planning.chain import Chain
from recipes.planning.training_cost import STATE_BYTES
from recipes.rehearsal import materials
from recipes.rehearsal.agreement import distinct_ranks
from recipes.rehearsal.job import RankJob, RehearsalResult
from tests.cpu.rehearsal import defects
from tests.support.rehearsals import MOE_MODEL, job_with_layers

pytestmark = pytest.mark.timeout(1800)  # one fixture rehearses all cases
D = "stages.distill."
PIPELINE = (
    f"{D}pipeline_model_parallel_size=3",
    f"{D}tensor_model_parallel_size=4",
    f"{D}sequence_parallel=true",
)
RECOMPUTE_ALL = (f"{D}recompute_granularity=full", f"{D}micro_batch_size=4")
CONTEXT = (f"{D}context_parallel_size=2", f"{D}fp8=hybrid")
LONG = ("long_context=32k",)
LONG_RECIPES = ("llama3_1_8b_width", "mistral_nemo_12b_width", "qwen3_8b_depth")
INSTANCES = (f"{D}num_distributed_optimizer_instances=96",)  # one per node
RECOMPUTE_MLP = (f"{D}recompute_granularity=selective", f"{D}recompute_modules=[mlp]")
MOE = (f"model.hf_path={MOE_MODEL}", f"{D}expert_model_parallel_size=8")
FLOAT32, MIXED = (f"{D}precision='32'",), (f"{D}precision=bf16-mixed",)
"""Set explicitly, because the default of CPU recipes depends on this machine's processor."""
LESS_MEMORY = ("hardware.memory_bytes=22e9",)
"""22 GB instead of 80 GB, because the model has only 8 of 32 layers."""
TEMPORARY = ("activations", "logits")
"""Labels of memory for which a plan has only an estimate."""


class Case(NamedTuple):
    """One rank of a stage of a recipe."""

    recipe: str
    stage: str = "distill"
    rank: int = 0
    overrides: tuple[str, ...] = ()
    layers: int = 2
    resumed: bool = False
    defect: str | None = None

    @property
    def job(self) -> tuple[Chain, RankJob]:
        """The recipe's chain and the job of this rank."""
        return job_with_layers(self.recipe, self.stage, self.rank, self.overrides, self.layers)


SMALL, ALL_LAYERS = "llama_depth_prune", 30
RESUMED = Case("qwen3_8b_depth_2.5b", resumed=True)
RECOMPUTED = Case("qwen3_8b_depth_2.5b", "distill", 0, RECOMPUTE_MLP, 8)
# The first rank of each pipeline stage.
PIPELINE_RANKS = [Case("qwen3_8b_depth", "distill", rank, PIPELINE, 6) for rank in (0, 256, 512)]
SEARCH = Case("qwen3_8b_search", "successive_halving", 0, ("hardware.memory_bytes=28e9",))
EVALUATE = Case("llama3_1_8b_width", "evaluate", 0, LESS_MEMORY, 8)
SOUND = (
    Case(SMALL, "import_hf", layers=ALL_LAYERS),
    Case(SMALL, "score", layers=ALL_LAYERS),
    Case(SMALL, "evaluate", layers=ALL_LAYERS),
    Case(SMALL, "export_hf", layers=ALL_LAYERS),
    Case(SMALL, "distill", 0, FLOAT32, ALL_LAYERS),
    Case(SMALL, "distill", 0, FLOAT32, resumed=True),
    Case(SMALL, "correct_teacher", 0, ("teacher=corrected",)),
    Case(SMALL, "cache_logits", 0, ("teacher=cached",)),
    Case(SMALL, "distill", 0, ("teacher=cached",)),
    Case("llama_width_prune", "distill", 0, MIXED, ALL_LAYERS),
    Case("llama_search", "rank_candidates", 0, ("stages.rank_candidates.precision=bf16-mixed",)),
    Case("llama_search", "successive_halving"),
    Case("shrink", "rank_candidates", 0, ("stages.rank_candidates.precision='32'",)),
    SEARCH,
    SEARCH._replace(rank=7),
    Case("qwen3_8b_depth", "distill", 767, INSTANCES),
    *PIPELINE_RANKS,
    Case("qwen3_8b_depth", "distill", 0, RECOMPUTE_ALL, 6),
    Case("qwen3_8b_depth", "distill", 1, CONTEXT),
    Case("qwen3_8b_depth", "distill", 2, MOE),
    Case("qwen3_8b_depth", "score", 0, MOE[:1]),  # without expert parallelism
    RESUMED,
    RECOMPUTED,
    Case("qwen3_8b_nas", "distill", 5),
    Case("qwen3_8b_nas_2.5b"),
    Case("llama3_1_8b_depth", "distill", 255),
    Case("llama3_1_8b_depth_2.5b"),
    Case("llama3_1_8b_width", "distill", 1, ("data=instruct_blend",)),  # sources with weights
    Case("llama3_1_8b_width", "score", 0),
    Case("llama3_1_8b_width_2.5b"),
    Case("mistral_nemo_12b_width", "distill", 255),
    Case("mistral_nemo_12b_width_2.5b"),
    *(Case(recipe, "distill_long", 9, LONG) for recipe in LONG_RECIPES),
    EVALUATE,
)
"""Cases without a defect."""
QWEN = ("qwen3_8b_depth", "distill", 0)
BROKEN = {
    Case(*QWEN, defect="mix_devices"): "at least two devices, fakecuda:0 and cpu",
    Case(*QWEN, PIPELINE[1:], defect="gather_too_much"): "MessageError: allgather_: needs ",
    Case(*QWEN, defect="count_steps_on_cpu"): "expected all tensors on one device",
    Case(*QWEN, defect="match_names"): "_teacher_model.embedding.word_embeddings.weight has 0",
    Case(*QWEN, PIPELINE, 6, defect="send_half"): "invalid gradient at index 0 - got [1024, 2, 8",
    Case(SMALL, "score", defect="leave_on_cpu"): "at least two devices",
    Case("llama_search", "rank_candidates", defect="index_on_cpu"): "at least two devices",
    Case(SMALL, "score", defect="widen"): "linear_fc1.weight is (2, 3072, 576) in the checkpoint, "
    "but must be (2, 3104, 576)",
    Case(SMALL, "score", defect="add_norms"): "q_layernorm.weight is not in a checkpoint",
    Case(SMALL, "import_hf", defect="lose_a_row"): "is (49151, 576) after conversion, "
    "but must be (49152, 576)",
    Case(*QWEN, (f"{D}tensor_model_parallel_size=3",)): "must be a multiple of tensor_model_par",
}
"""Maps each case with a defect to words of the error that must be reported."""
TWO_STAGES = (
    f"{D}pipeline_model_parallel_size=2",
    f"{D}tensor_model_parallel_size=2",
    f"{D}sequence_parallel=true",
)
RANKS = [Case("qwen3_8b_depth", "distill", rank, TWO_STAGES, 4) for rank in (0, 1, 382, 384, 385)]
"""Distinct ranks of the first pipeline stage (382 is in the last replica) and of the last stage."""
LARGE = (
    *("llama3_1_8b_depth", "llama3_1_8b_depth_2.5b", "llama3_1_8b_width", "llama3_1_8b_width_2.5b"),
    *("mistral_nemo_12b_width", "mistral_nemo_12b_width_2.5b", "qwen3_8b_depth"),
    *("qwen3_8b_depth_2.5b", "qwen3_8b_nas", "qwen3_8b_nas_2.5b"),
)


ALL_DISTINCT = ("llama3_1_8b_width", "mistral_nemo_12b_width", "qwen3_8b_depth")
"""Recipes whose distinct ranks are all compared. For every recipe, this would take minutes."""


def ranks_of(recipe: str, stage: str = "distill") -> list[Case]:
    """Returns ranks of a stage that must make the same calls.

    Outside of ``ALL_DISTINCT`` these are the first rank, the last of its tensor group, and the last
    of that data group.
    """
    job = Case(recipe, stage).job[1]
    tensor: int = job.config.get("tensor_model_parallel_size", 1)
    few = (0, tensor - 1, job.world - 1)
    ranks = distinct_ranks(job.world, tensor, 1, 1, 1) if recipe in ALL_DISTINCT else few
    return [Case(recipe, stage, rank) for rank in ranks]


SHIPPED_RANKS = {recipe: ranks_of(recipe) for recipe in LARGE}
OTHER_RANKS = {
    "score": ranks_of("qwen3_8b_depth", "score"),
    "evaluate": ranks_of("qwen3_8b_depth", "evaluate"),
    "search": [SEARCH, SEARCH._replace(rank=7)],
}
"""The first and the last rank of other stages of several ranks."""
DIFFERENCES = {
    (385, "skip_all_reduce"): ("TENSOR_MODEL_PARALLEL_GROUP", "recipes/distillation/losses.py:"),
    (385, "reduce_maximum"): ("TENSOR_MODEL_PARALLEL_GROUP", "recipes/distillation/vocabulary.py:"),
    (382, "small_buckets"): ("DATA_PARALLEL_GROUP", "param_and_grad_buffer.py:"),
    (385, "total_two_columns"): ("TENSOR_MODEL_PARALLEL_GROUP", "recipes/distillation/vocabulary"),
    (0, "wrong_root"): ("PIPELINE_MODEL_PARALLEL_GROUP", "broadcast_object_list from 0"),
    (384, "skip_receive"): ("messages from rank 0 to rank 384", "p2p_communication.py:"),
    (0, "send_wide"): ("messages from rank 0 to rank 384", "] float32, at "),
    (1, "reverse_groups"): ("the process group of all ranks", "new_group of ranks"),
    (1, "add_barrier"): ("the process group of all ranks", "barrier, at tests/cpu/rehearsal"),
    (385, "gather_in_one"): ("TENSOR_MODEL_PARALLEL_GROUP", "allgather_base ["),
    (0, "gather_objects"): ("the process group of all ranks", "all_gather_object, at "),
}
"""Maps (rank with a defect, name of the defect) to (reported channel, words of the report)."""
CASES_WITH_DIFFERENCES = {key: RANKS[0]._replace(rank=key[0], defect=key[1]) for key in DIFFERENCES}
TOO_LARGE = [
    EVALUATE._replace(defect="keep_all"),
    SEARCH._replace(defect="keep_all"),
    SEARCH._replace(defect="keep_cache"),
]
"""Cases that need more memory than the GPU has, because a defect keeps too much. ``EVALUATE`` and
``SEARCH`` set the GPU's memory, which suffices without the defect."""
Results = dict[Case, tuple[RankJob, RehearsalResult]]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Rehearses all cases in one process, which imports the libraries once."""
    cases = list(
        dict.fromkeys(
            [
                *(*SOUND, *BROKEN, *RANKS, *CASES_WITH_DIFFERENCES.values(), *TOO_LARGE),
                *(case for ranks in SHIPPED_RANKS.values() for case in ranks),
                *(case for ranks in OTHER_RANKS.values() for case in ranks),
            ]
        )
    )
    jobs = [replace(case.job[1], resumed=case.resumed) for case in cases]
    file = tmp_path_factory.mktemp("rehearsal") / "jobs.json"
    pairs = [[asdict(job), case.defect] for job, case in zip(jobs, cases, strict=True)]
    file.write_text(json.dumps(pairs))
    command = [sys.executable, defects.__file__, str(file)]
    env = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    parse = TypeAdapter(RehearsalResult).validate_json
    results = [parse(line) for line in done.stdout.splitlines()]
    return dict(zip(cases, zip(jobs, results, strict=True), strict=True))


@pytest.mark.parametrize("case", SOUND, ids=lambda case: f"{case.recipe}-{case.stage}-{case.rank}")
def test_sound_stages_complete_within_the_planned_memory(case: Case, rehearsed: Results) -> None:
    job, result = rehearsed[case]
    assert result.error is None, result.error
    plan = planned_memory(job, case.job[0])
    assert plan is not None
    peak, total = peak_by_kind(result, plan), sum(getattr(plan, kind) for kind in KINDS)
    # Recomputed modules, and the checkpoint that training resumes from, must not stay in memory.
    # The usual tolerance of activations would hide them.
    is_tight = case in (RESUMED, RECOMPUTED)
    for kind in KINDS:
        tolerance = {"abs": 0.1 * total} if kind in TEMPORARY else {"rel": 0.01}
        if is_tight and kind == "activations":
            tolerance = {"rel": 0.1}
        assert peak[kind] == pytest.approx(getattr(plan, kind), **tolerance), kind
    assert sum(peak.values()) == pytest.approx(total, rel=0.1)


def test_host_memory_has_the_state_that_a_save_gathers(rehearsed: Results) -> None:
    """A rank gathers ``STATE_BYTES`` per parameter, whose bfloat16 weight takes 2 bytes."""
    job, result = rehearsed[RESUMED]
    plan = planned_memory(job, RESUMED.job[0])
    assert plan is not None
    gathered = STATE_BYTES * plan.weights / 2
    assert gathered < result.host < 2 * gathered


@pytest.mark.parametrize(
    "case", BROKEN, ids=lambda case: case.defect or "tensor_parallel_size_does_not_divide"
)
def test_defects_are_reported(case: Case, rehearsed: Results) -> None:
    error = rehearsed[case][1].error
    assert error is not None
    assert BROKEN[case] in error


@pytest.mark.parametrize(
    "case", [EVALUATE, SEARCH, *TOO_LARGE], ids=lambda c: f"{c.stage}-{c.defect}"
)
def test_models_that_do_not_fit_together_are_reported(case: Case, rehearsed: Results) -> None:
    """Two cases are a search that keeps a model, or cached memory, while it starts a training."""
    job, result = rehearsed[case]
    assert result.error is None
    chain = case.job[0]
    assert len(list(memory_mistakes([(job, result)], chain))) == (case in TOO_LARGE)
    assert ("parent" in result.peak) == (case in TOO_LARGE and case.stage == SEARCH.stage)


def test_a_config_may_have_a_model_type_instead_of_architectures(tmp_path: Path) -> None:
    job = Case(SMALL, "import_hf").job[1]
    config = {**job.hf_config, "model_type": "llama"}
    del config["architectures"]
    hf_path = materials.settings(replace(job, hf_config=config), tmp_path)["hf_path"]
    assert read_hf_config(hf_path)["model_type"] == "llama"


def test_every_recipe_is_rehearsed() -> None:
    recipes = {file.stem for file in (REPO_ROOT / "conf" / "recipe").glob("*.yaml")}
    assert {case.recipe for case in SOUND} == recipes


@pytest.mark.parametrize("ranks", [RANKS, PIPELINE_RANKS], ids=["two_stages", "three_stages"])
def test_sound_ranks_make_the_same_calls(ranks: list[Case], rehearsed: Results) -> None:
    names = {channel.name for channel in rehearsed[ranks[0]][1].channels}
    assert f"messages from rank 0 to rank {384 if ranks == RANKS else 256}" in names
    assert list(communication_mistakes([rehearsed[case] for case in ranks])) == []


@pytest.mark.parametrize("recipe", LARGE)
def test_ranks_of_shipped_recipes_make_the_same_calls(recipe: str, rehearsed: Results) -> None:
    ranks = SHIPPED_RANKS[recipe]
    groups = [{channel.name for channel in rehearsed[case][1].channels} for case in ranks]
    assert any("TENSOR_MODEL_PARALLEL_GROUP" in name for name in groups[0] & groups[1])
    earlier = set().union(*groups[:-1])
    assert any(name.startswith("DATA_PARALLEL_GROUP_WITH_CP (") for name in earlier & groups[-1])
    assert list(communication_mistakes([rehearsed[case] for case in ranks])) == []


@pytest.mark.parametrize("ranks", OTHER_RANKS.values(), ids=OTHER_RANKS)
def test_ranks_of_other_stages_make_the_same_calls(ranks: list[Case], rehearsed: Results) -> None:
    assert [case.rank for case in ranks] == [0, 7]
    assert list(communication_mistakes([rehearsed[case] for case in ranks])) == []


@pytest.mark.parametrize("key", DIFFERENCES, ids=lambda key: key[1])
def test_different_calls_of_ranks_are_reported(key: tuple[int, str], rehearsed: Results) -> None:
    rank, _ = key
    assert rehearsed[CASES_WITH_DIFFERENCES[key]][1].error is None
    others = [rehearsed[case] for case in RANKS if case.rank != rank]
    mistakes = list(communication_mistakes([*others, rehearsed[CASES_WITH_DIFFERENCES[key]]]))
    channel, words = DIFFERENCES[key]
    reported = [text for text in mistakes if channel in text.splitlines()[0]]
    assert reported, mistakes
    assert any(words in text for text in reported), reported
    assert any(f"\n  rank {rank}: " in text for text in reported), reported
