"""Breaks each rule of the planner with settings, a teacher's config or a changed machine."""

from __future__ import annotations

import ast
import json
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import yaml
from omegaconf import OmegaConf

from launch.plan import Plan, make_plan
from launch.settings import settings_of
from recipes.core import versions
from recipes.core.errors import RecipeError
from recipes.planning import hardware, limits, rules
from recipes.planning.rules import RULES, WARNING
from tests.support.composing import is_field
from tests.support.folders import expected_shapes, write_folder, write_sparse_weights
from tests.unit.conftest import LLAMA_CONFIG, RECIPE, SMALL_STUDENT

if TYPE_CHECKING:
    from tests.unit.conftest import Compose, MakePlan

D, S, T = "stages.distill.", "stages.score.", "stages.evaluate_tasks."
H, L = "stages.successive_halving.distill.", "stages.heal."
"""Prefixes of the settings of stages; short, because the table ``CASES`` repeats them."""
BFLOAT16 = "hardware.precision=bf16-mixed"
"""Sets the precision, whose default depends on this machine's processor."""
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
TP2 = (f"{D}tensor_model_parallel_size=2", f"{D}resources.devices=2", f"{D}global_batch_size=8")
MonkeyPatch = pytest.MonkeyPatch


def gpu_is_here(patch: MonkeyPatch, _: Path) -> None:
    patch.setattr(limits, "gpus_here", lambda: 8)


def torch_is_old(patch: MonkeyPatch, _: Path) -> None:
    original = versions.installed_version
    patch.setattr(versions, "installed_version", lambda n: "2.1.0" if n == "torch" else original(n))


def harness_is_missing(patch: MonkeyPatch, _: Path) -> None:
    patch.setattr("recipes.evaluation.task_checks.HARNESS", "0.0.0")


def disk_is_full(patch: MonkeyPatch, _: Path) -> None:
    usage = namedtuple("usage", "total used free")
    patch.setattr("launch.plan.shutil.disk_usage", lambda _: usage(10**9, 10**9, 0))


def hub_is_unreachable(patch: MonkeyPatch, _: Path) -> None:
    patch.setattr("recipes.planning.chain.is_config_available", lambda _: False)


def compiler_is_missing(patch: MonkeyPatch, _: Path) -> None:
    patch.setenv("CXX", "no-such-compiler")


def output_layer_is_missing(_: MonkeyPatch, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    shapes = expected_shapes(config)
    del shapes["lm_head.weight"]
    write_sparse_weights(folder / "model.safetensors", shapes)


def config_says_float32(_: MonkeyPatch, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))


class Case(NamedTuple):
    """How to break a rule with the width recipe."""

    overrides: tuple[str, ...]
    config: dict[str, Any] | None = None
    """Changes of ``LLAMA_CONFIG``, whose model then is the teacher; ``None`` for the demo model."""
    prepare: Callable[[MonkeyPatch, Path], None] | None = None
    """Changes the machine or the teacher's folder, which is the second argument."""


def case(*overrides: str, **fields: Any) -> Case:
    return Case(overrides, **fields)


