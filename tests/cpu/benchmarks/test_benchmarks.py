"""Runs every benchmark on tiny models."""

from __future__ import annotations

import contextlib
import io
import json
import math
import mmap
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from itertools import count, product
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import convert, distill, launching, operations, prepare, students, tasks
from benchmarks.distill import METHODS, Shape, TrainingRun, disagreements, speeds, summarise
from benchmarks.launching import INPUT_STAGES, complete_manifest
from launch.executors.local import PRELOADED
from recipes.core.compiled import missing_compiler
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import write_manifest
from recipes.data.results import DatasetResult, SourceTokens
from tests.support.forked import run_forked
from tests.support.in_process import run_successfully
from tests.support.manifests import bare_manifest
from tests.support.runs import tiny

STEPS, MICRO_BATCH, SEQ_LENGTH = 3, 4, 64


def run_benchmark(module: ModuleType, *options: str) -> str:
    """Runs a benchmark's command line, and its launcher, in this process; returns the output."""
    output = io.StringIO()
    with (
        mock.patch.object(launching, "execute", execute),
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", [module.__name__, *options]),
        contextlib.redirect_stdout(output),
    ):
        os.environ.pop("COLUMNS", None)  # tables are as wide as they need
        module.main()
    return output.getvalue()


real_execute = launching.execute


