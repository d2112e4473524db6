"""Tests the stage ``plan``: its tables, the cached rates of this machine, and time limits."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest

from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT
from recipes.engines.results import TrainingRates
from recipes.planning import hardware
from recipes.planning.limits import preparation_seconds
from recipes.planning.results import PlanResult
from recipes.planning.training_cost import training_cost
from recipes.stages import plan as plan_stage
from recipes.stages.plan import RATES_FOLDER, read_rates, summary_of, tables, write_rates
from tests.unit.conftest import notes_of, stage_named
from tests.unit.planning.models import H100, QWEN, distillation

if TYPE_CHECKING:
    from pathlib import Path

    from launch.plan import Plan
    from tests.unit.conftest import MakePlan

RATES = TrainingRates(
    flops_per_second=4.0e11, float32_flops_per_second=2.0e11, bytes_per_second=3.0e10
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Returns an empty cache folder, and makes this machine's processor one without bfloat16."""
    monkeypatch.setenv("NEMO_RECIPES_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("model name : One\ncpu MHz : 2000\nflags : avx2\n")
    return tmp_path


def run_plan_stage(planned: Plan, folder: Path, **profile: object) -> PlanResult:
    """Runs the stage ``plan``; ``profile`` replaces settings of the hardware profile."""
    config: Any = stage_named(planned, "plan").config
    config = replace(config, hardware=config.hardware | profile)
    out = folder / ARTIFACT
    out.mkdir(parents=True, exist_ok=True)
    result = plan_stage.run(config, {}, out).result
    assert isinstance(result, PlanResult)
    return result


def test_tables_have_a_cell_for_each_column() -> None:
    job = distillation(replace(QWEN, num_layers=24), QWEN)
    costs = {"distill": (job, training_cost(job, H100))}
    all_tables = tables(costs, H100)
    assert all_tables[-1].title.startswith("Layouts of distill")
    for table in all_tables:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}
    totals = summary_of(costs, H100, from_published_config=True)
    assert totals["device-hours"] == pytest.approx(5826, abs=2)  # NVIDIA published about 6,000
    assert totals["dollars"] == pytest.approx(3 * totals["device-hours"], rel=0.001)  # $3 per hour
    assert "engine" in str(totals["not in these totals"])
    assert tables({}, H100) == []


def test_rates_are_cached_by_processor_and_threads(cache: Path) -> None:
    """The clock rate is not part of the key. The flags of the processor are."""
    assert read_rates(2) is None
    write_rates(2, RATES)
    assert read_rates(2) == RATES
    assert read_rates(1) is None
    (cache / "cpuinfo").write_text("model name : One\ncpu MHz : 3000\nflags : avx2\n")
    assert read_rates(2) == RATES
    (cache / "cpuinfo").write_text("model name : One\ncpu MHz : 2000\nflags : avx2 amx_bf16\n")
    assert read_rates(2) is None


@pytest.mark.parametrize("content", ["", "[]", '{"flops_per_second": 1.0}', "NaN"])
def test_an_invalid_cache_is_ignored(cache: Path, content: str) -> None:
    write_rates(2, RATES)
    [file] = (cache / RATES_FOLDER).iterdir()
    if content == "NaN":  # valid JSON for Python, but not a valid rate
        content = file.read_text().replace("200000000000.0", "NaN")  # the float32 rate of ``RATES``
    file.write_text(content)
    assert read_rates(2) is None


def test_a_cache_that_cannot_be_written_is_ignored(cache: Path) -> None:
    (cache / RATES_FOLDER).touch()  # a file, where the folder of the rates would be
    write_rates(2, RATES)
    assert read_rates(2) is None


