"""Rates of a machine: kept by processor and threads, and what a plan makes of them."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pytest

from recipes.core.manifest import ARTIFACT
from recipes.planning import hardware
from recipes.planning.machine import FOLDER, Rates, keep, kept
from recipes.planning.results import PlanResult
from recipes.stages import plan as stage

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import MakePlan

RATES = Rates(4.0e11, 2.0e11, 3.0e10)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("NEMO_RECIPES_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("model name : One\ncpu MHz : 2000\nflags : avx2\n")
    return tmp_path


def test_rates_are_kept_for_a_processor_and_its_threads(cache: Path) -> None:
    assert kept(2) is None
    keep(2, RATES)
    assert kept(2) == RATES
    assert kept(1) is None
    (cache / "cpuinfo").write_text("model name : One\ncpu MHz : 3000\nflags : avx2\n")
    assert kept(2) == RATES  # a clock that changes does not make another processor
    (cache / "cpuinfo").write_text("model name : One\ncpu MHz : 2000\nflags : avx2 amx_bf16\n")
    assert kept(2) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"flops_per_second": 1.0}', "nan"])
def test_what_cannot_be_read_is_measured_again(cache: Path, content: str) -> None:
    keep(2, RATES)
    [file] = (cache / FOLDER).iterdir()
    if content == "nan":
        content = file.read_text().replace("200000000000.0", "NaN")
    file.write_text(content)
    assert kept(2) is None


def test_a_place_that_cannot_be_written_keeps_nothing(cache: Path) -> None:
    (cache / FOLDER).touch()
    keep(2, RATES)
    assert kept(2) is None


def test_a_plan_takes_the_rates_of_where_it_runs(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the profile, on which its settings depend wherever it is made."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(hardware, "PASS_SECONDS", 0.0)  # is no rate
    types = "hardware.precision=bf16-mixed", "hardware.inference_precision='32'"
    [planned] = [s for s in plan(*types).stages if s.name == "plan"]

    def figures(rates: Rates, **hardware: object) -> PlanResult:
        keep(3, rates)
        out = tmp_path / "work" / ARTIFACT
        out.mkdir(parents=True, exist_ok=True)
        config = replace(planned.config, hardware=planned.config.hardware | hardware)  # type: ignore[attr-defined]
        result = stage.run(config, {}, out).result
        assert isinstance(result, PlanResult)
        return result

    def hours(found: PlanResult) -> list[object]:
        [training], [other] = (
            [table for table in found.tables if table.title == title]
            for title in ("Time and money", "Other stages")
        )
        rows = {str(row[0]): row for row in other.rows}
        return [training.rows[0][training.columns.index("hours")], rows["score"][-1]]

    slow = Rates(*(rate / 100 for rate in asdict(RATES).values()))
    one, hundred = figures(RATES), figures(slow)
    assert one.figures["GFLOP/s in bfloat16"] == 400
    assert hundred.figures["GFLOP/s in bfloat16"] == 4
    for name in ("distill", "score"):
        assert hundred.seconds[name] == pytest.approx(100 * one.seconds[name], rel=0.2)
    speeds = [found.tokens_per_second["distill"] for found in (one, hundred)]
    assert speeds[0] == pytest.approx(100 * speeds[1])
    for fast, late in zip(hours(one), hours(hundred), strict=True):
        rounding = 100 * 0.005
        assert float(str(late)) == pytest.approx(100 * float(str(fast)), rel=0.01, abs=rounding)
    assert figures(slow, measure=False).figures != hundred.figures