# The demo model has 30 layers, hidden size 576, FFN size 1536, 9 heads and 49,152 tokens in its
# vocabulary. TEXT and CHAT are the paths of the fixtures ``text`` and ``chats``.
CASES = {
    "stack-versions": case(prepare=torch_is_old),
    "disk": case(prepare=disk_is_full),
    "memory": case("hardware.memory_bytes=1e9"),
    "time-limit": case("+cluster.time=00:06:00"),
    "requeues": case("+cluster.time=00:06:00", "+cluster.max_requeues=0"),
    "image": case("+cluster.images.default=/nowhere/image.sqsh"),
    "engine-image": case("engine=tensorrt_llm", "cluster.executor=slurm"),
    "mounts": case("+cluster.mounts=[/nowhere/data]"),
    "cpus-per-task": case("cluster.executor=slurm"),
    "mpi": case("engine=tensorrt_llm", "cluster.executor=slurm", "+cluster.mpi.build_engine=null",
                "+cluster.images.tensorrt_llm=nvcr.io#image"),
    "cluster-hardware": case("cluster.executor=slurm", "+cluster.gpus=gres"),
    "cpu-precision": case("cluster.executor=slurm"),
    "hardware-profile": case(prepare=gpu_is_here),
    "bundled-config": case("model=llama3_1_8b", "skip_rules=[memory]", prepare=hub_is_unreachable),
    "model": case("stages.import_hf.hf_path=nope"),
    "checkpoint": case(config={"tie_word_embeddings": False}, prepare=output_layer_is_missing),
    "checkpoint-note": case(config={}, prepare=config_says_float32),
    "vocabulary": case(*TP2, config={"vocab_size": 513}),
    "data-sources": case("data.sources=[nowhere.txt]"),
    "unknown-text": case("data.sources=['hf://HuggingFaceFW/fineweb-edu:train']"),
    "licence": case("data.sources=['TEXT#licence=CC-BY-NC-4.0']"),
    "document-end": case("data.document_end=<end>", config={}),
    "data-splits": case("stages.prepare_data.heldout_fraction=0.99"),
    "chat": case("data.format=chat", "data.sources=[CHAT]", *SMALL_STUDENT, config={}),
    "seq-length": case("data.seq_length=10000"),
    "tokens": case("data.sources=[TEXT]", f"{D}global_batch_size=4000"),
    "epochs": case("data.sources=[TEXT]", f"{D}max_steps=400"),
    "prune-target": case("stages.prune.target_hidden_size=100"),
    "large-reduction": case("stages.prune.target_hidden_size=0.6"),
    "transformers-5": case(),  # the default student: hidden size 512 and 9 heads
    "slow-sizes": case("stages.prune.target_ffn_hidden_size=1160",
                      "stages.prune.ffn_hidden_size_divisor=8"),
    "layer-importance": case("stages.prune.target_num_layers=20",
                            "stages.prune.layer_importance=loss"),
    "calibration": case("stages.score.block_sizes=[30]"),
    "healing": case("heal=least_squares", config=MOE),
    "added-layers": case("add_layers=teacher"),  # the recipe prunes widths
    "one-rank": case("stages.prune.resources.devices=2"),
    "ranks": case(f"{D}tensor_model_parallel_size=3"),
    "batch": case(f"{D}global_batch_size=6"),
    "tensor-parallel": case(*TP2),
    "tensor-nodes": case(f"{D}tensor_model_parallel_size=3", f"{D}resources.nodes=3"),
    "pipeline-parallel": case(f"{D}pipeline_model_parallel_size=31", f"{D}resources.devices=31"),
    "sequence-parallel": case(*TP2, f"{D}sequence_parallel=true", "data.seq_length=255"),
    "context-parallel": case(f"{D}context_parallel_size=2", f"{D}resources.devices=2"),
    "expert-parallel": case(f"{D}expert_model_parallel_size=2"),
    "optimizer-instances": case(f"{D}num_distributed_optimizer_instances=2"),
    "unchecked-limits": case(f"{D}global_batch_size=6", "skip_rules=[batch]"),
    "recompute": case(f"{D}recompute_granularity=full", f"{D}hidden_weight=1"),
    "fp8": case(f"{D}fp8=hybrid"),
    "compiler": case(f"{D}compile=true", prepare=compiler_is_missing),
    "student-steps": case(f"{D}student_steps=[100]"),
    "stop": case(f"{D}stop_at_recovered=0.9", f"{D}kd_weight=0"),
    "profile": case(f"{D}profile_steps=[5,3]"),
    "schedule": case(f"{D}warmup_steps=100"),
    "loss": case(f"{D}kd_weight=0", f"{D}lm_weight=0"),
    "no-effect": case(f"{D}jsd_beta=0.3"),
    "hidden-pairs": case(f"{D}hidden_weight=1", f"{D}intermediate_layer_pairs=[[1,1]]",
                         f"{D}pipeline_model_parallel_size=2", f"{D}resources.devices=2"),
    "hidden-range": case(f"{D}hidden_weight=1", f"{D}pipeline_model_parallel_size=2",
                         f"{D}resources.devices=2"),
    "cached-teacher": case("teacher=cached", f"{D}hidden_weight=1"),
    "top-k": case("stages.distill.top_k=49152"),
    "evaluate": case("stages.evaluate.prompt_tokens=256"),
    "tasks-harness": case("tasks=quick", prepare=harness_is_missing),
    "tasks-names": case("tasks=quick", f"{T}tasks=[sciqq]"),
    "tasks-fewshot": case("tasks=quick", f"+{T}num_fewshot.nothing=5"),
    "gates": case("gates=['recovered.nothing >= 0.5']"),
}  # fmt: skip
ELSEWHERE = {
    **dict.fromkeys(("served", "served-time"), "stages/test_evaluate_served.py"),
    "report": "stages/test_checks.py",
    **dict.fromkeys(("budget", "search", "searched-shape"), "search/test_stages.py"),
    "tokenizer": "planning/test_vocabularies.py",
    "source-weights": "planning/test_limits.py",
    **dict.fromkeys(("max-seq-len", "max-input-len"), "engines/test_engine_rules.py"),
    **dict.fromkeys(("format", "kv-cache", "engine-model"), "engines/test_engine_rules.py"),
    "head-size": "engines/test_tensorrt_llm.py",
    **dict.fromkeys(
        ("alignment", "length", "engine-limits", "engine-pair"), "engines/test_bench.py"
    ),
    **dict.fromkeys(("job", "job-memory", "partition"), "launch/test_slurm_limits.py"),
    **dict.fromkeys(("gpus", "host-memory"), "launch/test_local.py"),
}
"""Rules that the width recipe cannot break, and the tests in ``tests/unit`` that break them."""


