"""``python -m nemo_convert`` in this process, and what it must keep."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from nemo_convert import __main__ as command_line
from nemo_convert import hf


def convert_by_command(*arguments: str | Path) -> int:
    sys.argv = ["nemo_convert", *map(str, arguments)]
    return command_line.main()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    weights = hf.Weights(folder)
    return {name: weights.read(name) for name in weights.names()}


def assert_same_weights(first: Path, second: Path) -> None:
    expected, found = tensors(first), tensors(second)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name
