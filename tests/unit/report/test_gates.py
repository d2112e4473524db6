"""Gates: syntax, names of metrics, comparison with results, and the launcher's exit status."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from recipes.core.errors import RecipeError
from recipes.core.manifest import MANIFEST, Manifest
from recipes.core.statistics import Difference
from recipes.engines.results import BASELINE, BenchmarkResults
from recipes.evaluation.results import Differences, EvaluationResult, Score, ServedResult
from recipes.report.gates import TASK_METRICS, TEXT_METRICS, Gate, Verdict, judge, parse_gate
from tests.support.manifests import bare_manifest
from tests.support.results import RESULTS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import Complete, Launch, MakePlan

# Results with round numbers, from which the values of the gates below are computed.
QUALITY: EvaluationResult = RESULTS["evaluate"]
EVALUATED = replace(
    QUALITY,
    teacher=replace(QUALITY.teacher, perplexity=10.0),
    distilled=replace(QUALITY.distilled, perplexity=15.0, kl_to_teacher=0.4, top1_agreement=0.7),
    recovered=0.75,
)
SCIQ = replace(
    RESULTS["evaluate_tasks"].tasks["sciq"],
    distilled=Score(0.7, 0.03),
    differences=Differences(Difference(-0.1, -0.15, -0.05), Difference(-0.3, -0.37, -0.23)),
    recovered=None,
)
BENCHMARK: BenchmarkResults = RESULTS["measure_speed"]
SPEEDUPS = [
    replace(BENCHMARK.speedups[0], backend="openvino", prefill=prefill, decode=decode)
    for prefill, decode in ((1.4, 1.3), (1.2, 1.25))
]
# A gate uses the minimum over engines. The baseline counts only if no engine was measured.
SPEEDUPS.append(replace(SPEEDUPS[0], backend=BASELINE, prefill=0.9, decode=0.9))
SERVED: ServedResult = RESULTS["evaluate_served"]


def manifests(**results: Any) -> dict[str, Manifest]:
    """Returns a manifest with each result. Results are named after the types of their artifacts."""
    return {kind: bare_manifest("stage", kind, result) for kind, result in results.items()}


MEASURED = manifests(
    eval_results=EVALUATED,
    task_results=replace(RESULTS["evaluate_tasks"], tasks={"sciq": SCIQ}),
    speed_results=replace(BENCHMARK, speedups=SPEEDUPS),
    served_results=SERVED,
)
"""Results that have a value for every gate of these tests."""


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("recovered.sciq >= 0.95", Gate("recovered.sciq", ">=", 0.95)),
        ("perplexity_ratio<1.1", Gate("perplexity_ratio", "<", 1.1)),
        ("  difference_low.arc_easy  >  -.05 ", Gate("difference_low.arc_easy", ">", -0.05)),
        ("kl_to_teacher <= 4e-1", Gate("kl_to_teacher", "<=", 0.4)),
    ],
)
def test_valid_gates_are_parsed(text: str, gate: Gate) -> None:
    assert parse_gate(text) == gate
    assert parse_gate(str(gate)) == gate  # ``str`` writes one space on each side of OP


@pytest.mark.parametrize(
    "text",
    [
        *("", "recovered", "recovered >=", "recovered => 1", "recovered == 1", "0.95 <= recovered"),
        *("recovered >= high", "recovered >= nan", "recovered >= 1 2", "recovered >= 1; rm"),
        *("__import__('os') >= 1", "a.b.c >= 1", "recovered. >= 1"),
    ],
)
def test_invalid_gates_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="NAME OP NUMBER"):
        parse_gate(text)


@pytest.mark.parametrize(
    ("text", "measured", "passed"),
    [
        ("recovered >= 0.75", 0.75, True),
        ("recovered > 0.75", 0.75, False),
        ("perplexity < 15", 15.0, False),
        ("perplexity_ratio <= 1.5", 1.5, True),
        ("kl_to_teacher <= 0.39", 0.4, False),
        ("top1_agreement >= 0.7", 0.7, True),
        ("score.sciq >= 0.7", 0.7, True),
        ("difference.sciq >= -0.05", -0.1, False),
        ("difference_low.sciq > -0.2", -0.15, True),
        ("speedup.decode >= 1.26", 1.25, False),
        ("speedup.prefill >= 1.2", 1.2, True),
        ("recovered.sciq >= 0", None, False),
        ("served_score.sciq > 0.4375", 0.4375, False),
        ("served_difference.sciq >= -0.07", -0.0625, True),
        ("served_difference_low.sciq >= -0.07", -0.125, False),
        ("served_perplexity_ratio <= 1.04", 46.75 / 45.25, True),
    ],
)
def test_a_gate_passes_if_its_value_is_in_range(
    text: str, measured: float | None, passed: bool
) -> None:
    [verdict] = judge([parse_gate(text)], MEASURED)
    assert (verdict.measured, verdict.passed) == (measured, passed)
    assert str(verdict).startswith(text)


@pytest.mark.parametrize(
    ("text", "measured", "shown"),
    [
        ("score.mmlu >= 0.605", 0.6047, "0.6047"),
        ("recovered >= 0.95", 0.94997, "0.94997"),
        ("recovered > 0.95", 0.95, "0.95"),
        ("perplexity < 15", 14.99999, "14.99999"),
        ("perplexity < 15", math.nan, "nan"),
        ("perplexity < 15", 12.3456, "12.35"),
    ],
)
def test_a_verdict_shows_on_which_side_of_the_threshold_the_value_is(
    text: str, measured: float, shown: str
) -> None:
    verdict = Verdict(parse_gate(text), measured)
    assert verdict.measured_text == shown
    assert str(verdict).endswith(f"measured {shown}")


def test_a_gate_on_an_undefined_value_fails() -> None:
    undefined = manifests(
        speed_results=replace(BENCHMARK, speedups=[]),
        eval_results=replace(EVALUATED, recovered=math.nan),
    )
    gates = map(parse_gate, ["speedup.decode > 1", "recovered > 0", "recovered < 1"])
    assert [verdict.passed for verdict in judge(gates, undefined)] == [False, False, False]
    # ``undefined`` has no result of benchmarks, so a gate on a benchmark is not judged.
    assert judge([parse_gate("score.sciq > 0")], undefined) == []
    without_text = manifests(served_results=replace(SERVED, text=None))
    [verdict] = judge([parse_gate("served_perplexity_ratio < 2")], without_text)
    assert (verdict.measured, verdict.passed) == (None, False)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("recoverd >= 1", r"Did you mean 'recovered'\?"),
        ("recovered.piqua >= 1", r"Did you mean 'recovered\.piqa'\?"),
        ("recovered.mmlu >= 1", r"does not measure recovered\.mmlu"),
        ("speedup.decode >= 1", r"does not measure speedup\.decode"),
        ("recovered", "NAME OP NUMBER"),
    ],
)
def test_a_plan_refuses_gates_on_unmeasured_values(plan: MakePlan, gate: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(f"gates=['{gate}']", "tasks=quick")


def test_every_metric_of_a_recipe_can_have_a_gate(plan: MakePlan) -> None:
    names = [*TEXT_METRICS, *(f"{value}.sciq" for value in TASK_METRICS)]
    gates = ", ".join(f"'{name} > 0'" for name in names)
    planned = plan(f"gates=[{gates}]", "tasks=quick")
    assert [gate.name for gate in planned.gates] == names
    assert len(plan("gates='recovered > 0'").gates) == 1  # a single gate needs no list
    assert len(judge(planned.gates, MEASURED)) == len(names)
    # If gates change, only the report runs again, because it shows them.
    fingerprints = {stage.name: stage.fingerprint for stage in plan("tasks=quick").stages}
    changed = [s.name for s in planned.stages if s.fingerprint != fingerprints[s.name]]
    assert changed == ["report"]


def test_gates_on_served_perplexity_need_a_server_that_returns_losses(
    plan: MakePlan,
) -> None:
    served = ("gates=['served_perplexity_ratio < 2']", "served=engine")
    assert plan(*served, "engine=openvino").gates
    tensorrt = ("engine=tensorrt_llm", "stages.build_engine.backend=tensorrt_llm_pytorch")
    with pytest.raises(RecipeError, match="does not measure"):
        plan(*served, *tensorrt, "stages.evaluate_served.tasks=[gsm8k_cot]")


def test_a_failing_gate_ends_a_complete_run_with_status_1(
    launch: Launch, plan: MakePlan, complete: Complete, tmp_path: Path
) -> None:
    """``complete`` writes ``RESULTS``: 0.79 of the loss and 0.87 of sciq's score are recovered."""
    task = "stages.evaluate_tasks.tasks=[sciq]"
    complete(plan(task, "tasks=quick"))
    run_dir = tmp_path / "run"
    base = ["recipe=llama_width_prune", "engine=null", task, f"run_dir={run_dir}"]

    passing = launch(*base, "gates=['recovered >= 0.75', 'score.sciq > 0.69']")
    assert passing.returncode == 0, passing.stderr
    assert passing.stdout.count("passed") == 2
    results = [path for path in run_dir.rglob(MANIFEST) if path.parent.name != "report"]
    times_before = {path: path.stat().st_mtime_ns for path in results}
    # Both launches fail. The first runs only the report, because the gates changed; the second
    # runs nothing.
    for repeated in (False, True):
        failing = launch(*base, "gates=['recovered >= 0.5', 'recovered.sciq >= 0.95']")
        assert failing.returncode == 1
        assert "recovered.sciq >= 0.95: measured 0.8721" in failing.stderr
        assert "Traceback" not in failing.stderr
        assert ("nothing ran" in failing.stdout) == repeated
        assert "FAILED" in failing.stdout
    assert {path: path.stat().st_mtime_ns for path in results} == times_before


