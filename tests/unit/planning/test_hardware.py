"""Tests the detection of this machine's GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.planning import hardware


def test_gpus_are_counted_in_the_drivers_folder_or_detected_as_one_on_wsl2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On WSL2, the driver has no folder, and GPUs of any vendor have the same device file.

    So an NVIDIA GPU is only assumed there if the program ``nvidia-smi`` is also installed.
    """
    driver, wsl_device, nvidia_smi = (tmp_path / name for name in ("gpus", "dxg", "nvidia-smi"))
    monkeypatch.setattr(hardware, "DRIVER", driver)
    monkeypatch.setattr(hardware, "WSL_DEVICE", wsl_device)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.gpus_here() == 0
    wsl_device.touch()
    assert hardware.gpus_here() == 0
    nvidia_smi.touch(mode=0o755)  # executable
    assert hardware.gpus_here() == 1
    for pci_address in ("0000:01:00.0", "0000:02:00.0"):
        (driver / pci_address).mkdir(parents=True)
    assert hardware.gpus_here() == 2
