"""The parity gate detects planted faults of NeMo's or transformers' model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_convert import convert, hf, nemo, parity
from nemo_convert.families import LLAMA3_ROPE
from recipes.core.errors import RecipeError
from recipes.core.files import read_json
from tests.support.conversion import convert_by_command, read_tensors
from tests.support.folder_changes import EMBEDDING, edit_json, edit_weights, untie
from tests.support.models import EVEN, ODD, write_tiny_model

SCALING = {**LLAMA3_ROPE, "factor": 8.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A directory with ``hf``, a model with scaled RoPE and an untied head, and ``m.nemo``."""
    root = tmp_path_factory.mktemp("parity")
    write_tiny_model(root / "hf", text_file, **EVEN, rope_scaling=SCALING, train=False)
    convert.to_nemo(root / "hf", root / "m.nemo")
    return root


def core_with(source: Path, **settings: Any) -> Any:
    """Returns the checkpoint's Megatron model, with other values in its NeMo config."""
    model = nemo.restore_model(source / "m.nemo")
    for name, value in settings.items():
        assert getattr(model.config, name) != value
        setattr(model.config, name, value)
    return parity.load_core(source / "m.nemo", model)


def core_with_swapped_gate_and_up(source: Path) -> Any:
    core = core_with(source)
    weight = core.decoder.layers[1].mlp.linear_fc1.weight.data
    weight.copy_(torch.cat([*reversed(weight.chunk(2))]))
    return core


def core_with_rolled_queries(source: Path) -> Any:
    core = core_with(source)
    weight = core.decoder.layers[1].self_attention.linear_qkv.weight.data
    weight.copy_(weight.roll(EVEN["head_dim"], 0))
    return core


def core_with_tied_head(source: Path) -> Any:
    core = core_with(source)
    core.output_layer.weight.data.copy_(core.embedding.word_embeddings.weight)
    return core


FAULTY_MODELS: dict[str, Callable[[Path], Any]] = {
    "theta": lambda source: core_with(source, rotary_base=10_000),
    "scaling factor": lambda source: core_with(source, scale_factor=32.0),
    "norm eps": lambda source: core_with(source, layernorm_epsilon=1e-3),
    "gate and up": core_with_swapped_gate_and_up,
    "queries": core_with_rolled_queries,
    "tied head": core_with_tied_head,
}


def test_the_checkpoint_passes(source: Path) -> None:
    parity.compare(source / "hf", source / "m.nemo", core_with(source)).require("test")


@pytest.mark.parametrize("fault", FAULTY_MODELS)
def test_a_fault_of_nemos_model_is_detected(fault: str, source: Path) -> None:
    result = parity.compare(source / "hf", source / "m.nemo", FAULTY_MODELS[fault](source))
    with pytest.raises(RecipeError, match="logits of NeMo differ"):
        result.require("test")


@pytest.mark.parametrize("key", ["rope_theta", "rope_scaling", "rms_norm_eps"])
def test_a_key_that_transformers_does_not_read_is_detected(
    source: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds transformers' model with another value of the key, as if the key were ignored."""
    values = {"rope_theta": 10_000.0, "rope_scaling": None, "rms_norm_eps": 1e-3}

    def load(folder: Path) -> Any:
        model = hf.load_causal_lm(folder)
        setattr(model.config, key, values[key])
        other = type(model)(model.config)
        other.load_state_dict(model.state_dict())
        return other.eval()

    monkeypatch.setattr(parity, "load_causal_lm", load)
    with pytest.raises(RecipeError, match="logits of transformers differ"):
        parity.compare(source / "hf", source / "m.nemo").require("test")


@pytest.mark.parametrize("row", [7, EVEN["vocab_size"] - 1])
def test_a_change_of_one_embedding_row_is_detected(source: Path, row: int, tmp_path: Path) -> None:
    """No token of the text has the last row's id, so logits cannot reveal a change of that row."""
    shutil.copytree(source / "hf", tmp_path / "hf")
    change_row = edit_weights(lambda tensors: tensors[EMBEDDING][row].add_(1e-3))
    change_row(tmp_path / "hf")
    result = parity.compare(tmp_path / "hf", source / "m.nemo")
    assert result.different_weight == EMBEDDING
    with pytest.raises(RecipeError, match=f"{EMBEDDING} differs"):
        result.require("test")


def test_a_changed_head_is_detected(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "hf", tmp_path / "hf")
    edit_weights(untie)(tmp_path / "hf")
    assert parity.compare(tmp_path / "hf", source / "m.nemo").different_weight == "lm_head.weight"
    assert "lm_head.weight" in read_tensors(tmp_path / "hf")


def parity_of(nemo: float, transformers: float, logits_std: float) -> parity.Parity:
    """Returns a comparison with these differences of logits, and equal weights."""
    return parity.Parity(nemo, transformers, logits_std, tokens=1, different_weight=None)


@pytest.mark.parametrize(("difference", "std"), [(float("nan"), 1), (2e-3, 1), (2e-3, 0.1)])
def test_nan_or_a_large_difference_fails_the_gate(difference: float, std: float) -> None:
    for nemo_difference, transformers_difference in ((difference, 0), (0, difference)):
        with pytest.raises(RecipeError, match="differ by"):
            parity_of(nemo_difference, transformers_difference, std).require("test")


def test_the_tolerance_is_a_fraction_of_the_standard_deviation() -> None:
    parity_of(2e-3, 2e-3, logits_std=10).require("test")


@pytest.mark.parametrize(("tokens", "last"), [(128, 2047), (128, 255), (128, 60), (5, 2047)])
def test_positions_increase_up_to_the_last(tokens: int, last: int) -> None:
    positions = parity.spread_positions(tokens, last)
    assert len(positions) == tokens
    assert (positions.diff() > 0).all()
    if tokens > parity.ADJACENT:  # a shorter text has adjacent positions only
        assert positions[-1] == max(last, tokens - 1)


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        ("qwen2", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "qkv.bias"),
        ("qwen2", {"rope_theta": 10_000.0}, "rotary_base=5000.0"),
        ("qwen2", {"rms_norm_eps": 1e-3}, "layernorm_epsilon=1e-06"),
        ("llama", {"rope_scaling": None}, "scale_factor=8.0"),
        ("llama", {"rope_scaling": SCALING}, "scale_factor=none"),
        ("qwen3_moe", {"num_experts_per_tok": 3}, "moe_router_topk=2"),
        ("qwen3_moe", {"norm_topk_prob": False}, "moe_router_pre_softmax=False"),
    ],
)
def test_config_json_of_another_model_is_refused(
    family: str,
    changes: dict[str, Any],
    found: str,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scaling = {"rope_scaling": SCALING} if changes == {"rope_scaling": None} else {}
    source = write_tiny_model(tmp_path / "hf", text_file, family, train=False, **ODD, **scaling)
    checkpoint = tmp_path / "m.nemo"
    convert.to_nemo(source, checkpoint)
    context = checkpoint / nemo.CONTEXT
    objects = read_json(context / "io.json")["objects"]
    for item in objects.values():  # as if NeMo's defaults, which it does not store, were used
        item["items"] = [i for i in item["items"] if not re.search("scale_f|pre_softmax", i[0])]
    edit_json("io.json", objects=objects)(context)
    convert.require_matching_config(checkpoint)
    edit_json("config.json", **changes)(nemo.side_folder(checkpoint))
    for arguments in (("to-hf", checkpoint, tmp_path / "back"), ("verify", source, checkpoint)):
        assert convert_by_command(*arguments) == 1
        assert found in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
