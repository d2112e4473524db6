"""The parity gate detects faults that tests plant in the model of NeMo or of transformers."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_convert import convert, hf, nemo, parity
from nemo_convert.families import LLAMA3_ROPE
from nemo_convert.trust import read_metadata
from recipes.core.errors import RecipeError
from tests.support.conversion import change_context, convert_by_command, read_tensors
from tests.support.folder_changes import (
    EMBEDDING,
    Change,
    change_bytes,
    edit_json,
    edit_weights,
    remove_files,
    untie,
    write_file,
)
from tests.support.models import EVEN, ODD, write_tiny_model

SCALING = {**LLAMA3_ROPE, "factor": 8.0}
"""RoPE scaling of Llama 3.1, as ``rope_scaling`` in ``config.json``."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Returns a directory with a model in two formats: the folder ``hf``, and ``m.nemo``.

    The model has scaled RoPE and an untied head.
    """
    root = tmp_path_factory.mktemp("parity")
    write_tiny_model(root / "hf", text_file, **EVEN, rope_scaling=SCALING, train=False)
    convert.to_nemo(root / "hf", root / "m.nemo")
    return root


def core_with(source: Path, **settings: Any) -> Any:
    """Builds the Megatron model of ``m.nemo`` with ``settings`` in place of its NeMo config's."""
    model = nemo.restore_model(source / "m.nemo")
    for name, value in settings.items():
        assert getattr(model.config, name) != value  # otherwise this would plant no fault
        setattr(model.config, name, value)
    return parity.load_core(source / "m.nemo", model)


def swap_gate_and_up(core: Any) -> None:
    weight = core.decoder.layers[1].mlp.linear_fc1.weight.data
    gate, up = weight.chunk(2)
    weight.copy_(torch.cat([up, gate]))


def roll_queries(core: Any) -> None:
    """Shifts the rows of the fused QKV weight by one head."""
    weight = core.decoder.layers[1].self_attention.linear_qkv.weight.data
    weight.copy_(weight.roll(EVEN["head_dim"], 0))


def tie_head(core: Any) -> None:
    """Replaces the head with the embedding."""
    core.output_layer.weight.data.copy_(core.embedding.word_embeddings.weight)


def test_the_checkpoint_passes(source: Path) -> None:
    parity.compare(source / "hf", source / "m.nemo", core_with(source)).require("test")


@pytest.mark.parametrize(
    "fault",
    [
        {"rotary_base": 10_000},
        {"scale_factor": 32.0},
        {"layernorm_epsilon": 1e-3},
        swap_gate_and_up,
        roll_queries,
        tie_head,
    ],
)
def test_a_fault_of_nemos_model_is_detected(
    fault: dict[str, float] | Callable[[Any], None], source: Path
) -> None:
    """``fault`` has settings of the Megatron model, or changes its weights."""
    core = core_with(source, **fault) if isinstance(fault, dict) else core_with(source)
    if callable(fault):
        fault(core)
    result = parity.compare(source / "hf", source / "m.nemo", core)
    with pytest.raises(RecipeError, match="logits of NeMo differ"):
        result.require("test")