def test_every_evaluation_of_a_recipe_has_gates(plan: MakePlan, complete: Complete) -> None:
    """A recipe may measure a benchmark in two stages. Its gate is judged once both have run."""
    more_tasks = "+stage/evaluate_tasks@stages.more_tasks=default"  # a second evaluation
    sciq, piqa = "stages.evaluate_tasks.tasks=[sciq]", "stages.more_tasks.tasks=[piqa]"
    gates = "gates=['score.sciq > 0', 'score.piqa > 1']"  # the second always fails
    planned = plan("tasks=quick", more_tasks, sciq, piqa, gates)
    complete(planned, "evaluate_tasks")
    _, unjudged = planned.judge_gates()
    assert [str(gate) for gate in unjudged] == ["score.piqa > 1"]
    complete(planned)
    verdicts, unjudged = planned.judge_gates()
    assert [(v.gate.name, v.passed) for v in verdicts] == [
        ("score.sciq", True),
        ("score.piqa", False),
    ]
    assert not unjudged
    sciq_again = "stages.more_tasks.tasks=[sciq]"  # a changed setting, so this stage has no result
    planned = plan("tasks=quick", more_tasks, sciq, sciq_again, "gates=['score.sciq > 0']")
    _, unjudged = planned.judge_gates()
    assert unjudged, "gates were judged before the later stage ran"


