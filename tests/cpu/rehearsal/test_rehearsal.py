"""Rehearsals of recipes report planted defects, and need the memory that the planner estimates.

A rehearsal runs one rank of a stage on fake tensors, with the shapes and the parallel layout of the
recipe. Here the models have few layers, to save time.
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

pytestmark = pytest.mark.timeout(1800)  # seconds, because one fixture rehearses all cases
# Overrides of recipes
DISTILL = "stages.distill."
PIPELINE = (
    f"{DISTILL}pipeline_model_parallel_size=3",
    f"{DISTILL}tensor_model_parallel_size=4",
    f"{DISTILL}sequence_parallel=true",
)
# A larger micro batch than the recipe's 2
RECOMPUTE_ALL = (f"{DISTILL}recompute_granularity=full", f"{DISTILL}micro_batch_size=4")
FP8 = f"{DISTILL}fp8=hybrid"
CONTEXT = (f"{DISTILL}context_parallel_size=2", FP8)
LONG = ("long_context=32k",)  # adds the stage distill_long
LONG_RECIPES = ("llama3_1_8b_width", "mistral_nemo_12b_width", "qwen3_8b_depth")
INSTANCES = (f"{DISTILL}num_distributed_optimizer_instances=96",)  # one per node
RECOMPUTE_MLP = (f"{DISTILL}recompute_granularity=selective", f"{DISTILL}recompute_modules=[mlp]")
MOE = (f"model.hf_path={MOE_MODEL}", f"{DISTILL}expert_model_parallel_size=8")
FLOAT32, MIXED = (f"{DISTILL}precision='32'",), (f"{DISTILL}precision=bf16-mixed",)
"""Set explicitly, because the default of CPU recipes depends on this machine's processor."""
LESS_MEMORY = ("hardware.memory_bytes=22e9",)
"""22 GB instead of 80 GB, because the rehearsed model has only 8 of 32 layers."""
TEMPORARY = ("activations", "logits")
"""Those of ``KINDS`` that a plan only estimates. The others must match within 1%."""


class Case(NamedTuple):
    """One rank of a stage of a recipe, to be rehearsed."""

    recipe: str
    stage: str = "distill"
    rank: int = 0
    overrides: tuple[str, ...] = ()
    layers: int = 2
    """Number of the teacher's layers; pruning in depth drops half of them."""
    resumed: bool = False
    """Whether the training stops after its first step and is resumed."""
    defect: str | None = None
    """Key of ``defects.DEFECTS``; ``None`` for the unchanged code."""

    @property
    def job(self) -> tuple[Chain, RankJob]:
        """The recipe's chain (the settings of all stages), and the job of this rank."""
        return job_with_layers(self.recipe, self.stage, self.rank, self.overrides, self.layers)


