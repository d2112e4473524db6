"""What is read of the machine itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from recipes.planning import hardware

if TYPE_CHECKING:
    from pathlib import Path


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
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str | None, precision: str
) -> None:
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(hardware, "CPUINFO", file)
    assert hardware.cpu_profile("precision") == precision
    bfloat16 = hardware.Hardware()
    rates = [hardware.cpu_profile(n) for n in ("flops_per_second", "bytes_per_second")]
    default = [bfloat16.flops_per_second, bfloat16.bytes_per_second]
    assert (rates == default) == (precision == bfloat16.precision)