@pytest.fixture
def plan(compose: Compose, tmp_path: Path, large_disk: None, versions_read_once: None) -> MakePlan:
    """Plans like the common fixture, but with tasks and an engine, and with values in YAML."""

    def plan_recipe(*overrides: str, recipe: str = RECIPE) -> Plan:
        cfg = compose(recipe, *(override for override in overrides if not is_field(override)))
        for override in filter(is_field, overrides):
            key, _, value = override.partition("=")
            added = key.startswith("+")  # as an index, True is 1 and drops the "+"
            OmegaConf.update(cfg, key[added:], yaml.safe_load(value), force_add=added)
        return make_plan(cfg, settings_of(cfg), tmp_path / "run")

    return plan_recipe


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A file of 5000 equal conversations."""
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So it is."}]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 5000)
    return tmp_path / "chats.jsonl"


def test_every_rule_in_the_code_is_listed_and_broken_by_a_test(root: Path) -> None:
    """The first argument of every ``Problem(…)`` in the code is a constant of ``rules``."""
    names = set()
    for file in (*(root / "recipes").rglob("*.py"), *(root / "launch").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Problem":
                [rule, *_] = node.args
                assert isinstance(rule, ast.Attribute), f"{file}:{node.lineno}"
                names.add(getattr(rules, rule.attr).name)
    assert names == RULES.keys()
    assert CASES.keys() | ELSEWHERE.keys() == RULES.keys()
    for name, path in ELSEWHERE.items():
        assert f'"{name}"' in (root / "tests" / "unit" / path).read_text(), name


@pytest.mark.parametrize("rule", CASES)
def test_each_rule_can_be_broken(
    rule: str,
    plan: MakePlan,
    hf_folder: Path,
    text: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error has the rule's name, a fix and a reference. A warning is a note of the plan."""
    case = CASES[rule]
    overrides = [
        override.replace("TEXT", str(text)).replace("CHAT", str(chats))
        for override in case.overrides
    ]
    if case.config is not None:
        write_folder(hf_folder, LLAMA_CONFIG | case.config)
        overrides += [f"model.hf_path={hf_folder}", *SMALL_STUDENT]
    if case.prepare is not None:
        case.prepare(monkeypatch, hf_folder)
    if RULES[rule].severity == WARNING:
        notes = {note.rule.name: note for note in plan(*overrides).notes}
        assert notes[rule].fix
        return
    with pytest.raises(RecipeError) as caught:
        plan(*overrides)
    assert f"[{rule}]" in str(caught.value)
    assert "  fix: " in str(caught.value)
    assert RULES[rule].reference in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("", r"\.txt#sha256=\w+' has no conversations"),  # the default source is plain text
        ("data.sources=[CHAT#text=body]", "every training source plain text"),
        (f"data.sources=[CHAT] {D}seq_length=128", "seq_length=128.* 256"),
        ("data.sources=[CHAT]", None),
        ("data.sources=[CHAT#format=chat,TEXT] data.format=text", None),
    ],
)
def test_conversations_are_checked_before_anything_runs(
    overrides: str, message: str | None, plan: MakePlan, text: Path, chats: Path
) -> None:
    arguments = overrides.replace("TEXT", str(text)).replace("CHAT", str(chats)).split()
    if message is None:
        notes = plan("data.format=chat", *arguments).notes
        assert "chat" not in {note.rule.name for note in notes}
    else:
        with pytest.raises(RecipeError, match=rf"{message}(?s:.*)\[(chat|data-sources)\]"):
            plan("data.format=chat", *arguments)


def test_messages_name_the_stage_of_the_recipe(plan: MakePlan) -> None:
    """The stages ``build_engine`` and ``build_teacher_engine`` have the same module.

    The message must name the stage, not the module.
    """
    with pytest.raises(RecipeError, match="build_teacher_engine has 2 ranks"):
        plan("engine=openvino", "stages.build_teacher_engine.resources.devices=2")