@pytest.mark.parametrize("key", ["rope_theta", "rope_scaling", "rms_norm_eps"])
def test_a_key_that_transformers_does_not_read_is_detected(
    source: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds transformers' model with another value of the key, as if the key were ignored."""
    values = {"rope_theta": 10_000.0, "rope_scaling": None, "rms_norm_eps": 1e-3}

    def load_with_other_value(folder: Path) -> Any:
        model = hf.load_causal_lm(folder)
        setattr(model.config, key, values[key])
        rebuilt = type(model)(model.config)  # only the constructor reads these keys
        rebuilt.load_state_dict(model.state_dict())
        return rebuilt.eval()

    monkeypatch.setattr(parity, "load_causal_lm", load_with_other_value)
    with pytest.raises(RecipeError, match="logits of transformers differ"):
        parity.compare(source / "hf", source / "m.nemo").require("test")


@pytest.mark.parametrize("row", [7, EVEN["vocab_size"] - 1])
def test_a_change_of_one_embedding_row_is_detected(source: Path, row: int, tmp_path: Path) -> None:
    """No token of ``parity.TEXT`` has the last row's id, so logits do not depend on this row."""
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
    assert "lm_head.weight" in read_tensors(tmp_path / "hf")  # it differs, but is not missing


# The tolerance is 1e-3 times the standard deviation of the logits, ``std``.
@pytest.mark.parametrize(
    ("difference", "std", "passes"),
    [(float("nan"), 1, False), (2e-3, 1, False), (2e-3, 0.1, False), (2e-3, 10, True)],
)
def test_nan_or_a_large_difference_fails_the_gate(
    difference: float, std: float, passes: bool
) -> None:
    for differences in ((difference, 0), (0, difference)):  # of NeMo and of transformers
        result = parity.Parity(*differences, std, tokens=1, different_weight=None)
        with nullcontext() if passes else pytest.raises(RecipeError, match="differ by"):
            result.require("test")


@pytest.mark.parametrize(("tokens", "last"), [(128, 2047), (128, 255), (128, 60), (5, 2047)])
def test_positions_increase_up_to_the_last(tokens: int, last: int) -> None:
    positions = parity.spread_positions(tokens, last)
    assert len(positions) == tokens
    assert (positions.diff() > 0).all()
    if tokens > parity.ADJACENT:  # a shorter text has adjacent positions only
        # If there are more tokens than positions up to ``last``, no position is skipped.
        assert positions[-1] == max(last, tokens - 1)


@pytest.mark.parametrize(
    ("family", "changes", "difference"),
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
def test_a_checkpoint_with_the_config_json_of_another_model_is_refused(
    family: str,
    changes: dict[str, Any],
    difference: str,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Changes ``config.json`` in a checkpoint: it no longer matches the weights and NeMo's config.

    ``difference`` is the weight or the value in NeMo's config that the error must name.
    """
    # This case removes the scaling, so its source must have one.
    scaling = {"rope_scaling": SCALING} if changes == {"rope_scaling": None} else {}
    source = write_tiny_model(tmp_path / "hf", text_file, family, train=False, **ODD, **scaling)
    checkpoint = tmp_path / "m.nemo"
    convert.to_nemo(source, checkpoint)

    def remove_defaults(objects: dict[str, Any]) -> None:
        """Removes fields that io.json does not store if they have the default values."""
        for item in objects.values():
            item["items"] = [
                pair for pair in item["items"] if not re.search("scale_f|pre_softmax", pair[0])
            ]

    change_context(checkpoint, remove_defaults)
    convert.require_matching_config(checkpoint)  # raises nothing: the defaults match
    edit_json("config.json", **changes)(nemo.side_folder(checkpoint))
    for arguments in (("to-hf", checkpoint, tmp_path / "back"), ("verify", source, checkpoint)):
        assert convert_by_command(*arguments) == 1
        assert difference in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def change_setting(name: str, value: object) -> Change:
    """Sets a field of NeMo's model config in ``io.json``."""
    label, leaf = f"Attr(name='{name}')", {"type": "leaf", "value": value, "paths": []}

    def change(objects: dict[str, Any]) -> None:
        for item in objects.values():
            if "<root>.model.config" in item.get("paths", ()):
                items = [pair for pair in item["items"] if pair[0] != label]
                item["items"] = [*items, [label, leaf]]

    return lambda checkpoint: change_context(checkpoint, change)


def change_class(data: bytes) -> bytes:
    """Changes the class of NeMo's model config."""
    assert b'"LlamaConfig"' in data
    return data.replace(b'"LlamaConfig"', b'"Llama99Config"')


def zero_second_half(data: bytes) -> bytes:
    """Writes zeros, as a disk does that lost the second half of a file."""
    return data[: len(data) // 2].ljust(len(data), b"\0")


def remove_entry(checkpoint: Path) -> None:
    """Removes the place of a tensor from ``.metadata``."""
    metadata = read_metadata(checkpoint / nemo.WEIGHTS)
    weight = next(i for i in metadata.storage_data if i.fqn.endswith("final_layernorm.weight"))
    del metadata.storage_data[weight]
    (checkpoint / nemo.WEIGHTS / ".metadata").write_bytes(pickle.dumps(metadata))


METADATA, SHARD = "weights/.metadata", "weights/__0_0.distcp"
IO_JSON, SIDE = "context/io.json", "context/hf/"
IS_DAMAGED = "is missing or damaged"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Other values of NeMo's config that change logits.
        (change_setting("seq_len_interpolation_factor", 2.0), "seq_len_interpolation_facto"),
        (change_setting("rotary_percent", 0.5), "rotary_percent=0.5"),
        (change_setting("layernorm_zero_centered_gamma", True), "zero_centered_gamma=True"),
        (change_bytes(SHARD, lambda data: data[:-100]), IS_DAMAGED),
        (change_bytes(SHARD, zero_second_half), IS_DAMAGED),
        (write_file(SHARD, ""), f"__0_0.distcp {IS_DAMAGED}: EOFError: the file is too"),
        (remove_files(SHARD), IS_DAMAGED),
        (remove_entry, IS_DAMAGED),
        (write_file(METADATA, ""), f"{METADATA} {IS_DAMAGED}"),
        (write_file(METADATA, pickle.dumps({})), f"{METADATA} {IS_DAMAGED}"),
        (
            write_file(METADATA, b"\x80\x04\x8c\x02\xd8A."),
            f"{METADATA} {IS_DAMAGED}: UnicodeDecodeError",
        ),
        (write_file(IO_JSON, "{}"), "has no objects"),
        (write_file(IO_JSON, '{"objects": [1]}'), f"{IO_JSON} {IS_DAMAGED}"),
        (
            write_file(IO_JSON, '{"objects": {"a": {}}}'),
            f"{IO_JSON} {IS_DAMAGED}: ValueError: it has no",
        ),
        (change_bytes(IO_JSON, change_class), "the installed NeMo does not have"),
        (write_file(f"{SIDE}tokenizer.json", ""), "tokenizer.json is not a tokenizer"),
        (
            write_file(f"{SIDE}generation_config.json", "{"),
            f"{SIDE}generation_config.json is not valid",
        ),
        (edit_json(f"{SIDE}config.json", num_hidden_layers=10**9), "(1000000000,"),
        (
            edit_json(f"{SIDE}config.json", tie_word_embeddings=False),
            "output_layer.weight of shape None",
        ),
        (  # the vocabulary is 3 tokens smaller than the embedding
            edit_json(f"{SIDE}config.json", vocab_size=290),
            "word_embeddings.weight of shape (293, ",
        ),
    ],
)
def test_changed_and_damaged_checkpoints_are_refused(
    odd_llama: Path,
    odd_nemo: Path,
    tmp_path: Path,
    change: Change,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = tmp_path / "m.nemo"
    shutil.copytree(odd_nemo, checkpoint)
    change(checkpoint)
    for arguments in (
        ("to-hf", checkpoint, tmp_path / "new" / "back"),
        ("verify", odd_llama, checkpoint),
    ):
        assert convert_by_command(*arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize(
    "change",
    [edit_json(IO_JSON, root=3), lambda nemo2: shutil.rmtree(nemo2 / "context" / "artifacts")],
)
def test_a_context_that_nemo_cannot_open_gives_one_message(
    change: Change, odd_nemo: Path, tmp_path: Path
) -> None:
    """``to-hf`` does not need these parts of the context."""
    checkpoint = shutil.copytree(odd_nemo, tmp_path / "m.nemo")
    change(checkpoint)
    with pytest.raises(RecipeError, match=f"context {IS_DAMAGED}"):
        nemo.restore_model(checkpoint)


def test_verify_checks_the_folder_and_the_sizes_first(
    source: Path, odd_nemo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert_by_command("verify", source / "hf", odd_nemo) == 1
    assert f"hidden_size={EVEN['hidden_size']} and {ODD['hidden_size']}" in capsys.readouterr().err
    folder = shutil.copytree(source / "hf", tmp_path / "hf")
    edit_weights(lambda tensors: tensors.pop("model.norm.weight"))(folder)
    assert convert_by_command("verify", folder, source / "m.nemo") == 1
    assert "has no model.norm.weight" in capsys.readouterr().err


def test_wrong_paths_of_commands_give_one_message(
    odd_llama: Path, odd_nemo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("a file")
    link = tmp_path / "link"
    link.symlink_to("missing")
    for arguments, message in (
        (("verify", odd_llama, tmp_path / "missing"), "missing does not exist"),
        (("verify", tmp_path / "missing", odd_nemo), "missing does not exist"),
        (("to-hf", odd_nemo, file), "exists and is not empty"),
        (("to-nemo", odd_llama, file / "x"), "cannot be created: "),
        (("to-hf", odd_nemo, file / "a" / "x"), "cannot be created: "),
        (("to-nemo", odd_nemo, tmp_path / "x"), "is a NeMo checkpoint, not a Hugging Face folder"),
        (("check", file), "is a file, not a Hugging Face folder"),
        (("verify", odd_llama, file), "file cannot be unpacked safely"),
        (("to-nemo", odd_llama, link), "link exists already"),
        (("to-hf", odd_nemo, link), "link is a symbolic link"),
    ):
        assert convert_by_command(*arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