SMALL = "llama_depth_prune"
RESUMED = Case("qwen3_8b_depth_2.5b", resumed=True)
RECOMPUTED = Case("qwen3_8b_depth_2.5b", "distill", 0, RECOMPUTE_MLP, 8)
# The first rank of each of 3 pipeline stages. The recipe has 768 ranks.
PIPELINE_RANKS = [Case("qwen3_8b_depth", "distill", rank, PIPELINE, 6) for rank in (0, 256, 512)]
SEARCH = Case("qwen3_8b_search", "successive_halving", 0, ("hardware.memory_bytes=28e9",))
EVALUATE = Case("llama3_1_8b_width", "evaluate", 0, LESS_MEMORY, 8)
SOUND = (
    Case(SMALL, "import_hf", layers=6),
    Case(SMALL, "score", layers=6),
    Case(SMALL, "evaluate", layers=6),
    Case(SMALL, "export_hf", layers=6),
    Case(SMALL, "distill", 0, FLOAT32, 6),
    Case(SMALL, "distill", 0, FLOAT32, resumed=True),
    Case(SMALL, "correct_teacher", 0, ("teacher=corrected",)),
    Case(SMALL, "cache_logits", 0, ("teacher=cached",)),
    Case(SMALL, "distill", 0, ("teacher=cached",)),
    Case("llama_width_prune", "distill", 0, MIXED, 6),
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
    Case("qwen3_8b_nas", "distill", 3),
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
"""Cases that must succeed: at least one of each recipe."""
QWEN = ("qwen3_8b_depth", "distill", 0)  # recipe, stage and rank of a ``Case``
BROKEN = {
    Case(*QWEN, defect="mix_devices"): "at least two devices, fakecuda:0 and cpu",
    Case(*QWEN, PIPELINE[1:], defect="gather_too_much"): "MessageError: allgather_: needs ",
    Case(*QWEN, defect="match_names"): "_teacher_model.embedding.word_embeddings.weight has 0",
    Case(*QWEN, PIPELINE, 6, defect="send_half"): "invalid gradient at index 0 - got [1024, 2, 8",
    Case(SMALL, "score", defect="widen"): "linear_fc1.weight is (2, 3072, 576) in the checkpoint, "
    "but must be (2, 3104, 576)",
    Case(SMALL, "score", defect="add_norms"): "q_layernorm.weight is not in a checkpoint",
    Case(SMALL, "import_hf", defect="lose_a_row"): "is (49151, 576) after conversion, "
    "but must be (49152, 576)",
    Case(*QWEN, (f"{DISTILL}tensor_model_parallel_size=3",)): "must be a multiple of tensor_model",
}
"""Maps each case that must fail to words of its error. The last has an invalid setting, the others
have a defect."""
TWO_STAGES = (
    f"{DISTILL}pipeline_model_parallel_size=2",
    f"{DISTILL}tensor_model_parallel_size=2",
    f"{DISTILL}sequence_parallel=true",
)
RANKS = [Case("qwen3_8b_depth", "distill", rank, TWO_STAGES, 4) for rank in (0, 1, 382, 384, 385)]
"""Distinct ranks of both pipeline stages, which start at ranks 0 and 384. Ranks 0 and 1, and 384
and 385, are tensor-parallel groups. Rank 382 is the first of the first stage's last replica."""
LARGE = (
    *("llama3_1_8b_depth", "llama3_1_8b_depth_2.5b", "llama3_1_8b_width", "llama3_1_8b_width_2.5b"),
    *("mistral_nemo_12b_width", "mistral_nemo_12b_width_2.5b", "qwen3_8b_depth"),
    *("qwen3_8b_depth_2.5b", "qwen3_8b_nas", "qwen3_8b_nas_2.5b"),
)
"""Recipes that distil on several GPUs with tensor parallelism."""


def ranks_of(recipe: str, stage: str = "distill") -> list[Case]:
    """Returns ranks of a stage that must make the same calls.

    For ``qwen3_8b_depth``, these are all distinct ranks. For others, to save time, they are three:
    the first rank, the last rank of its tensor-parallel group, and the last rank of all, which is
    in the data-parallel group of the second.
    """
    _, job = Case(recipe, stage).job
    tensor: int = job.config.get("tensor_model_parallel_size", 1)
    ranks = [0, tensor - 1, job.world - 1]
    if recipe == "qwen3_8b_depth":
        ranks = distinct_ranks(job.world, tensor, context=1, pipeline=1, expert=1)
    return [Case(recipe, stage, rank) for rank in ranks]


RANKS_OF_LARGE = {recipe: ranks_of(recipe) for recipe in LARGE}
OTHER_RANKS = {
    "score": ranks_of("qwen3_8b_depth", "score"),
    "evaluate": ranks_of("qwen3_8b_depth", "evaluate"),
    "search": [SEARCH, SEARCH._replace(rank=7)],
}
"""The first and the last rank of stages other than ``distill`` that have several ranks, here 8."""
DIFFERENCES = {
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
"""Maps (rank with a defect, name of the defect) to (reported channel, words of the report). The
rank replaces one of ``RANKS``, which have no defect."""
DIFFERENT_CASES = {key: RANKS[0]._replace(rank=key[0], defect=key[1]) for key in DIFFERENCES}
TOO_LARGE = [
    EVALUATE._replace(defect="keep_all"),
    SEARCH._replace(defect="keep_all"),
    SEARCH._replace(defect="keep_cache"),
]
"""Cases whose defect does not free memory, so that they need more than the GPU has. Without a
defect, the memory that ``EVALUATE`` and ``SEARCH`` set for the GPU suffices."""
Results = dict[Case, tuple[RankJob, RehearsalResult]]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Rehearses all cases in one process, which imports the libraries once."""
    cases = list(
        dict.fromkeys(  # without duplicates, in order
            [
                *(*SOUND, *BROKEN, *RANKS, *DIFFERENT_CASES.values(), *TOO_LARGE),
                *(case for ranks in RANKS_OF_LARGE.values() for case in ranks),
                *(case for ranks in OTHER_RANKS.values() for case in ranks),
            ]
        )
    )
    jobs = [replace(case.job[1], resumed=case.resumed) for case in cases]
    file = tmp_path_factory.mktemp("rehearsal") / "jobs.json"
    jobs_with_defects = [[asdict(job), case.defect] for job, case in zip(jobs, cases, strict=True)]
    file.write_text(json.dumps(jobs_with_defects))
    command = [sys.executable, defects.__file__, str(file)]
    env = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    parse = TypeAdapter(RehearsalResult).validate_json
    results = [parse(line) for line in process.stdout.splitlines()]
    return dict(zip(cases, zip(jobs, results, strict=True), strict=True))


@pytest.mark.parametrize("case", SOUND, ids=lambda case: f"{case.recipe}-{case.stage}-{case.rank}")
def test_sound_stages_complete_within_the_planned_memory(case: Case, rehearsed: Results) -> None:
    _, result = rehearsed[case]
    assert result.error is None, result.error
    # The plan has the copies of weights that TransformerEngine keeps for FP8. The rehearsal does
    # not have them, because it runs without TransformerEngine.
    overrides = tuple(override for override in case.overrides if override != FP8)
    chain, job = case._replace(overrides=overrides).job
    plan = planned_memory(job, chain)
    assert plan is not None
    peak, total = peak_by_kind(result, plan), sum(getattr(plan, kind) for kind in KINDS)
    # The outputs of recomputed modules, and the checkpoint from which training resumes, must not
    # stay in memory. The usual tolerance of activations would hide them.
    is_tight = case in (RESUMED, RECOMPUTED)
    for kind in KINDS:
        tolerance = {"abs": 0.1 * total} if kind in TEMPORARY else {"rel": 0.01}
        if is_tight and kind == "activations":
            tolerance = {"rel": 0.1}
        assert peak[kind] == pytest.approx(getattr(plan, kind), **tolerance), kind
    assert sum(peak.values()) == pytest.approx(total, rel=0.1)


def test_host_memory_has_the_state_that_a_save_gathers(rehearsed: Results) -> None:
    """A save gathers ``STATE_BYTES`` for each parameter: the weight and Adam's moments."""
    job, result = rehearsed[RESUMED]
    chain, _ = RESUMED.job
    plan = planned_memory(job, chain)
    assert plan is not None
    parameters = plan.weights / 2  # a bfloat16 weight takes 2 bytes
    gathered = STATE_BYTES * parameters
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
    """``EVALUATE`` and ``SEARCH`` have no defect, so nothing is reported for them.

    A search with a defect still has a model or cached memory on the GPU when it starts a training
    run. This memory has the label "parent".
    """
    job, result = rehearsed[case]
    assert result.error is None
    chain, _ = case.job
    is_too_large = case in TOO_LARGE
    assert len(list(memory_mistakes([(job, result)], chain))) == (1 if is_too_large else 0)
    assert ("parent" in result.peak) == (is_too_large and case.stage == SEARCH.stage)


def test_a_config_may_have_a_model_type_instead_of_architectures(tmp_path: Path) -> None:
    _, job = Case(SMALL, "import_hf").job
    config = {**job.hf_config, "model_type": "llama"}
    del config["architectures"]
    hf_path = materials.settings(replace(job, hf_config=config), tmp_path)["hf_path"]
    assert read_hf_config(hf_path)["model_type"] == "llama"


def test_every_recipe_is_rehearsed() -> None:
    recipes = {file.stem for file in (REPO_ROOT / "conf" / "recipe").glob("*.yaml")}
    assert {case.recipe for case in SOUND} == recipes


@pytest.mark.parametrize("ranks", [RANKS, PIPELINE_RANKS], ids=["two_stages", "three_stages"])
def test_sound_ranks_make_the_same_calls(ranks: list[Case], rehearsed: Results) -> None:
    _, first_result = rehearsed[ranks[0]]
    names = {channel.name for channel in first_result.channels}
    second_stage = 384 if ranks == RANKS else 256  # its first rank: 768 ranks / 2 or 3 stages
    assert f"messages from rank 0 to rank {second_stage}" in names
    assert list(communication_mistakes([rehearsed[case] for case in ranks])) == []


@pytest.mark.parametrize("recipe", LARGE)
def test_ranks_of_shipped_recipes_make_the_same_calls(recipe: str, rehearsed: Results) -> None:
    ranks = RANKS_OF_LARGE[recipe]
    # Some of the ranks share groups. Otherwise there would be no calls to compare.
    groups = [{channel.name for channel in rehearsed[case][1].channels} for case in ranks]
    assert any("TENSOR_MODEL_PARALLEL_GROUP" in name for name in groups[0] & groups[1])
    earlier_groups = set().union(*groups[:-1])
    shared = earlier_groups & groups[-1]
    assert any(name.startswith("DATA_PARALLEL_GROUP_WITH_CP (") for name in shared)
    assert list(communication_mistakes([rehearsed[case] for case in ranks])) == []


@pytest.mark.parametrize("ranks", OTHER_RANKS.values(), ids=OTHER_RANKS)
def test_ranks_of_other_stages_make_the_same_calls(ranks: list[Case], rehearsed: Results) -> None:
    assert [case.rank for case in ranks] == [0, 7]
    assert list(communication_mistakes([rehearsed[case] for case in ranks])) == []


@pytest.mark.parametrize("key", DIFFERENCES, ids=lambda key: key[1])
def test_different_calls_of_ranks_are_reported(key: tuple[int, str], rehearsed: Results) -> None:
    rank, _ = key
    job, result = rehearsed[DIFFERENT_CASES[key]]
    assert result.error is None
    other_ranks = [rehearsed[case] for case in RANKS if case.rank != rank]
    mistakes = list(communication_mistakes([*other_ranks, (job, result)]))
    channel, words = DIFFERENCES[key]
    reported = [text for text in mistakes if channel in text.splitlines()[0]]
    assert reported, mistakes
    assert any(words in text for text in reported), reported
    assert any(f"\n  rank {rank}: " in text for text in reported), reported
