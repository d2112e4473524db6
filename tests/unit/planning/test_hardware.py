"""Tests the detection of this machine's GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.planning import hardware


def test_gpus_are_counted_by_the_driver_or_found_on_wsl2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WSL2 has no folder of NVIDIA's driver. Its device may also be that of another vendor."""
    driver, device, program = (tmp_path / name for name in ("gpus", "dxg", "nvidia-smi"))
    monkeypatch.setattr(hardware, "DRIVER", driver)
    monkeypatch.setattr(hardware, "WSL_DEVICE", device, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.gpus_here() == 0
    device.touch()
    assert hardware.gpus_here() == 0
    program.touch(mode=0o755)
    assert hardware.gpus_here() == 1
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        (driver / bus).mkdir(parents=True)
    assert hardware.gpus_here() == 2
