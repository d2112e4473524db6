"""Hardware profiles, and what is read of the machine itself."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pytest

from launch.schema import CONF
from recipes.core.manifest import ARTIFACT
from recipes.planning import hardware
from recipes.planning.hardware import RATES_FOLDER, MeasuredRates, read_rates, write_rates
from recipes.planning.results import PlanResult
from recipes.stages import plan as stage
from tests.unit.planning.models import profile

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import MakePlan

PROFILES = sorted(path.stem for path in (CONF / "hardware").glob("*.yaml"))
RATES = MeasuredRates(4.0e11, 2.0e11, 3.0e10)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's cache, on a processor without bfloat16."""
    monkeypatch.setenv("NEMO_RECIPES_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("model name : One\ncpu MHz : 2000\nflags : avx2\n")
    return tmp_path


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_complete_and_plausible(name: str) -> None:
    found = profile(name)
    assert found.name == name
    assert found.on_gpu == (name != "cpu")
    assert 0 < found.utilisation <= 1
    assert found.on_gpu == (found.traffic_share is None)
    assert found.on_gpu != found.measure
    assert found.memory_of_rank(1) > 1e9
    assert (CONF / "hardware" / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("flags : fpu avx2 avx512f avx512_bf16 fma", "bf16-mixed"),
        ("flags : fpu amx_bf16 amx_tile", "bf16-mixed"),
        ("Features : fp asimd bf16", "bf16-mixed"),
        ("flags : fpu avx avx2 fma", "32"),
        (None, "32"),
    ],
)
def test_bfloat16_is_for_processors_that_have_it(
    cache: Path, flags: str | None, precision: str
) -> None:
    (cache / "cpuinfo").unlink()
    if flags is not None:
        (cache / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert hardware.cpu_profile("precision") == precision
    bfloat16 = hardware.Hardware()
    rates = [hardware.cpu_profile(n) for n in ("flops_per_second", "bytes_per_second")]
    default = [bfloat16.flops_per_second, bfloat16.bytes_per_second]
    assert (rates == default) == (precision == bfloat16.precision)


def test_rates_are_cached_for_a_processor_and_its_threads(cache: Path) -> None:
    assert read_rates(2) is None
    write_rates(2, RATES)
    assert read_rates(2) == RATES
    assert read_rates(1) is None
    (cache / "cpuinfo").write_text("model name : One\ncpu MHz : 3000\nflags : avx2\n")
    assert read_rates(2) == RATES  # the clock is not part of the key
    (cache / "cpuinfo").write_text("model name : One\ncpu MHz : 2000\nflags : avx2 amx_bf16\n")
    assert read_rates(2) is None


@pytest.mark.parametrize("content", ["", "[]", '{"flops_per_second": 1.0}', "NaN"])
def test_an_invalid_cache_is_ignored(cache: Path, content: str) -> None:
    write_rates(2, RATES)
    [file] = (cache / RATES_FOLDER).iterdir()
    if content == "NaN":
        content = file.read_text().replace("200000000000.0", "NaN")
    file.write_text(content)
    assert read_rates(2) is None


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    (cache / RATES_FOLDER).touch()
    write_rates(2, RATES)
    assert read_rates(2) is None


def test_a_plan_uses_the_measured_rates(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the profile, which are part of its settings."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(hardware, "LAYER_PASS_SECONDS", 0.0)  # does not depend on the rates
    [planned] = [s for s in plan().stages if s.name == "plan"]
    out = tmp_path / "work" / ARTIFACT
    out.mkdir(parents=True)

    def result(rates: MeasuredRates, **settings: object) -> PlanResult:
        write_rates(3, rates)
        config = replace(planned.config, hardware=planned.config.hardware | settings)  # type: ignore[attr-defined]
        found = stage.run(config, {}, out).result
        assert isinstance(found, PlanResult)
        return found

    slow = MeasuredRates(*(rate / 100 for rate in asdict(RATES).values()))
    one, hundred = result(RATES), result(slow)
    assert one.figures["GFLOP/s in bfloat16"] == 400
    assert hundred.figures["GFLOP/s in bfloat16"] == 4
    for name in ("distill", "score"):
        assert hundred.seconds[name] == pytest.approx(100 * one.seconds[name])
    speeds = [found.tokens_per_second["distill"] for found in (one, hundred)]
    assert speeds[0] == pytest.approx(100 * speeds[1])
    assert result(slow, measure=False).figures != hundred.figures