def test_the_fix_for_an_unquoted_gate_is_to_quote_it(launch: Launch) -> None:
    done = launch("recipe=llama_width_prune", "gates=[recovered >= 0.75]")
    assert done.returncode == 1
    assert """fix: quote text with special characters, such as 'gates=["a >= 1"]'""" in done.stderr


def test_a_gate_is_not_checked_before_its_value_is_measured(
    launch: Launch, plan: MakePlan, complete: Complete, tmp_path: Path
) -> None:
    complete(plan("tasks=quick"))
    run = ["engine=null", f"run_dir={tmp_path / 'run'}"]
    base = ["recipe=llama_width_prune", *run, "gates=['recovered >= 2']"]  # can never pass
    failed = launch(*base, "only=[prune]")  # the result of ``evaluate`` exists, so the gate counts
    assert failed.returncode == 1
    assert "recovered >= 2: measured 0.7931" in failed.stderr
    for stage in ("evaluate", "report"):
        (tmp_path / "run" / stage / MANIFEST).unlink()
    partial_run = launch(*base, "only=[prune]")
    assert partial_run.returncode == 0, partial_run.stderr
    assert "not checked" in partial_run.stdout
    dry = launch(*base, "dry_run=true")  # a dry run checks no gates
    assert dry.returncode == 0, dry.stderr
