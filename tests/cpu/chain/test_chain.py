"""Runs all stages as a user does, on a tiny model with odd shapes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_convert.architecture import Architecture
from nemo_convert.gguf_file import FILE
from nemo_convert.hf import Weights, tokenizer_sha256
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import ARTIFACT, MANIFEST, WORK
from recipes.core.metrics import METRICS, steps_of
from recipes.core.run_state import BEGUN
from recipes.core.snapshot import CODE
from recipes.core.stage import Input
from recipes.core.wheels import cache_dir
from recipes.distillation.training import initial_kl_fraction
from recipes.engines.backends import model_folder
from recipes.evaluation.results import EvaluationResult, ServedResult
from recipes.pruning.results import HealResult
from tests.chaos.chain import STEPS, differences, is_of_a_library, overrides
from tests.chaos.kills import Kill, RunCommand
from tests.support.generation import FIRST_TOKEN, NEW_TOKENS, output_of, require_same_outputs
from tests.support.in_process import run_in_process, run_successfully
from tests.support.launcher import run_recipe
from tests.support.llama_cpp import require_similar_generation
from tests.support.notebook import run_notebook
from tests.support.pages import Page
from tests.support.runs import HEALING_STAGES, copy_without, manifest_of
from tests.support.transformers_5 import save_by_transformers_5, transformers_5

# Stages that run only with an engine.
ENGINES = (
    *("build_engine", "build_teacher_engine", "measure_speed", "export_gguf", "evaluate_served"),
)
SERVE_PAGE = (REPO_ROOT / "docs" / "serve.md").read_text()
SECRET = "a_token_that_no_file_may_hold"


@pytest.fixture(scope="module")
def teacher(odd_llama: Path) -> Path:
    """The teacher as transformers 5 saves it."""
    [teacher] = save_by_transformers_5(odd_llama)
    return teacher


@pytest.fixture(scope="module")
def tiny_run(teacher: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run. Stages must ignore the variables of the Slurm job in which it is started."""
    run_dir = tmp_path_factory.mktemp("chain") / "run"
    home = run_dir.with_name("home")
    home.mkdir()
    variables = {"HOME": str(home), "HF_TOKEN": SECRET, "NEMO_RECIPES_CACHE": str(cache_dir())}
    slurm_variables = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "batch"}
    with mock.patch.dict(os.environ, variables | slurm_variables):
        result = run_recipe(*overrides(teacher, text_file, run_dir), cwd=run_dir.parent)
    assert result.code == 0, result.output
    for stage in (*HEALING_STAGES, *ENGINES):
        assert f"{stage}: complete" in result.output
    assert f"{len(HEALING_STAGES) + len(ENGINES)} stages ran" in result.output
    return run_dir