def test_a_plan_uses_the_measured_rates(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached rates replace the rates of the hardware profile, except with ``measure=false``."""
    threads = 3
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    # This overhead does not depend on the rates, so it would hide their effect.
    monkeypatch.setattr(hardware, "LAYER_PASS_SECONDS", 0.0)
    planned = plan()

    def run_with(rates: TrainingRates, **profile: object) -> PlanResult:
        write_rates(threads, rates)
        return run_plan_stage(planned, tmp_path / "work", **profile)

    slow_rates = TrainingRates(*(rate / 100 for rate in asdict(RATES).values()))
    fast, slow = run_with(RATES), run_with(slow_rates)
    assert fast.summary["GFLOP/s in bfloat16"] == 400
    assert slow.summary["GFLOP/s in bfloat16"] == 4
    # The ratio is not exactly 100, because pauses for checkpoints do not depend on the rates.
    for name in ("distill", "score"):
        assert slow.seconds[name] == pytest.approx(100 * fast.seconds[name], rel=0.01)
    fast_speed, slow_speed = (result.tokens_per_second["distill"] for result in (fast, slow))
    assert fast_speed == pytest.approx(100 * slow_speed)
    assert run_with(slow_rates, measure=False).summary != slow.summary


def test_tokenization_time_is_estimated_and_compared_with_the_time_limit(
    plan: MakePlan, tmp_path: Path
) -> None:
    """The text has 8.352 GB, so 2.088 billion tokens of 4 bytes.

    A process tokenizes 290,000 tokens per second. So two processes need an hour.
    """
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(8_352_000_000)  # a sparse file
    overrides = (
        "hardware.measure=false",
        "data.heldout_sources=[]",
        f"data.sources=[{tmp_path}/large.txt]",
    )
    processes, resources = "stages.prepare_data.processes", "stages.prepare_data.resources"
    for seconds, *settings in (
        (3600, f"{processes}=2"),
        (900, f"{processes}=8"),
        (1800, f"{processes}=2", f"{resources}.nodes=2"),
    ):
        result = run_plan_stage(plan(*overrides, *settings), tmp_path / str(seconds))
        assert result.seconds["prepare_data"] == seconds
        [table] = [table for table in result.tables if table.title == "Tokenization"]
        assert table.rows == [["prepare_data", f"{seconds / 3600:.2f}"]]

    # An hour takes 6 jobs of 15 minutes, because each job stops 5 minutes before its limit.
    limited = (*overrides, f"{processes}=2", f"{resources}.time=00:15:00")
    notes = plan(*limited, "+cluster.max_requeues=5").notes
    [note] = [note for note in notes if "prepare_data" in note.what]
    assert note.rule.name == "time-limit"
    with pytest.raises(RecipeError, match=r"started 5 times.*\n.*max_requeues=5 .*\[requeues\]"):
        plan(*limited, "+cluster.max_requeues=4")


def test_more_processes_than_reading_can_feed_save_no_time(plan: MakePlan, tmp_path: Path) -> None:
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(8_000_000_000)  # 2 billion tokens of 4 bytes, as many as ``hub`` has
    hub = "hf://HuggingFaceFW/fineweb-edu:train#tokens=2000000000&licence=ODC-By-1.0"

    def seconds(source: str, processes: int) -> float | None:
        overrides = (f"data.sources=['{source}']", "data.heldout_sources=[]")
        processes_setting = f"stages.prepare_data.processes={processes}"
        return preparation_seconds(plan(*overrides, processes_setting).chain).get("prepare_data")

    # Tokens that a rank reads per second, from a local file and from the hub.
    for source, read_rate in ((f"{tmp_path}/large.txt", 15e6), (hub, 4.7e6)):
        assert seconds(source, 1) == pytest.approx(2e9 / 290_000)
        assert seconds(source, 64) == seconds(source, 128) == pytest.approx(2e9 / read_rate)
    # The teacher's time to generate conversations is not estimated.
    assert seconds("teacher://chat#tokens=1000000", 1) is None


def test_stages_without_an_estimate_are_listed(plan: MakePlan, tmp_path: Path) -> None:
    """Without ``max_tokens``, the plan does not know how many tokens of a hub dataset are read."""
    for overrides, is_unknown in ((), False), (("stages.prepare_data.max_tokens=null",), True):
        planned = plan(*overrides, recipe="recipe=qwen3_8b_depth_2.5b")
        assert len(notes_of(planned, "unknown-text")) == is_unknown
        result = run_plan_stage(planned, tmp_path / str(is_unknown))
        [table] = [table for table in result.tables if table.title == "Time not estimated"]
        names = {str(name) for [name] in table.rows}
        assert names == {"prune", "report"} | ({"prepare_data"} if is_unknown else set())
        # Each stage except ``plan`` either has an estimate or is listed.
        assert {*names, *result.seconds, "plan"} == planned.chain.stages.keys()
        assert names.isdisjoint(result.seconds)


def test_tokenization_in_a_large_recipe_is_compared_with_the_time_limit(plan: MakePlan) -> None:
    one_job = ("+cluster.time=04:00:00", "+cluster.max_requeues=0", "only=[prepare_data]")
    with pytest.raises(RecipeError, match=r"prepare_data takes about(?s:.*)\[requeues\]"):
        plan(*one_job, "skip_rules=[disk]", recipe="recipe=llama3_1_8b_depth")


def test_the_hours_of_a_search_are_compared_with_the_time_limit(plan: MakePlan) -> None:
    """``successive_halving`` stops a margin before its job's limit, and another job resumes it.

    ``rank_candidates`` cannot resume, so it must end within one job.
    """

    def plan_search(*overrides: str) -> Plan:
        return plan("+cluster.time=01:00:00", *overrides, recipe="recipe=qwen3_8b_search")

    # The planner's margin has at least 300 seconds, more than it estimates for this stage.
    for overrides, margin in ((), 300), (("+cluster.margin_seconds=1800",), 1800):
        planned = plan_search(*overrides)
        [note] = notes_of(planned, "time-limit")
        cost = planned.chain.inference_costs["successive_halving"]
        assert 1 < (cost.stopping_seconds or 0) < 300
        search_seconds = cost.hours(planned.chain.hardware) * 3600
        jobs = math.ceil(search_seconds / (3600 - margin))  # each job has a limit of an hour
        assert "successive_halving" in note.what
        assert f" {jobs} times" in note.what
    with pytest.raises(RecipeError, match=r"rank_candidates .*cannot resume(?s:.*)\[requeues\]"):
        plan_search("stages.rank_candidates.resources.time=00:30:00")


def test_benchmarks_that_exceed_the_time_limit_only_give_a_warning(plan: MakePlan) -> None:
    """If the user repeats the command, ``evaluate_tasks`` skips the completed tasks."""
    limit = "stages.evaluate_tasks.resources.time=00:01:00"
    planned = plan(
        "+cluster.time=30-00:00:00", limit, "engine=null", recipe="recipe=qwen3_8b_depth_2.5b"
    )
    [note] = notes_of(planned, "time-limit")
    assert "evaluate_tasks" in note.what