def test_skipped_rules_are_still_shown_and_other_rules_stay_errors(plan: MakePlan) -> None:
    overrides = ("+cluster.mounts=[/nowhere/data]", "hardware.memory_bytes=1e9", BFLOAT16)
    with pytest.raises(
        RecipeError, match=r"needs about 3 GB on a rank, but cpu has 1 GB.*\n.*\[memory\]"
    ):
        plan(*overrides, "skip_rules=[mounts]")
    notes = plan(*overrides, "skip_rules=[mounts,memory]").notes
    assert {"mounts", "memory"} <= {note.rule.name for note in notes}
    with pytest.raises(RecipeError, match="Did you mean 'memory'"):
        plan("skip_rules=[memroy]")


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (
            ("hardware.memory_bytes=48e9",),
            f"{H}micro_batch_size=1 {H}tensor_model_parallel_size=4 {H}resources.devices=8",
        ),
        (
            ("model=qwen3_8b", "hardware=h100"),
            f"{H}micro_batch_size=1 {H}tensor_model_parallel_size=2 {H}resources.devices=2",
        ),
        (
            ("heal=least_squares", f"{L}num_calibration_samples=4096", "hardware.memory_bytes=9e9"),
            f"{L}num_calibration_samples=2048",
        ),
        (
            (
                *(f"{S}num_calibration_samples=2048", f"{S}micro_batch_size=2048"),
                *(f"{S}precision='32'", "hardware.memory_bytes=6e9"),
            ),
            f"{S}micro_batch_size=1",
        ),
        (
            ("hardware.kind=gpu", "hardware.memory_bytes=1.4e9", BFLOAT16, "data.seq_length=1024"),
            f"{S}pipeline_model_parallel_size=4 {S}resources.devices=4",
        ),
    ],
)
def test_error_about_memory_proposes_settings_of_its_stage(
    plan: MakePlan, overrides: tuple[str, ...], fix: str
) -> None:
    search = "shrink" if "model=qwen3_8b" in overrides else "qwen3_8b_search"
    # Only a recipe with a search has the stage ``successive_halving``.
    recipe = {"recipe": f"recipe={search}"} if H in fix else {}
    stage = fix.split(".")[1]  # a fix starts with "stages.STAGE."
    with pytest.raises(RecipeError, match=f"{stage} needs about") as caught:
        plan(*overrides, **recipe)
    assert f"fix: set {fix}   [memory]" in str(caught.value)


def test_the_shipped_defaults_break_no_other_rule(plan: MakePlan) -> None:
    """No hidden size below 576 is a multiple of 64 and of the demo's 9 heads."""
    assert [note.rule.name for note in plan().notes] == ["transformers-5"]
    assert plan(recipe="recipe=llama_depth_prune").notes == ()


@pytest.mark.parametrize("flags", ["avx2", "avx512_bf16"])
def test_the_processor_of_the_login_node_does_not_affect_jobs(
    plan: MakePlan, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise fingerprints would depend on the machine from which jobs are submitted."""
    large_model, slurm = "model.hf_path=meta-llama/Llama-3.1-8B", "cluster.executor=slurm"
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    with pytest.raises(RecipeError, match=r"\[memory"):
        plan(large_model)
    # The memory of the cluster's nodes is unknown, so it is not limited.
    assert plan(large_model, slurm).chain.hardware.memory_of_rank(1) == float("inf")
    here, on_slurm = plan().chain, plan(slurm).chain
    assert here.hardware.precision == {"avx2": "32", "avx512_bf16": "bf16-mixed"}[flags]
    assert here.workloads["distill"].bf16 == (here.hardware.precision == "bf16-mixed")
    assert on_slurm.hardware.precision == "32"
    assert not on_slurm.workloads["distill"].bf16
    unknown_cpu_flops = hardware.cpu_profile("flops_per_second", here=False)
    assert on_slurm.hardware.flops_per_second == unknown_cpu_flops
    with_bf16 = plan(slurm, BFLOAT16)
    assert with_bf16.chain.workloads["distill"].bf16
    assert "cpu-precision" not in {note.rule.name for note in with_bf16.notes}
    # With bfloat16 instructions, a CPU has 4e11 FLOP/s. Without them, it has 2e9.
    assert with_bf16.chain.hardware.flops_per_second > 1e11


def test_memory_is_shared_by_the_ranks_of_a_cpu(plan: MakePlan) -> None:
    depth = {"recipe": "recipe=llama_depth_prune"}
    memory = ("hardware.memory_bytes=9e9", BFLOAT16)
    four_ranks = (f"{D}resources.devices=4", f"{D}global_batch_size=16", *memory)
    plan(*memory, **depth)  # one rank may use all 9 GB
    # Each of four ranks may use 9 / 4 = 2.25 GB.
    with pytest.raises(RecipeError, match="needs about 3 GB on a rank, but cpu has 2 GB"):
        plan(*four_ranks, **depth)
