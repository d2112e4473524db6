"""Tests that code which comes with a model, a tokenizer or a checkpoint does not run.

Most tests plant code that would create a file, and check that the file does not exist.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType

from nemo_convert import hf, nemo, trust
from nemo_convert.sharded import read_sharded
from nemo_convert.tokenizer_files import load_tokenizer
from recipes.core.errors import RecipeError
from tests.support.conversion import assert_same_weights, change_context, convert_by_command
from tests.support.folder_changes import edit_config, edit_json


@pytest.fixture
def folder_with_code(
    odd_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A copy of a model's folder, and the path of a file. Tests plant code that creates this file.

    If transformers asks whether to run the code, the answer is yes.
    """
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    return shutil.copytree(odd_llama, tmp_path / "hf"), tmp_path / "ran"


def test_code_of_a_tokenizer_does_not_run(
    folder_with_code: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, created_by_code = folder_with_code
    (folder / "custom.py").write_text(f"open({str(created_by_code)!r}, 'w')\n")
    auto_map = {"AutoTokenizer": [None, "custom.Own"]}  # no slow class, and a fast class
    edit_json("tokenizer_config.json", auto_map=auto_map, tokenizer_class="Own")(folder)
    # A conversion checks the class before it loads the tokenizer, so the loader is called too.
    with pytest.raises(RecipeError):
        load_tokenizer(folder)
    assert convert_by_command("to-nemo", folder, tmp_path / "m.nemo") == 1
    assert not created_by_code.exists()


def test_code_of_a_model_does_not_run(folder_with_code: tuple[Path, Path], tmp_path: Path) -> None:
    folder, created_by_code = folder_with_code
    (folder / "own.py").write_text(f"open({str(created_by_code)!r}, 'w')\n")
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit_config(model_type="own", auto_map=auto_map)(folder)
    # A conversion checks the config before it loads the model, so the loader is called too.
    with pytest.raises(ValueError, match="trust_remote_code"):
        hf.load_causal_lm(folder)
    assert convert_by_command("to-nemo", folder, tmp_path / "m.nemo") == 1
    assert not created_by_code.exists()


def test_code_for_generation_does_not_run(folder_with_code: tuple[Path, Path]) -> None:
    """transformers 4 runs ``custom_generate/generate.py`` even with trust_remote_code=False."""
    folder, created_by_code = folder_with_code
    (folder / "custom_generate").mkdir()
    code = f"open({str(created_by_code)!r}, 'w')\ndef generate(model): pass\n"
    (folder / "custom_generate" / "generate.py").write_text(code)
    model = hf.load_causal_lm(folder)
    assert not created_by_code.exists()
    assert model.generation_config.temperature == 0.7  # generation_config.json is still read


def test_context_that_would_run_code_is_refused(
    odd_llama: Path, odd_nemo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NeMo makes the planted call if it opens the context. ``to-hf`` does not open the context.

    The test replaces AutoTokenizer(pretrained_model_name=NAME) with getoutput(cmd="touch FILE").
    """
    hostile, created_by_call = tmp_path / "hostile.nemo", tmp_path / "ran"
    shutil.copytree(odd_nemo, hostile)
    file = hostile / nemo.CONTEXT / "io.json"
    text = file.read_text()
    tokenizer = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer"
    template = '"module": "{}", "name": "{}"'  # how io.json names a Python object
    assert template.format(*tokenizer) in text
    text = text.replace(template.format(*tokenizer), template.format("subprocess", "getoutput"))
    context = json.loads(text.replace('"pretrained_model_name"', '"cmd"'))
    for item in context["objects"].values():
        for pair in item["items"]:  # [label, value]
            if pair[0] == "Attr(name='pretrained_model_name')":
                pair[:] = "Attr(name='cmd')", {"type": "leaf", "value": f"touch {created_by_call}"}
    file.write_text(json.dumps(context))
    assert convert_by_command("verify", odd_llama, hostile) == 1
    error = capsys.readouterr().err
    assert "io.json names subprocess.getoutput: opening it would run that code." in error
    assert "python -m nemo_convert to-hf SRC DST" in error
    assert convert_by_command("to-hf", hostile, tmp_path / "converted") == 0
    assert_same_weights(odd_llama, tmp_path / "converted")
    assert not created_by_call.exists()
    # The result of the call is not a tokenizer, so NeMo may fail after the call.
    with contextlib.suppress(Exception), mock.patch.dict(os.environ, {trust.TRUST: "1"}):
        nemo.restore_model(hostile)
    assert created_by_call.exists(), "the planted call must work when the checkpoint is trusted"


def name_paths(objects: dict[str, Any]) -> None:
    """Plants a call in an object that is named like the harmless lists of a context, ``paths``.

    The metadata name the tokenizer's class. They get the key "paths", and another function instead
    of the class.
    """
    metadata = objects["auto_tokenizer_1"]["metadata"]
    objects["paths"] = objects.pop(metadata["key"])
    metadata["key"] = "paths"
    objects["paths"]["items"][0][1] |= {"module": "subprocess", "name": "getoutput"}


def relabel_trust(objects: dict[str, Any]) -> None:
    """Sets trust_remote_code under the label of another argument.

    Fiddle takes the names of arguments from the metadata, not from the label of an item. Adds the
    argument's name to the metadata and its value to the tokenizer, both with the label use_fast.
    """
    metadata = objects[objects["auto_tokenizer_1"]["metadata"]["key"]]
    names = objects[metadata["items"][1][1]["key"]]
    for target, value in ((names, "trust_remote_code"), (objects["auto_tokenizer_1"], True)):
        leaf = {"type": "leaf", "value": value, "paths": []}
        target["items"].append(["Attr(name='use_fast')", leaf])


@pytest.mark.parametrize(
    ("plant", "refusal"),
    [(name_paths, r"names subprocess\.getoutput"), (relabel_trust, "sets trust_remote_code")],
)
def test_hidden_code_in_a_context_is_refused(
    plant: Callable[[dict[str, Any]], None], refusal: str, odd_nemo: Path, tmp_path: Path
) -> None:
    hostile = shutil.copytree(odd_nemo, tmp_path / "hostile.nemo")
    change_context(hostile, plant)
    with pytest.raises(RecipeError, match=refusal):
        nemo.restore_model(hostile)


class Call:
    """Is pickled as the call ``function(*arguments)``."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def test_metadata_may_name_members_of_enums_as_python_3_11_2_does(tmp_path: Path) -> None:
    """Python 3.11.2 pickles a member of an enum as a call of ``getattr``.

    Such calls are allowed, but not calls that return another attribute.
    """
    file = tmp_path / ".metadata"
    file.write_bytes(pickle.dumps(Call(getattr, WriteItemType, "TENSOR")))
    assert trust.read_metadata(tmp_path) is WriteItemType.TENSOR
    for owner, name in ((WriteItemType, "__class__"), (type(tmp_path), "unlink")):
        file.write_bytes(pickle.dumps(Call(getattr, owner, name)))
        with pytest.raises(RecipeError, match="opening it would run that code"):
            trust.read_metadata(tmp_path)


def test_metadata_that_would_run_code_is_refused(
    odd_nemo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile, created = shutil.copytree(odd_nemo, tmp_path / "hostile.nemo"), tmp_path / "ran"
    planted = Call(os.system, f"touch {created}")  # the module of os.system is posix
    (hostile / nemo.WEIGHTS / ".metadata").write_bytes(pickle.dumps(planted))
    assert convert_by_command("to-hf", hostile, tmp_path / "back") == 1
    assert ".metadata names posix.system: opening it" in capsys.readouterr().err
    with pytest.raises(RecipeError, match=r"posix\.system"):
        read_sharded({}, hostile / nemo.WEIGHTS)
    assert not created.exists()


def test_an_object_under_the_key_of_a_weight_is_refused(
    odd_llama: Path, odd_nemo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch unpickles objects in shards without restrictions.

    The planted entry has the attributes of a tensor, which pass Megatron's check of shapes, and
    leads to a pickle at the end of a shard.
    """
    hostile, created = shutil.copytree(odd_nemo, tmp_path / "hostile.nemo"), tmp_path / "ran"
    weights, key = hostile / nemo.WEIGHTS, "module.decoder.final_layernorm.weight"
    metadata = trust.read_metadata(weights)
    planted = BytesStorageMetadata()
    vars(planted).update(vars(metadata.state_dict_metadata[key]))
    metadata.state_dict_metadata[key] = planted
    pickled = io.BytesIO()
    torch.save(Call(os.system, f"touch {created}"), pickled)
    shard = weights / "__0_0.distcp"
    start, size = shard.stat().st_size, len(pickled.getvalue())
    with shard.open("ab") as file:
        file.write(pickled.getvalue())
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo(shard.name, start, size)
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))

    for arguments in (("to-hf", hostile, tmp_path / "back"), ("verify", odd_llama, hostile)):
        assert convert_by_command(*arguments) == 1
        assert f"stores {key} as a Python object" in capsys.readouterr().err
    nemo.initialize(nemo.Parallelism())
    core = nemo.build_core(nemo.restore_model(odd_nemo), nemo.Parallelism())
    with pytest.raises(RecipeError, match="as a Python object"):
        nemo.load_weights(core, hostile)
    assert not created.exists()
