"""The speed benchmark, from its command line, on a tiny model."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import count, product
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import all as history
from benchmarks import (
    contenders,
    distill,
    judge,
    layers,
    local,
    loops,
    operations,
    optimizers,
    prepare,
    recovery,
    shapes,
    students,
    tasks,
)
from benchmarks.contenders import CONTENDERS, INPUTS, Record, Shape, manifest_of
from benchmarks.distill import disagreements, speeds, step_flops, summarise
from launch.executors.local import PRELOADED
from nemo_convert.architecture import Architecture
from nemo_convert.nemo import find_checkpoint
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import ARTIFACT
from recipes.core.one_pass import missing_compiler
from recipes.core.processes import cores
from recipes.evaluation.results import EvaluationResult, TextQuality
from recipes.evaluation.text_quality import load_transformers
from recipes.planning.hardware import Hardware
from tests.support.forked import run_forked
from tests.support.in_process import run_here
from tests.support.runs import tiny

STEPS, MICRO_BATCH, SEQ_LENGTH = 3, 4, 64


def benchmark_here(module: ModuleType, *options: str) -> str:
    """Output of a benchmark's command line; launcher and judge run in this process."""
    output = io.StringIO()
    with (
        starts_here(),
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", [module.__name__, *options]),
        contextlib.redirect_stdout(output),
    ):
        os.environ.pop("COLUMNS", None)  # as wide as it needs
        module.main()
    return output.getvalue()


