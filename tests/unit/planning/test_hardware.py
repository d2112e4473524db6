"""Hardware profiles, and the detection of this machine's processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from launch.schema import CONF
from recipes.planning import hardware
from tests.unit.planning.models import profile

if TYPE_CHECKING:
    from pathlib import Path

PROFILES = sorted(path.stem for path in (CONF / "hardware").glob("*.yaml"))


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_complete_and_plausible(name: str) -> None:
    device = profile(name)
    assert device.name == name
    assert device.on_gpu == (name != "cpu") == (device.bandwidth_fraction is None) != device.measure
    assert 0 < device.utilisation <= 1
    assert device.memory_of_rank(1) > 1e9
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, precision: str
) -> None:
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert hardware.cpu_profile("precision") == precision
    bfloat16 = hardware.Hardware()
    rates = [hardware.cpu_profile(n) for n in ("flops_per_second", "bytes_per_second")]
    default = [bfloat16.flops_per_second, bfloat16.bytes_per_second]
    assert (rates == default) == (precision == bfloat16.precision)
