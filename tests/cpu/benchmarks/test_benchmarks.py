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

from benchmarks import average, convert, distill, launching, operations, prepare, students, tasks
from benchmarks.distill import METHODS, Shape, TrainingRun, disagreements, speeds, summarise
from benchmarks.launching import INPUT_STAGES, complete_manifest
from launch.executors.local import PRELOADED
from nemo_convert import nemo
from nemo_convert.convert import hf_weights, to_nemo
from recipes.core.compiled import missing_compiler
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import ARTIFACT, check_artifact, write_manifest
from recipes.data.results import DatasetResult, SourceTokens
from recipes.pruning.pruned_checkpoint import save_weights
from tests.support.forked import run_forked
from tests.support.in_process import run_successfully
from tests.support.manifests import bare_manifest
from tests.support.runs import tiny

STEPS, MICRO_BATCH, SEQ_LENGTH = 3, 4, 64
"""Size of a measured training run: optimizer steps, sequences per step, tokens per sequence."""


def run_benchmark(module: ModuleType, *options: str) -> str:
    """Runs a benchmark's command line and the launcher in this process; returns the output."""
    output = io.StringIO()
    with (
        mock.patch.object(launching, "execute", execute_faster),
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", [module.__name__, *options]),
        contextlib.redirect_stdout(output),
    ):
        os.environ.pop("COLUMNS", None)  # else a table could be too narrow for its contents
        module.main()
    return output.getvalue()


