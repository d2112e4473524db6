"""Runs ``python -m nemo_convert`` in this process, changes checkpoints, and compares models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from nemo_convert import __main__ as command_line
from nemo_convert import hf, nemo
from recipes.core.files import read_json, write_json


def convert_by_command(*arguments: str | Path) -> int:
    """Runs the command line in this process; returns its exit status."""
    sys.argv = ["nemo_convert", *map(str, arguments)]
    return command_line.main()


def change_context(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Calls ``change`` on the dict of objects in a checkpoint's ``io.json``, and saves the dict."""
    file = checkpoint / nemo.CONTEXT / "io.json"
    context = read_json(file)
    change(context["objects"])
    write_json(file, context)


def assert_trains_alike(checkpoint: Path, tokens: torch.Tensor) -> None:
    """Asserts that training layers do not change the logits or the gradient of any weight.

    The layers of ``recipes.backend.training_layers`` replace Megatron's where TransformerEngine is
    missing. ``tokens`` has the token ids [batch, sequence].
    """
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    results = []
    # Without the patch, the backward pass of a mixture of experts leaves a scale whose shape NeMo's
    # trainer cannot set in a later training in this process.
    scale = mock.patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.ones(1))
    for training in (False, True):
        model = nemo.restore_model(checkpoint)
        core = nemo.build_core(model, nemo.Parallelism(), training=training)
        nemo.load_weights(core, checkpoint)
        logits = core(tokens, positions, None)
        with scale:
            logits.logsumexp(dim=-1).mean().backward()  # a loss that depends on every logit
        gradients = {name: weight.grad for name, weight in core.named_parameters()}
        results.append({"logits": logits, **gradients})
    expected, actual = results
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        # On some processors, random models amplify float32's rounding errors up to 1000 times.
        difference = torch.linalg.vector_norm(actual[name] - tensor)
        assert difference <= 1e-3 * torch.linalg.vector_norm(tensor) + 1e-6, name


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Returns all weights of a Hugging Face folder, by name."""
    weights = hf.Weights(folder)
    return {name: weights.read(name) for name in weights.names()}


def assert_same_weights(first: Path, second: Path) -> None:
    """Asserts that two Hugging Face folders have equal weights of equal types."""
    expected, actual = read_tensors(first), read_tensors(second)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == actual[name].dtype, name
        assert torch.equal(tensor, actual[name]), name