def test_the_tutorial_runs_unchanged(
    tiny_run: Path,
    teacher: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs all cells in order, with directory and settings of ``tiny_run``. No stage runs again."""
    times = {file: file.stat().st_mtime_ns for file in tiny_run.glob(f"*/{MANIFEST}")}
    monkeypatch.setattr(sys, "path", list(sys.path))
    recipe, *arguments = overrides(teacher, text_file, tiny_run)
    name = recipe.removeprefix("recipe=")
    parameters = {"RECIPE": name, "RUN_DIR": str(tiny_run), "SETTINGS": arguments}
    outputs, variables = run_notebook(REPO_ROOT / "docs/tutorial.ipynb", parameters)
    html = [output for output in outputs if hasattr(output, "_repr_html_")]
    assert ["&lt;svg" in str(output) for output in html].count(True) == 2
    text = re.sub(r"(<[^>]*>)+", " ", "".join(html)) + capsys.readouterr().out
    assert " num_layers 5 4 " in text  # of teacher and student
    assert re.search(r" FLOPs [\d.]+ GFLOP ", text)
    assert " distilled " in text
    # A decimal fraction with five or more significant digits.
    assert re.findall(r".*\b\d{1,3}\.0*[1-9]\d{4}.*", text) == [], "a number is not rounded"
    assert variables["quality"] == manifest_of(tiny_run, "evaluate").result(EvaluationResult)
    assert {file: file.stat().st_mtime_ns for file in times} == times, "a stage ran again"


def test_manifests_are_complete(tiny_run: Path) -> None:
    for stage in HEALING_STAGES:
        manifest = manifest_of(tiny_run, stage)
        assert manifest.seconds > 0
        needs_no_torch = stage in ("plan", "report")
        assert manifest.peak_rss_bytes > (10e6 if needs_no_torch else 100e6)
        assert manifest.files
        assert {"torch", "megatron-core", "nvidia-modelopt"} <= manifest.versions.keys()
        assert not (tiny_run / stage / WORK).exists()
        [snapshot] = (tiny_run / CODE).iterdir()
        assert manifest.snapshot == snapshot.name


def test_secrets_reach_no_file(tiny_run: Path) -> None:
    grep = subprocess.run(["grep", "-rl", SECRET, tiny_run.parent], check=False)
    assert grep.returncode == 1  # no file contains it


def test_the_student_has_the_requested_shape(tiny_run: Path) -> None:
    exported = manifest_of(tiny_run, "export_hf")
    shape = Architecture(**exported.architecture or {})
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == (4, 40, 72)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.kv_channels) == (5, 1, 10)
    weights = Weights(tiny_run / "export_hf" / ARTIFACT)
    assert weights.read("model.layers.3.self_attn.q_proj.weight").shape == (50, 40)  # 50 = 5 * 10
    assert "model.layers.4.mlp.down_proj.weight" not in weights.names()
    assert sum(weights.read(name).numel() for name in weights.names()) == exported.parameters


def test_exported_model_is_in_bfloat16_and_has_tied_embeddings(tiny_run: Path) -> None:
    folder = tiny_run / "export_hf" / ARTIFACT
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert (model.config.head_dim, model.dtype) == (10, torch.bfloat16)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()  # tied


def test_exported_folder_chats_and_stops_as_the_teacher(tiny_run: Path, odd_llama: Path) -> None:
    exported = tiny_run / "export_hf" / ARTIFACT
    teacher, student = output_of(odd_llama), output_of(exported)
    assert student.chat == teacher.chat
    assert tokenizer_sha256(exported) == manifest_of(tiny_run, "import_hf").tokenizer_sha256
    assert student.generation_config == teacher.generation_config
    assert student.generation_config["temperature"] == 0.7
    for output in (teacher, student):
        assert output.stopped == [FIRST_TOKEN, output.generation_config["eos_token_id"]]
        assert len(output.greedy) == NEW_TOKENS


def test_exported_folder_is_the_same_in_transformers_5(tiny_run: Path, odd_llama: Path) -> None:
    folders = (tiny_run / "export_hf" / ARTIFACT, odd_llama)
    installed, newer = require_same_outputs(transformers_5(), *folders)
    assert newer.startswith("5.")
    assert f"transformers {installed} and {newer}" in SERVE_PAGE


def test_model_card_has_the_metrics_of_the_manifests(tiny_run: Path, odd_llama: Path) -> None:
    card = (tiny_run / "export_hf" / ARTIFACT / "README.md").read_text()
    evaluation = manifest_of(tiny_run, "evaluate").metrics
    for role in ("teacher", "pruned", "distilled"):
        metrics = evaluation[role]
        assert f"| {metrics['perplexity']:.1f} | {metrics['kl_to_teacher']:.3f} |" in card
        assert f"{metrics['loss']:.3f} ± {metrics['loss_standard_error']:.3f}" in card
    [dropped_layer] = {1, 2, 3, 4, 5} - set(manifest_of(tiny_run, "prune").metrics["kept_layers"])
    assert f"Layers dropped, counted from 1: {dropped_layer}." in card
    healing = manifest_of(tiny_run, "heal").metrics
    assert f"KL to the teacher {healing['kl_pruned']:.3f} → {healing['kl_healed']:.3f}" in card
    assert f"{manifest_of(tiny_run, 'distill').metrics['tokens']:,} tokens in {STEPS} steps" in card
    assert "`topics.jsonl`" in card
    assert "llama_width_prune" in card
    assert odd_llama.name in card
    assert str(odd_llama) not in card, "the path of a local model is private"


def test_code_of_the_model_card_runs_unchanged(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_run / "export_hf" / ARTIFACT
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    exec(code, {})
    output = capsys.readouterr().out
    assert output.startswith("The capital of France is")
    assert len(output) > len("The capital of France is\n")


def test_openvino_commands_of_the_model_card_work(tiny_run: Path, tmp_path: Path) -> None:
    """The commands build an engine and generate text with it. They cannot access a hub."""
    folder = shutil.copytree(tiny_run / "export_hf" / ARTIFACT, tmp_path / "model")
    lines = (folder / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith(("optimum-cli ", "python -c "))]
    assert len(commands) == 2
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for program, *arguments in map(shlex.split, commands):
        done = subprocess.run(
            [Path(sys.executable).with_name(program), *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) > 1  # text that the second command has generated


def test_metrics_are_consistent(tiny_run: Path) -> None:
    for stage in ("import_hf", "export_hf"):
        assert manifest_of(tiny_run, stage).metrics["parity_max_logit_difference"] < 1e-4
    metrics = manifest_of(tiny_run, "evaluate").metrics
    assert metrics["teacher"]["kl_to_teacher"] == 0
    assert metrics["teacher"]["top1_agreement"] == 1
    # The student is so similar to its teacher that training lowers the loss, but not the KL.
    assert min(metrics[role]["kl_to_teacher"] for role in ("pruned", "distilled")) > 0
    assert metrics["distilled"]["loss"] < metrics["pruned"]["loss"]
    assert metrics["pruned"]["parameters"] == manifest_of(tiny_run, "prune").parameters
    steps = steps_of(tiny_run / "distill" / METRICS, "distill")
    assert [s["done"] for s in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["lr"] < max(s["lr"] for s in steps)
    validations = steps_of(tiny_run / "distill" / METRICS, "validate")
    assert [v["done"] for v in validations] == [12, 24]  # val_check_interval=12


def test_the_kl_that_healing_removed_is_reported(tiny_run: Path) -> None:
    result = manifest_of(tiny_run, "heal").result(HealResult)
    assert 0 < result.kl_healed < result.kl_pruned
    assert initial_kl_fraction(tiny_run / "distill" / METRICS) == result.remaining_kl
    page = (tiny_run / "report" / ARTIFACT / "report.html").read_text()
    assert {result.kl_pruned, result.kl_healed} <= Page(page).numbers()


def test_second_run_does_nothing(tiny_run: Path, teacher: Path, text_file: Path) -> None:
    times_before = {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*") if p.is_file()}
    result = run_recipe(*overrides(teacher, text_file, tiny_run), cwd=tiny_run.parent)
    assert result.code == 0, result.output
    assert "everything was complete, nothing ran" in result.output
    assert {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*") if p.is_file()} == times_before


def test_leftover_work_of_a_complete_stage_is_removed(
    tiny_run: Path, teacher: Path, text_file: Path
) -> None:
    work = tiny_run / "distill" / WORK
    work.mkdir()
    # BEGUN has the manifest of the start that made ``work``. It equals that of the result.
    shutil.copy(tiny_run / "distill" / MANIFEST, work / BEGUN)
    result = run_in_process(*overrides(teacher, text_file, tiny_run), cwd=tiny_run.parent)
    assert "everything was complete, nothing ran" in result.output
    assert not work.exists()


def test_engines_of_teacher_and_student_are_built_and_timed(tiny_run: Path) -> None:
    assert not (tiny_run.with_name("home") / "intel").exists(), "OpenVINO wrote into the home"
    student = manifest_of(tiny_run, "build_engine")
    assert (student.kind, student.metrics["backend"]) == ("engine", "openvino")
    assert student.metrics["greedy_margin"] < 1e-3
    assert student.parameters == manifest_of(tiny_run, "export_hf").parameters
    results = manifest_of(tiny_run, "measure_speed").metrics
    rows, backends, batches = results["rows"], ("openvino", "transformers"), (1, 3)
    assert [(r["batch_size"], r["backend"], r["role"]) for r in rows] == [
        *product(batches, backends, ("teacher", "student"))
    ]
    for row in rows:
        for name in ("time_to_first_token_ms", "decode_tokens_per_second"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
    # Each model is timed in a separate process, so rows 0 (an engine) and 2 (the same model in
    # transformers) have different peaks.
    assert 100e6 < rows[0]["peak_memory_bytes"] < rows[2]["peak_memory_bytes"]
    assert rows[0]["disk_bytes"] == manifest_of(tiny_run, "build_teacher_engine").total_bytes()
    speedups = results["speedups"]
    assert [(s["backend"], s["batch_size"]) for s in speedups] == [*product(backends, batches)]
    assert min(min(s["decode_roofline"], s["prefill_roofline"]) for s in speedups) > 1


def test_llama_cpp_reads_the_gguf_file(tiny_run: Path) -> None:
    """All weights keep 16 bits. q8_0 needs row lengths that are multiples of 32; here, none is."""
    exported = manifest_of(tiny_run, "export_gguf")
    assert (exported.metrics["type"], exported.metrics["architecture"]) == ("q8_0", "llama")
    assert exported.parameters == manifest_of(tiny_run, "export_hf").parameters
    folder, file = (tiny_run / stage / ARTIFACT for stage in ("export_hf", "export_gguf"))
    require_similar_generation(folder, file / FILE, tolerance=0.02)
    assert (
        "llama-server -m export_gguf/artifact/model.gguf"
        in (tiny_run / "report" / ARTIFACT / "report.html").read_text()
    )


def test_the_served_file_is_compared_with_the_student(tiny_run: Path) -> None:
    served = manifest_of(tiny_run, "evaluate_served").result(ServedResult)
    assert (served.server, served.tasks["piqa"].items) == ("llama_cpp", 4)
    assert served.text is not None
    assert served.text.served_perplexity == pytest.approx(served.text.student_perplexity, rel=0.05)
    assert served_section(tiny_run).startswith("Served model The built model as llama.cpp runs it")


def served_section(run_dir: Path) -> str:
    """Returns the text, without HTML tags, of the report's section about the served model."""
    page = (run_dir / "report" / ARTIFACT / "report.html").read_text()
    section = page.partition('<section id="served">')[2].partition("</section>")[0]
    return " ".join(re.sub("<[^>]*>", " ", section).split())


def test_an_int8_engine_is_compared_with_the_student_and_fails_a_strict_gate(
    tiny_run: Path, teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    run_dir = copy_without(tiny_run, tmp_path / "run")
    arguments = [
        *overrides(teacher, text_file, run_dir, served="engine"),
        "stages.build_engine.precision=int8",
        *("~stages.measure_speed", "~stages.build_teacher_engine", "~stages.report.inputs.speed"),
    ]
    gates = ["served_perplexity_ratio < 1.5", "served_score.piqa > 1"]  # no score exceeds 1
    result = run_in_process(*arguments, f"gates={json.dumps(gates)}", cwd=tmp_path)
    assert result.code == 1, result.output
    assert "evaluate_served: complete" in result.output
    assert re.search(r"served_perplexity_ratio < 1.5 +[\d.]+ +passed", result.output)
    assert "served_score.piqa > 1: measured" in result.output
    score = manifest_of(run_dir, "evaluate_served").result(ServedResult).tasks["piqa"].served
    text = served_section(run_dir)
    assert "as OpenVINO runs it (int8)" in text
    assert f"{score.value:.1%}" in text


def test_a_partly_converted_model_is_converted_again(tiny_run: Path, tmp_path: Path) -> None:
    """A killed stage that builds or times engines leaves such a model; here, a truncated file."""
    teacher = Input(tiny_run / "import_hf", manifest_of(tiny_run, "import_hf"))
    (tmp_path / "teacher_hf").mkdir()
    (tmp_path / "teacher_hf" / "model.safetensors").write_text("truncat")
    assert Weights(model_folder(teacher, tmp_path / "teacher_hf")).names()  # readable


def test_the_teacher_is_exported_for_images_without_nemo(
    tiny_run: Path, odd_llama: Path, teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    """A teacher gets no new model card. Its own card would be copied, but this one has none."""
    run_dir = copy_without(tiny_run, tmp_path / "run")
    arguments = overrides(teacher, text_file, run_dir, engine="tensorrt_llm")
    run_successfully(*arguments, "only=[export_teacher]", cwd=tmp_path)
    folder = run_dir / "export_teacher" / ARTIFACT
    assert not (folder / "README.md").exists()
    original, exported = Weights(odd_llama), Weights(folder)
    assert all(torch.equal(original.read(n), exported.read(n)) for n in exported.names())
    refused = run_in_process(*arguments, "only=[build_teacher_engine]", cwd=tmp_path)
    assert refused.code == 1
    assert "head size of 10" in refused.output


def test_a_changed_field_and_force_rerun_later_stages(
    tiny_run: Path, teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    run_dir = copy_without(tiny_run, tmp_path / "run")
    prune_started_at = manifest_of(run_dir, "prune").started_at
    first_fingerprint = manifest_of(run_dir, "distill").fingerprint
    changed = [*overrides(teacher, text_file, run_dir), "stages.distill.lr=5e-4"]
    result = run_successfully(*changed, "only=[distill]", cwd=tmp_path)
    assert "lr 0.0003 → 0.0005" in result.output
    changed.append("only=[distill,evaluate]")
    next_result = run_successfully(*changed, cwd=tmp_path)
    assert "1 stage ran" in next_result.output  # evaluate
    assert manifest_of(run_dir, "prune").started_at == prune_started_at
    assert manifest_of(run_dir, "distill").fingerprint != first_fingerprint
    assert manifest_of(run_dir, "evaluate").metrics != manifest_of(tiny_run, "evaluate").metrics
    forced = run_successfully(*changed, "force=[evaluate]", cwd=tmp_path)
    assert "1 stage ran" in forced.output


def test_kill_9_then_the_same_command_gives_the_same_result(
    tiny_run: Path, teacher: Path, text_file: Path, tmp_path: Path, temporary: Path
) -> None:
    """Kills the stage ``score``, then the launcher while ``distill`` saves a checkpoint."""
    run_dir = copy_without(tiny_run, tmp_path / "run", "score", "distill")
    arguments = [*overrides(teacher, text_file, run_dir), "only=[score,prune,heal,distill]"]
    seconds = {stage: manifest_of(tiny_run, stage).seconds for stage in ("score", "distill")}
    command = RunCommand(arguments, run_dir, seconds, {"TMPDIR": str(temporary)})
    # Kills at once. This time, scoring may be ten times as fast as in ``tiny_run``.
    killed = command.kill(Kill("score", "stage", fraction=0.0))
    assert killed is not None
    assert (killed.stage, killed.victim, killed.exit_status) == ("score", "stage", 1)
    assert "Traceback" not in killed.output
    assert "score failed: it ended without a message" in killed.output
    assert "killed by SIGKILL: out of memory" in killed.output

    killed = command.kill(Kill("distill", "launcher", "save", 0.3))
    assert killed is not None
    assert killed.stage == "distill"
    assert re.search(r"score +resume", killed.output), killed.output

    code, output = command.finish()
    assert code == 0, output
    assert re.search(r"distill +resume", output), output
    assert differences(tiny_run, run_dir) == []
    records = (run_dir / "distill" / METRICS).read_text()
    assert records.count('"task": "distill", "done": 1,') == 1, "training started again"
    assert [p.name for p in temporary.iterdir() if not is_of_a_library(p)] == []