def execute_faster(command: list[str]) -> None:
    """Replaces ``launching.execute``.

    Runs the launcher in this process, and any other command in a fork of a process that has already
    imported its libraries.
    """
    if tuple(command[: len(launching.LAUNCHER)]) == launching.LAUNCHER:
        run_successfully(*command[len(launching.LAUNCHER) :], cwd=REPO_ROOT)
    else:
        # With these variables of earlier tests, the child would act as a rank of a process group.
        names = os.environ.keys() - {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"}
        child = run_forked(PRELOADED, command[1:], {n: os.environ[n] for n in names}, REPO_ROOT)
        assert child.returncode == 0, child.stderr


@pytest.fixture(scope="module")
def tiny_run(even_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with teacher (of the shape ``EVEN``), student (2 of 4 layers) and text."""
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
        assert result["peak_rss_bytes"] > 1e8  # PyTorch alone takes more
        planned = result["planned_tokens_per_second"]
        if METHODS[name].stages:
            assert planned > 0
        else:  # a baseline, which the launcher does not plan
            assert planned is None
        assert name in output
    # Each assert compares two methods that train on the same batches, with different precisions.
    losses = {name: result["first_loss"] for name, result in content["results"].items()}
    assert losses["modelopt-bf16"] == pytest.approx(losses["loop-fp32"], rel=0.02)
    assert losses["nemo"] == pytest.approx(losses["nemo-fp32"], rel=0.02)


def test_the_command_works_with_child_processes(tiny_run: Path, tmp_path: Path) -> None:
    """Runs the command as a user does. Other tests replace ``launching.execute``."""
    out = tmp_path / "speed.json"
    launching.execute(
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
    """The first two steps are warm-up steps. If there are only two, only the first one is."""
    shape = Shape(steps=4, micro_batch=1, seq_length=100)  # 100 tokens per step
    # Steps 3 and 4 take 1 and 2 seconds here, and 2 and 4 seconds in ``slower``.
    run = TrainingRun(ends=[50.0, 60.0, 61.0, 63.0], losses=[4.0, 3.0, 2.0, 1.0], peak_rss_bytes=7)
    slower = TrainingRun(ends=[0.0, 9.0, 11.0, 15.0], losses=[4.0, 3.0, 2.0, 1.2], peak_rss_bytes=5)
    assert speeds(run, shape) == [100.0, 50.0]
    two_steps = TrainingRun(ends=[50.0, 60.0])
    assert speeds(two_steps, Shape(steps=2, micro_batch=1, seq_length=100)) == [10.0]
    results = summarise({"loop-fp32": [run, slower], "loop-bf16": [slower]}, shape)
    # The median speeds of the two rounds are 75 and 37.5. Their median is 56.25.
    fp32 = results["loop-fp32"]
    assert (fp32.slowest, fp32.tokens_per_second, fp32.fastest) == (25.0, 56.25, 100.0)
    assert fp32.peak_rss_bytes == 7
    assert results["loop-bf16"].ratios == {"loop-fp32": 37.5 / 56.25, "loop-bf16": 1.0}


def test_different_losses_on_the_same_batches_are_reported() -> None:
    """Losses that differ by up to 2% are accepted: 4.05 instead of 4.0, but not 4.2."""
    shape, ends = Shape(steps=4, micro_batch=1, seq_length=100), [1.0, 2.0, 3.0, 4.0]
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
        # A variant without a name.
        (students, ["--variant", "lm_weight=0"], "invalid --variant 'lm_weight=0'"),
        # All variants use the live teacher.
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


def test_text_of_several_sources_needs_weights_of_the_sources(tmp_path: Path) -> None:
    """The run has text of two sources, ``a`` and ``b``. Empty weights are accepted."""
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
    half_text = tmp_path / f"half{text_file.suffix}"  # every second document
    half_text.write_text("".join(text_file.read_text().splitlines(keepends=True)[::2]))
    own_text = f"own_text data.sources=[{half_text}] data.heldout_sources=[] data.text_field=text"
    for variant in ("kl stages.distill.lm_weight=0", own_text):
        options += ["--variant", f"{variant} stages.evaluate.num_sequences=4"]
    output = run_benchmark(students, *options)
    manifest = out / "kl-1234" / "evaluate" / "manifest.json"
    first_mtime = manifest.stat().st_mtime_ns
    assert run_benchmark(students, *options) == output
    assert manifest.stat().st_mtime_ns == first_mtime  # complete runs are not repeated
    kls = {
        (r["variant"], r["seed"]): r["evaluation"]["distilled"]["kl_to_teacher"]
        for r in json.loads((out / "students.json").read_text())
    }
    assert list(kls) == [(name, seed) for seed in (3, 1234) for name in ("kl", "own_text")]
    assert len(set(kls.values())) == len(kls)  # every run gave another student
    first, second = (kls["kl", seed] for seed in (3, 1234))
    # Mean and sample standard deviation of two values.
    mean, deviation = (first + second) / 2, abs(first - second) / math.sqrt(2)
    assert f"{mean:.3f} ± {deviation:.3f}" in output
    kl, own = (complete_manifest(out / f"{name}-3" / "distill") for name in ("kl", "own_text"))
    assert kl.config["lm_weight"] == 0 < own.config["lm_weight"]
    # Fingerprints of the text on which each variant was trained.
    shared_text = complete_manifest(tiny_run / "prepare_data").fingerprint
    assert kl.inputs["data"] == shared_text
    assert own.inputs["data"] != shared_text
    own_text_inputs = complete_manifest(out / "own_text-3" / "prepare_data").inputs
    assert own_text_inputs["held_out"] == shared_text, "own_text may have evaluated documents"


def test_operations_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call n of the fake timer returns n * ``repeats`` milliseconds."""
    call_numbers = count(1)

    def fake_best_seconds(run: Callable[[], object], repeats: int) -> float:
        run()
        return next(call_numbers) * repeats / 1000

    monkeypatch.setattr(operations, "best_seconds", fake_best_seconds)
    monkeypatch.setattr(operations, "missing_compiler", lambda: ("g++", "not in a test"))
    sizes = operations.Sizes(
        sequences=2, tokens=8, heads=4, groups=2, head_size=8, ffn=16, vocabulary=32
    )
    cases = operations.cases(sizes)
    assert {"attention", "norm"} < cases.keys()
    for number, (function, shapes) in enumerate(cases.values()):
        times = operations.measure(function, shapes, repeats=3)
        # Without a compiler, calls 1, 3, ... time the forward pass alone, and calls 2, 4, ... time
        # forward and backward pass.
        forward_call = 2 * number + 1
        assert times == operations.Times(3 * forward_call, 3 * (forward_call + 1), compiled=None)


def test_tasks_are_compared_with_lm_eval(odd_llama: Path) -> None:
    options = ("--tasks", "piqa", "mmlu", "--limit=2", "--parts=1", f"--model={odd_llama}")
    lines = run_benchmark(tasks, *options).splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    for task, side in product(("piqa", "mmlu"), ("lm-eval, float32", "packed, float32")):
        [row] = (row for row in rows if (row[0], row[2]) == (task, side))
        # ``equal`` counts items with the baseline's score. ``difference`` is of log-likelihoods.
        _, items, _, seconds, _, _, equal, difference = row
        assert (items, equal) == ("2", "2")
        assert float(seconds) > 0
        assert float(difference) < 1e-3


def test_preparation_is_measured(
    odd_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This small file replaces the texts of all sizes.
    monkeypatch.setattr(prepare, "write_text", lambda path, size: shutil.copy(text_file, path))
    output = run_benchmark(prepare, f"--model={odd_llama}", "--processes", "1", "2")
    rows = [line.split(" | ") for line in output.splitlines()[2:]]  # after the two header lines
    assert [row[1] for row in rows] == ["1", "2"] * len(prepare.SIZE_FACTORS)
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)


def test_conversion_is_compared_with_transformers(
    odd_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compared programs run in this process. In the second repeat, the baseline runs last."""
    order: list[str] = []

    def call_here(_: str, side: str, folder: Path, scratch: Path, cold: bool) -> dict[str, float]:
        order.append(side)
        return convert.measure_side(side, folder, scratch, cold)

    monkeypatch.setattr(convert, "call_in_process", call_here)
    baseline, *others = convert.SIDES
    text = convert.table(convert.run_sides(odd_llama, repeats=2), size=1_000_000)
    assert order == [baseline, *others, *others, baseline]
    assert "checkpoint: 1 MB" in text
    rows = text.splitlines()[2:]  # after the size and the header
    assert [row.split()[0] for row in rows] == list(convert.SIDES)
    assert "1.00" in rows[0]  # the baseline's time, relative to itself


def test_weights_survive_a_conversion_to_nemo_and_back(odd_llama: Path, tmp_path: Path) -> None:
    """Runs the programs of ``--billions`` on a small model. Then one changed weight is an error."""
    folder = tmp_path / "model"
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    convert.write_random_model(folder, odd_llama, shape)
    for side in convert.COLD_SIDES:
        convert.flush(folder, drop_cache=True)
        convert.prepare_side(side, folder, tmp_path)()
    copied, back = tmp_path / "copy", tmp_path / "back"  # output of ``copy`` and ``to-hf``
    assert load_file(copied / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    convert.require_same_weights(folder, back)
    weights = load_file(back / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, back / "model.safetensors")
    with pytest.raises(RecipeError, match=r"model.norm.weight differs"):
        convert.require_same_weights(folder, back)


def test_the_mean_of_students_is_written_as_a_stage(odd_llama: Path, tmp_path: Path) -> None:
    """The student of step 1 has three times the final student's weights, so the mean has twice."""
    artifact = tmp_path / "distill" / ARTIFACT
    (artifact / nemo.STEPS).mkdir(parents=True)
    to_nemo(odd_llama, final := artifact / "model.nemo")
    weights = dict(hf_weights(final))
    tripled = {name: 3 * weight for name, weight in weights.items()}
    step = artifact / nemo.STEPS / "1.nemo"
    save_weights(final, nemo.architecture_of(final), tripled, step)
    write_manifest(tmp_path / "distill", bare_manifest("distill", "checkpoint_nemo", None))
    run_benchmark(average, str(tmp_path / "distill"), str(tmp_path / "mean"))
    check_artifact(tmp_path / "mean", rehash=True)
    mean = dict(hf_weights(tmp_path / "mean" / ARTIFACT / "model.nemo"))
    assert mean.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(mean[name], 2 * weight)


def test_the_peak_of_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work allocates 64 MiB, and frees them after at least one sample of the memory."""
    mib = 2**20
    samples: list[dict[str, int]] = []
    real_memory = convert.memory

    def record_sample() -> dict[str, int]:
        samples.append(real_memory())
        return samples[-1]

    monkeypatch.setattr(convert, "memory", record_sample)

    def work() -> None:
        # mmap, since malloc would reuse memory that earlier tests freed.
        memory = mmap.mmap(-1, 64 * mib, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for start in range(0, len(memory), mmap.PAGESIZE):
            memory[start] = 1  # a page takes memory once it is written
        # The first new sample may have started earlier, so this waits for two.
        previous_samples, deadline = len(samples), time.monotonic() + 60
        while len(samples) < previous_samples + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        memory.close()

    # Other threads may allocate or free some memory meanwhile.
    assert 60 * mib < convert.run_and_measure(work)["anonymous"] < 200 * mib