@contextlib.contextmanager
def starts_here() -> Iterator[None]:
    """What benchmarks start that is not measured runs in this process, all else but one forked."""
    start = contenders.execute

    def execute(command: list[str]) -> None:
        if tuple(command[: len(contenders.LAUNCHER)]) == contenders.LAUNCHER:
            done = run_here(*command[len(contenders.LAUNCHER) :], cwd=REPO_ROOT)
            assert done.code == 0, done.output
        elif command[1:3] == ["-m", "benchmarks.judge"]:
            with mock.patch.object(sys, "argv", command[2:]):
                judge.main()
        elif "loop-fp32" in command:
            start(command)
        else:
            # What the tests before may have left in this process would make it one of its ranks.
            names = os.environ.keys() - {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"}
            alone = {name: os.environ[name] for name in names}
            done = run_forked(PRELOADED, command[1:], alone, REPO_ROOT)
            assert done.returncode == 0, done.stderr

    with contextlib.ExitStack() as patches:
        for module in (contenders, shapes, students, tasks):
            patches.enter_context(mock.patch.object(module, "execute", execute))
        yield


@pytest.fixture(scope="module")
def tiny_run(even_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, student and text, as the launcher makes them."""
    run_dir = tmp_path_factory.mktemp("benchmarks") / "run"
    result = run_here(
        "recipe=llama_depth_prune",
        *tiny(even_llama, text_file, run_dir, SEQ_LENGTH),
        f"stages.only=[{','.join(INPUTS)}]",
        "stages.prune.target_num_layers=2",
        cwd=run_dir.parent,
    )
    assert result.code == 0, result.output
    return run_dir


def test_every_contender_is_measured(tiny_run: Path, tmp_path: Path) -> None:
    both = "nemo-cached-compiled"  # whose halves are measured each by itself
    compiled = {both} if missing_compiler() is None else {both, "nemo-compiled"}
    names = [name for name in CONTENDERS if name not in compiled]
    out = tmp_path / "speed.json"
    output = benchmark_here(
        distill,
        *("--run-dir", str(tiny_run), "--out", str(out), "--only", *names, "--rounds=1"),
        *(f"--steps={STEPS}", f"--micro-batch={MICRO_BATCH}", f"--seq-length={SEQ_LENGTH}"),
    )
    found: dict[str, Any] = json.loads(out.read_text())
    assert not found["failed"]
    assert list(found["results"]) == names
    for name, result in found["results"].items():
        (record,) = found["records"][name]
        assert len(record["ends"]) == len(record["losses"]) == STEPS
        assert result["slowest"] <= result["tokens_per_second"] <= result["fastest"]
        assert result["slowest"] > 0
        assert all(math.isfinite(loss) and loss > 0 for loss in record["losses"])
        assert result["peak_rss_bytes"] > 1e8
        for baseline in ("loop-fp32", "loop-bf16"):
            speed = found["results"][baseline]["tokens_per_second"]
            assert result["ratios"][baseline] == pytest.approx(result["tokens_per_second"] / speed)
        assert result["utilisation"] == pytest.approx(
            result["tokens_per_second"] / result["most_tokens_per_second"]
        )
        assert (result["planned_tokens_per_second"] is None) == (not CONTENDERS[name].stages)
        assert name in output
    losses = {name: result["first_loss"] for name, result in found["results"].items()}
    for name in ("loop-bf16", "chunked-bf16", "modelopt-bf16"):
        assert losses[name] == pytest.approx(losses["loop-fp32"], rel=0.02)
    for name in {"nemo", "nemo-compiled"}.intersection(names):
        assert losses[name] == pytest.approx(losses["nemo-fp32"], rel=0.02)


def test_operations_between_products_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each forward, then with its way back; the clock here counts what it is asked for."""
    asked = count(1)

    def timed(run: Callable[[], object], repeats: int) -> float:
        run()
        return next(asked) * repeats / 1000

    monkeypatch.setattr(operations, "best_seconds", timed)
    monkeypatch.setattr(operations, "missing_compiler", lambda: ("g++", "not in a test"))
    cases = operations.cases(operations.Sizes(2, 8, 4, 2, 8, 16, 32))
    assert {"attention", "norm", "rotation"} < cases.keys()
    for number, (function, inputs) in enumerate(cases.values()):
        times = operations.measure(function, inputs, 3)
        assert times == operations.Times(6 * number + 3, 6 * number + 6, None)


def test_teachers_are_timed_and_held_against_float32(tiny_run: Path) -> None:
    output = benchmark_here(operations, "--teacher", str(tiny_run), "--repeats=1", "--tokens=64")
    rows = {cells[0]: cells for line in output.splitlines() if (cells := line.split())}
    assert {"float32", "bfloat16", "int8"} < rows.keys()
    assert float(rows["float32"][-1]) == 0 < float(rows["bfloat16"][-1]) < 0.01


def heldout(student: dict[str, Any]) -> dict[str, float]:
    """Figures on the one kind of text that there is."""
    (only,) = student["distilled"]["heldout"]["sources"].values()
    return dict(only)


def test_ways_to_recover_are_compared(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that is corrected costs time, so it gets fewer steps at equal time.

    Here half of them: every training is said to take as long, since a few steps of a tiny model
    take as long as the machine has others to do.
    """
    measured = recovery.training_seconds
    monkeypatch.setattr(recovery, "training_seconds", lambda stage: 4.0 * (measured(stage) > 0))
    arms = ("forward_kl", "corrected")
    out = tmp_path / "recovery"
    options = ("--run-dir", str(tiny_run), "--out", str(out), "--students=given", "--steps=4")
    options = (*options, "--seeds", "3", "7", "--windows=4", "--equal-time", "--only", *arms)
    output = benchmark_here(recovery, *options)
    judged = next((out / "given").glob("forward_kl-7/distill-judged.json"))
    before = judged.stat().st_mtime_ns
    benchmark_here(recovery, *options)  # nothing is left to do
    assert judged.stat().st_mtime_ns == before
    found = json.loads((out / "recovery.json").read_text())
    by = {(one["budget"], one["arm"]): one for one in found}
    assert list(by) == [(b, arm) for b in ("equal tokens", "equal time") for arm in arms]
    for one in found:
        assert heldout(one)["loss"] == pytest.approx(math.log(heldout(one)["perplexity"]))
        assert one["distilled"] != one["pruned"]
        assert one["training_seconds"] > 0
    assert by["equal tokens", "corrected"]["steps"] == 4
    assert by["equal time", "corrected"]["steps"] == 2
    assert by["equal tokens", "corrected"]["prepare_seconds"] > 0
    page = (out / "recovery.html").read_text()
    assert page.count("<svg") == 4
    kls = [heldout(one)["kl_to_teacher"] for one in found if one["arm"] == "corrected"][:2]
    assert f"{sum(kls) / 2:.3f}" in page
    assert f"{sum(kls) / 2:.3f} ± {abs(kls[0] - kls[1]) / math.sqrt(2):.3f}" in output


def test_what_is_healed_first_is_beside_what_was_cut(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "recovery"
    options = ("--run-dir", str(tiny_run), "--out", str(out), "--students=given_healed")
    budget = ("--steps=2", "--seeds", "3", "--windows=4", "--only", "forward_kl")
    output = benchmark_here(recovery, *options, *budget)
    [found] = json.loads((out / "recovery.json").read_text())
    assert found["healed"] != found["pruned"] != found["distilled"]
    healed = manifest_of(out / "given_healed" / "heal")
    trained = manifest_of(out / "given_healed" / "forward_kl-3" / "distill")
    assert trained.inputs["student"] == healed.fingerprint
    assert "given_healed, not trained: perplexity" in output


def test_a_judgement_is_what_evaluate_finds(tiny_run: Path, tmp_path: Path) -> None:
    """The same windows and masks: a stage's figures and a judgement's are one."""
    run_dir = tmp_path / "run"
    given = {
        "teacher": "import_hf",
        "pruned": "prune",
        "distilled": "prune",
        "data": "prepare_data",
    }
    inputs = {f"evaluate.inputs.{role}": tiny_run / stage for role, stage in given.items()}
    with starts_here():
        contenders.launch(
            *(
                tiny_run,
                run_dir,
                ("evaluate",),
                inputs | {"evaluate.num_windows": 4},
            ),
            f"data.seq_length={SEQ_LENGTH}",
        )
        found = students.judge(tiny_run, [tiny_run / "prune"], 4)[tiny_run / "prune"].heldout
    expected = manifest_of(run_dir / "evaluate").result(EvaluationResult).pruned
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.kl == pytest.approx(expected.kl_to_teacher, rel=1e-5)


def test_ways_to_choose_layers_are_compared(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "layers"
    options = ("--layers=3", "--methods=loss", "--steps=2", "--loss-windows=2", "--windows=4")
    output = benchmark_here(
        layers,
        *("--run-dir", str(tiny_run), "--out", str(out), "--greedy-layers=1", "--seeds=7"),
        *options,
    )
    (found,) = json.loads((out / "layers.json").read_text())
    assert (found["method"], found["layers"], len(found["dropped"])) == ("loss", 3, 1)
    assert found["tokens"] == 2 * 4 * 256
    assert found["distilled"] != found["pruned"]
    assert f"{heldout(found)['kl_to_teacher']:.3f}" in output


def test_layers_beside_a_hole_are_taught_alone(tiny_run: Path, tmp_path: Path) -> None:
    output = benchmark_here(
        local,
        *("--run-dir", str(tiny_run), "--out", str(tmp_path / "local"), "--layers=2"),
        *("--local-steps=4", "--steps=4", "--windows=4", "--seeds=7"),
    )
    found = json.loads((tmp_path / "local" / "local.json").read_text())
    assert [(one["way"], one["steps"]) for one in found] == [
        *(("as cut", 4), ("taught", 4), ("taught", 2)),
    ]
    cut, taught, less = found
    assert cut["pruned"] != taught["pruned"] == less["pruned"]
    assert taught["distilled"] != less["distilled"]
    assert f"{heldout(cut)['kl_to_teacher']:.3f}" in output


def test_optimizers_are_compared(tiny_run: Path, tmp_path: Path) -> None:
    ways = ("AdamW, cosine to a tenth", "Muon")
    output = benchmark_here(
        optimizers,
        *("--run-dir", str(tiny_run), "--out", str(tmp_path / "ways"), "--steps=4"),
        *("--windows=4", "--float32", "--only", *ways),
    )
    found = json.loads((tmp_path / "ways" / "optimizers.json").read_text())
    assert [one["way"] for one in found] == list(ways)
    adam, muon = (heldout({"distilled": one["found"]})["kl_to_teacher"] for one in found)
    assert adam != muon
    assert f"{adam:.3f}" in output
    assert f"{muon:.3f}" in output


def test_averaged_weights_are_those_of_the_last_steps(tiny_run: Path) -> None:
    start = loops.load(tiny_run, (4, 1, SEQ_LENGTH), bfloat16=False)

    def after(steps: int, averaged: float = 0) -> list[torch.Tensor]:
        task = replace(start, student=deepcopy(start.student), batches=start.batches[:steps])
        optimizers.train(task, optimizers.Way(end=1, averaged=averaged))
        return list(task.student.parameters())

    expected = [(third + last) / 2 for third, last in zip(after(3), after(4), strict=True)]
    torch.testing.assert_close(after(4, averaged=0.5), expected)


def test_kept_layers_are_those_of_the_teacher(tiny_run: Path) -> None:
    stages = (tiny_run / name for name in ("import_hf", "prune"))
    whole, cut = (
        [layer.mlp.up_proj.weight for layer in load_transformers(checkpoint).model.layers]
        for checkpoint in (find_checkpoint(stage / ARTIFACT) for stage in stages)
    )
    kept = local.kept_of(tiny_run / "prune")
    assert len(kept) == len(cut) < len(whole)
    assert all(torch.equal(whole[number], weight) for number, weight in zip(kept, cut, strict=True))


def test_nothing_is_to_be_learnt_for_layers_that_do_nothing(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layer before a hole reads what it read, and is to give what came out behind the hole."""
    teacher = load_transformers(find_checkpoint(tiny_run / "import_hf" / ARTIFACT))
    student = deepcopy(teacher)
    with torch.no_grad():
        for layer in teacher.model.layers[1:3]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    del student.model.layers[1:3]
    kept = [0, *range(3, len(teacher.model.layers))]
    local.teach(teacher, student, kept, torch.arange(24).view(1, 2, 12))
    assert capsys.readouterr().out == "1 of 1: 0.0000\n"


def test_shapes_are_compared(even_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """The search's own run is in it; one candidate wins without training."""
    out = tmp_path / "shapes"
    space = "stages.enumerate_shapes.space"
    output = benchmark_here(
        shapes,
        *("--out", str(out), "--steps=2", "--lr", "1e-3", "--windows=4", "--ranked=1", "--"),
        *(f"model.hf_path={even_llama}", f"data.sources=[{text_file}]", "data.text_field=text"),
        "data.heldout_sources=[]",
        *(f"data.seq_length={SEQ_LENGTH}", "stages.successive_halving.num_candidates=1"),
        "stages.enumerate_shapes.budget.parameters=0.85",  # a layer of four is a fifth
        *(f"{space}.hidden_size_divisor=8", f"{space}.ffn_hidden_size_divisor=8"),
        *("stages.score.num_calibration_samples=8", "stages.score.num_loss_samples=2"),
    )
    outcomes = json.loads((out / "shapes.json").read_text())
    assert [outcome["way"] for outcome in outcomes] == ["found", "depth alone", "width alone"]
    whole = manifest_of(out / "search" / "import_hf").architecture or {}
    for outcome in outcomes:
        run = out / f"{outcome['shape']}-lr0.001-1234"
        student = manifest_of(run / "distill").architecture or {}
        same_width = student["hidden_size"] == whole["hidden_size"]
        assert (outcome["way"] == "depth alone") <= same_width
        assert (outcome["way"] == "width alone") <= (student["num_layers"] == whole["num_layers"])
        assert outcome["parameters"] == manifest_of(run / "distill").parameters
        assert outcome["distilled"] != outcome["pruned"] != outcome["healed"]
        assert f"{heldout(outcome)['kl_to_teacher']:.3f}" in output
    assert "foretold" in output


def test_the_order_of_the_trained_is_foretold_or_not() -> None:
    """As cut they are in the order of the trained; healed the first two change places."""

    def kl(value: float) -> students.Judgement:
        text = TextQuality(0.0, 0.0, 1.0, value, 1.0)
        return students.Judgement(students.Quality({"a": text}), students.Quality({"a": text}))

    found = [
        shapes.Outcome(
            way="ranked", shape="s", parameters=1, lr=1e-3, seed=1, tokens=1,
            pruned=kl(cut), healed=kl(healed), distilled=kl(trained),
        )
        for cut, healed, trained in ((1.0, 0.9, 0.5), (2.0, 0.8, 0.6), (3.0, 1.1, 0.7))
    ]  # fmt: skip
    cells = [list(column.cells) for column in shapes.foretold(found).columns]
    assert cells[2:] == [["3"], ["1.00"], ["0.50"]]


def test_bad_options_get_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        (["--only", "loop-fp23"], "Did you mean 'loop-fp32'?"),
        (["--steps=1"], "at least 2 steps"),
        (["--run-dir", str(tmp_path)], "import_hf is not complete"),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmarks.distill", *options])
        with pytest.raises(SystemExit, match=re.escape(message)):
            runpy.run_module("benchmarks.distill", run_name="__main__")


ARCH = Architecture(
    hf_architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=4,
    vocab_size=32,
    max_position_embeddings=64,
    tied_embeddings=True,
)


def test_flops_are_those_of_the_products() -> None:
    """By hand: 2 FLOPs per weight, and 2 × 2 per key and head dimension, half of them masked."""
    weights = 2 * (2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 32 * 8)
    scores = 2 * (2 * 2 * 2 * 4 * 16 // 2)
    cached = step_flops(ARCH, None, seq_length=16)
    assert (cached.weights, cached.attention) == (3 * weights, 3 * scores)
    live = step_flops(ARCH, ARCH, seq_length=16)
    assert (live.weights, live.attention) == (4 * weights, 4 * scores)


def test_warm_up_does_not_count() -> None:
    shape = Shape(steps=4, micro_batch=1, seq_length=100)
    record = Record(ends=[50.0, 60.0, 61.0, 63.0], losses=[4.0, 3.0, 2.0, 1.0], peak_rss_bytes=7)
    assert speeds(record, shape) == [100.0, 50.0]
    assert speeds(Record([50.0, 60.0]), Shape(2, 1, 100)) == [10.0]

    slower = Record(ends=[0.0, 9.0, 11.0, 15.0], losses=[4.0, 3.0, 2.0, 1.2], peak_rss_bytes=5)
    models = {"teacher": ARCH, "student": ARCH}
    results = summarise(
        {"loop-fp32": [record, slower], "loop-bf16": [slower]},
        shape,
        models,
        {"float32": 1e9, "bfloat16": 2e9},
        Hardware(),
    )
    fp32 = results["loop-fp32"]
    assert fp32.tokens_per_second == 56.25
    assert (fp32.slowest, fp32.fastest, fp32.peak_rss_bytes) == (25.0, 100.0, 7)
    assert fp32.utilisation == pytest.approx(
        56.25 * (fp32.flops.weights + fp32.flops.attention) / 1e9
    )
    assert results["loop-bf16"].ratios == {"loop-fp32": 37.5 / 56.25, "loop-bf16": 1.0}
    assert list(disagreements(results)) == []
    results = summarise(
        {"loop-fp32": [record], "loop-bf16": [Record(slower.ends, [4.2, 3.0, 2.0, 1.0])]},
        shape,
        models,
        {"float32": 1e9, "bfloat16": 2e9},
        Hardware(),
    )
    assert list(disagreements(results)) == ["loop-bf16: first loss 4.2000, but loop-fp32 4.0000"]


def test_benchmarks_are_timed_beside_lm_eval(odd_llama: Path) -> None:
    asked = ("--tasks", "piqa", "mmlu", "--limit=2", "--parts=1", f"--model={odd_llama}")
    lines = benchmark_here(tasks, *asked).splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    for task, side in product(("piqa", "mmlu"), ("lm-eval, float32", "packed, float32")):
        [(_, items, _, seconds, _, _, equal, apart)] = (r for r in rows if r[:3:2] == [task, side])
        assert (items, equal) == ("2", "2")
        assert float(seconds) > 0
        assert float(apart) < 1e-3


def test_what_got_worse_is_said(
    odd_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preparing text in this process; the second time as if it had been faster before."""

    def measure(text: Path, model: Path, processes: int) -> prepare.Measurement:
        return prepare.prepare_once(text, model, processes, Path(tempfile.mkdtemp(dir=tmp_path)))

    monkeypatch.setattr(prepare, "measure", measure)
    monkeypatch.setattr(prepare, "write_text", lambda path, size: shutil.copy(text_file, path))
    kept = tmp_path / "history.jsonl"
    options = ("--only", "prepare", f"--model={odd_llama}", f"--history={kept}")
    assert "prepare" in benchmark_here(history, *options)
    [entry] = history.read_history(kept)
    assert (entry.figure, entry.repeats, entry.cores) == ("prepare", history.REPEATS, cores())
    assert entry.seconds > 0
    assert entry.ratio > 1  # what it does beside tokenizing takes time, too
    for before, outcome in (
        (replace(entry, ratio=0.1, spread=0.1), pytest.raises(SystemExit, match="1 of them")),
        (replace(entry, ratio=0.1, spread=99.0), contextlib.nullcontext()),
        (replace(entry, ratio=0.1, processor="another"), contextlib.nullcontext()),
    ):
        kept.write_text(json.dumps(asdict(before)) + "\n")
        with outcome:
            benchmark_here(history, *options)
        assert len(history.read_history(kept)) == 2