def execute(command: list[str]) -> None:
    """Replaces ``launching.execute``: runs the launcher in this process, all else in forks."""
    if tuple(command[: len(launching.LAUNCHER)]) == launching.LAUNCHER:
        run_successfully(*command[len(launching.LAUNCHER) :], cwd=REPO_ROOT)
    else:
        # With these variables of earlier tests, the child would act as a rank of a process group.
        names = os.environ.keys() - {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"}
        child = run_forked(PRELOADED, command[1:], {n: os.environ[n] for n in names}, REPO_ROOT)
        assert child.returncode == 0, child.stderr


@pytest.fixture(scope="module")
def tiny_run(even_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the launcher with teacher, student and text."""
    run_dir = tmp_path_factory.mktemp("benchmarks") / "run"
    run_successfully(
        "recipe=llama_depth_prune",
        *tiny(even_llama, text_file, run_dir, SEQ_LENGTH),
        f"only=[{','.join(INPUT_STAGES)}]",
        "stages.prune.target_num_layers=2",
        cwd=run_dir.parent,
    )
    return run_dir


def test_every_method_is_measured(tiny_run: Path, tmp_path: Path) -> None:
    skipped = {"nemo-cached-compiled"}  # nemo-cached and nemo-compiled cover this combination
    if missing_compiler() is not None:
        skipped.add("nemo-compiled")
    names = [name for name in METHODS if name not in skipped]
    out = tmp_path / "speed.json"
    output = run_benchmark(
        distill,
        *("--run-dir", str(tiny_run), "--out", str(out), "--only", *names, "--rounds=1"),
        *(f"--steps={STEPS}", f"--micro-batch={MICRO_BATCH}", f"--seq-length={SEQ_LENGTH}"),
    )
    content: dict[str, Any] = json.loads(out.read_text())
    assert not content["failed"]
    assert list(content["results"]) == names
    for name, result in content["results"].items():
        (record,) = content["records"][name]
        assert len(record["ends"]) == len(record["losses"]) == STEPS
        assert all(math.isfinite(loss) and loss > 0 for loss in record["losses"])
        assert 0 < result["slowest"] <= result["tokens_per_second"] <= result["fastest"]
        assert result["peak_rss_bytes"] > 1e8
        planned = result["planned_tokens_per_second"]
        assert planned > 0 if METHODS[name].stages else planned is None
        assert name in output
    losses = {name: result["first_loss"] for name, result in content["results"].items()}
    assert losses["modelopt-bf16"] == pytest.approx(losses["loop-fp32"], rel=0.02)
    assert losses["nemo"] == pytest.approx(losses["nemo-fp32"], rel=0.02)


def test_a_command_exchanges_objects_with_its_child_processes(
    tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "speed.json"
    real_execute(
        [
            *(sys.executable, "-m", "benchmarks.distill", "--only", "loop-fp32", "--rounds=1"),
            *(f"--run-dir={tiny_run}", f"--out={out}", "--steps=2"),
            *("--micro-batch=1", f"--seq-length={SEQ_LENGTH}"),
        ]
    )
    content: dict[str, Any] = json.loads(out.read_text())
    assert not content["failed"]
    assert len(content["records"]["loop-fp32"][0]["losses"]) == 2


def test_warm_up_steps_do_not_count() -> None:
    shape = Shape(steps=4, micro_batch=1, seq_length=100)
    record = TrainingRun(
        ends=[50.0, 60.0, 61.0, 63.0], losses=[4.0, 3.0, 2.0, 1.0], peak_rss_bytes=7
    )
    slower = TrainingRun(ends=[0.0, 9.0, 11.0, 15.0], losses=[4.0, 3.0, 2.0, 1.2], peak_rss_bytes=5)
    assert speeds(record, shape) == [100.0, 50.0]
    assert speeds(TrainingRun([50.0, 60.0]), Shape(2, 1, 100)) == [10.0]
    results = summarise({"loop-fp32": [record, slower], "loop-bf16": [slower]}, shape)
    # Speeds of steps are 100 and 50 in one round, 50 and 25 in the other: medians 75 and 37.5.
    fp32 = results["loop-fp32"]
    assert (fp32.slowest, fp32.tokens_per_second, fp32.fastest) == (25.0, 56.25, 100.0)
    assert fp32.peak_rss_bytes == 7
    assert results["loop-bf16"].ratios == {"loop-fp32": 37.5 / 56.25, "loop-bf16": 1.0}


def test_different_losses_on_the_same_batches_are_reported() -> None:
    shape, ends = Shape(4, 1, 100), [1.0, 2.0, 3.0, 4.0]
    runs = {"loop-fp32": [TrainingRun(ends, [4.0])], "loop-bf16": [TrainingRun(ends, [4.2])]}
    [message] = disagreements(summarise(runs, shape))
    assert message.startswith("loop-bf16: ")
    runs["loop-bf16"] = [TrainingRun(ends, [4.05])]
    assert not list(disagreements(summarise(runs, shape)))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (distill, ["--only", "loop-fp23"], "Did you mean 'loop-fp32'?"),
        (distill, ["--steps=1"], "--steps to at least 2"),
        (distill, ["--run-dir=nowhere"], "import_hf is not complete"),
        (students, ["--variant", "lm_weight=0"], "invalid --variant 'lm_weight=0'"),
        (
            students,
            ["--variant", "cached teacher=cached"],
            "invalid --variant 'cached teacher=cached'",
        ),
    ],
)
def test_invalid_options_are_refused(module: ModuleType, options: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        run_benchmark(module, *options)


def test_students_of_several_sources_need_weights(tmp_path: Path) -> None:
    tokens = {"train": [SourceTokens("a", 1), SourceTokens("b", 2)]}
    text = DatasetResult({}, {}, [], tokens, document_end=0)
    write_manifest(tmp_path, bare_manifest("prepare_data", "dataset", text))
    with pytest.raises(RecipeError, match=r"weights=\{a: 1, b: 1\}"):
        students.require_weights(students.Variant("recipe", []), tmp_path)
    students.require_weights(students.Variant("even", ["+stages.distill.weights={}"]), tmp_path)


def test_students_are_trained_with_other_losses_and_data(
    tiny_run: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "students"
    options = [f"--run-dir={tiny_run}", f"--out={out}", "--steps=2", "--seeds", "3", "1234"]
    half = tmp_path / f"half{text_file.suffix}"
    half.write_text("".join(text_file.read_text().splitlines(keepends=True)[::2]))
    own_text = f"own_text data.sources=[{half}] data.heldout_sources=[] data.text_field=text"
    variants = ["recipe", "kl stages.distill.lm_weight=0", own_text]
    for variant in variants:
        options += ["--variant", f"{variant} stages.evaluate.num_sequences=4"]
    output = run_benchmark(students, *options)
    manifest = out / "recipe-1234" / "evaluate" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert run_benchmark(students, *options) == output
    assert manifest.stat().st_mtime_ns == before  # complete runs are not repeated
    results = json.loads((out / "students.json").read_text())
    assert [(result["variant"], result["seed"]) for result in results] == [
        (name, seed) for seed in (3, 1234) for name in ("recipe", "kl", "own_text")
    ]
    kls = {
        (r["variant"], r["seed"]): r["evaluation"]["distilled"]["kl_to_teacher"] for r in results
    }
    assert len(set(kls.values())) == len(kls)
    first, second = (kls["kl", seed] for seed in (3, 1234))
    mean, deviation = (first + second) / 2, abs(first - second) / math.sqrt(2)
    assert f"{mean:.3f} ± {deviation:.3f}" in output
    data = {
        name: complete_manifest(out / f"{name}-3" / "distill").inputs["data"]
        for name in ("kl", "own_text")
    }
    shared_text = complete_manifest(tiny_run / "prepare_data").fingerprint
    assert data["kl"] == shared_text
    assert data["own_text"] != shared_text
    own_text_inputs = complete_manifest(out / "own_text-3" / "prepare_data").inputs
    assert own_text_inputs["held_out"] == shared_text, "it could train on the evaluated text"


def test_operations_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake timer returns the number of its call, times ``repeats``, instead of milliseconds."""
    calls = count(1)

    def count_calls(run: Callable[[], object], repeats: int) -> float:
        run()
        return next(calls) * repeats / 1000

    monkeypatch.setattr(operations, "best_seconds", count_calls)
    monkeypatch.setattr(operations, "missing_compiler", lambda: ("g++", "not in a test"))
    cases = operations.cases(operations.Sizes(2, 8, 4, 2, 8, 16, 32))
    assert {"attention", "norm"} < cases.keys()
    for number, (function, inputs) in enumerate(cases.values()):
        times = operations.measure(function, inputs, 3)
        assert times == operations.Times(6 * number + 3, 6 * number + 6, None)


def test_tasks_are_compared_with_lm_eval(odd_llama: Path) -> None:
    options = ("--tasks", "piqa", "mmlu", "--limit=2", "--parts=1", f"--model={odd_llama}")
    lines = run_benchmark(tasks, *options).splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    for task, side in product(("piqa", "mmlu"), ("lm-eval, float32", "packed, float32")):
        [row] = (row for row in rows if (row[0], row[2]) == (task, side))
        _, items, _, seconds, _, _, equal, difference = row
        assert (items, equal) == ("2", "2")
        assert float(seconds) > 0
        assert float(difference) < 1e-3


def test_preparation_is_measured(
    odd_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "write_text", lambda path, size: shutil.copy(text_file, path))
    output = run_benchmark(prepare, f"--model={odd_llama}", "--processes", "1", "2")
    rows = [line.split(" | ") for line in output.splitlines()[2:]]
    assert [row[1] for row in rows] == ["1", "2"] * len(prepare.SIZE_FACTORS)
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)


def test_conversion_is_compared_with_transformers(
    odd_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second repeat, the baseline runs last."""
    order: list[str] = []

    def run(_: str, side: str, folder: Path, scratch: Path, cold: bool) -> dict[str, float]:
        order.append(side)
        return convert.measure_side(side, folder, scratch, cold)

    monkeypatch.setattr(convert, "call_in_process", run)
    first, *others = convert.SIDES
    text = convert.table(convert.run_sides(odd_llama, 2), size=1_000_000)
    assert order == [first, *others, *others, first]
    assert "checkpoint: 1 MB" in text
    assert [line.split()[0] for line in text.splitlines()[2:]] == list(convert.SIDES)
    assert f"{1:.2f}" in text.splitlines()[2]  # the baseline, relative to itself


def test_weights_survive_a_cold_round_trip(odd_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    convert.write_random_model(folder, odd_llama, shape)
    for side in convert.COLD_SIDES:
        convert.flush(folder, drop_cache=True)
        convert.prepare_side(side, folder, tmp_path)()
    copied, back = tmp_path / "copy", tmp_path / "back"
    assert load_file(copied / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    convert.require_same_weights(folder, back)
    weights = load_file(back / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, back / "model.safetensors")
    with pytest.raises(RecipeError, match=r"model.norm.weight differs"):
        convert.require_same_weights(folder, back)


def test_the_peak_of_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work allocates 64 MB and frees them."""
    samples: list[dict[str, int]] = []
    sample = convert.memory
    monkeypatch.setattr(convert, "memory", lambda: samples.append(sample()) or samples[-1])

    def work() -> None:
        # mmap, since malloc would reuse memory that earlier tests freed.
        memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for start in range(0, len(memory), mmap.PAGESIZE):
            memory[start] = 1
        before, deadline = len(samples), time.monotonic() + 60
        while len(samples) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        memory.close()

    assert 60 << 20 < convert.run_and_measure(work)["anonymous"] < 200 << 20
