"""Conversion keeps the logits and the exact bits of every weight, and refuses invalid folders."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from nemo_convert import convert, hf, nemo
from nemo_convert.families import LLAMA3_ROPE
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT, read_json, write_json
from tests.support.conversion import assert_same_weights, convert_by_command, read_tensors
from tests.support.folder_changes import WEIGHTS, edit_json, edit_weights
from tests.support.hub import fake_hub, run_with_hub
from tests.support.models import EVEN, ODD, write_tiny_model


def test_round_trip_with_scaled_rope(text_file: Path, tmp_path: Path) -> None:
    rope = {"rope_scaling": {**LLAMA3_ROPE, "factor": 32.0}}
    # The path has characters with a meaning in Hydra's overrides, and one that is not ASCII.
    source = write_tiny_model(tmp_path / "ü=a, b", text_file, **EVEN, **rope, train=False)
    assert convert_by_command("to-nemo", source, tmp_path / "m.nemo") == 0
    assert convert_by_command("to-hf", tmp_path / "m.nemo", tmp_path / "back") == 0
    assert_same_weights(source, tmp_path / "back")


@pytest.mark.parametrize("command", ["to-nemo", "to-hf", "verify"])
def test_commands_disable_tensorfloat_32(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands set the variable first. Then they fail, because the models are missing."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert convert_by_command(command, tmp_path / "first", tmp_path / "second") == 1
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


def test_written_shards_have_an_index_that_transformers_reads(
    odd_llama: Path, tmp_path: Path
) -> None:
    hf.write_weights(iter(read_tensors(odd_llama).items()), tmp_path, shard_bytes=60_000)
    hf.copy_side_files(odd_llama, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert_same_weights(odd_llama, tmp_path)
    loaded = hf.load_causal_lm(tmp_path).state_dict()
    assert torch.equal(loaded["model.norm.weight"], read_tensors(odd_llama)["model.norm.weight"])


def test_an_export_has_rope_theta_instead_of_rope_parameters(
    odd_llama: Path, tmp_path: Path
) -> None:
    """transformers 4 ignores ``rope_parameters``, and would use its default theta of 10,000."""
    folder, checkpoint, back = (tmp_path / name for name in ("hf", "m.nemo", "back"))
    shutil.copytree(odd_llama, folder)
    config = read_json(folder / "config.json")
    theta = config.pop("rope_theta")
    assert theta != 10_000
    del config["rope_scaling"]
    config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    write_json(folder / "config.json", config)
    assert convert_by_command("to-nemo", folder, checkpoint) == 0
    assert convert_by_command("to-hf", checkpoint, back) == 0
    assert read_json(back / "config.json")["rope_theta"] == theta
    # The checkpoint's config may also have the new spelling, if it was copied there.
    config |= {"torch_dtype": None, "dtype": None}
    write_json(nemo.side_folder(checkpoint) / "config.json", config)
    assert convert_by_command("to-hf", checkpoint, tmp_path / "again") == 0
    again = read_json(tmp_path / "again" / "config.json")
    assert (again["rope_theta"], again["torch_dtype"]) == (theta, "float32")


def test_a_tokenizer_that_transformers_cannot_load_is_refused_before_weights_are_read(
    odd_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(odd_llama, tmp_path / "hf")
    # LlamaTokenizer fails if it must add an EOS token and has none.
    no_eos = {"add_bos_token": False, "add_eos_token": True, "eos_token": None}
    edit_json("tokenizer_config.json", tokenizer_class="LlamaTokenizer", **no_eos)(folder)
    assert convert_by_command("check", folder) == 1
    assert "cannot load the tokenizer" in capsys.readouterr().err
    assert convert_by_command("to-nemo", folder, tmp_path / "m.nemo") == 1
    assert not (tmp_path / "m.nemo").exists()
    monkeypatch.setenv("HF_TOKEN", "token")
    code = (
        "from nemo_convert import hf\ntry: hf.resolve('me/tiny')\nexcept Exception as e: print(e)"
    )
    with fake_hub("token") as hub:
        hub.models["me/tiny"] = {file.name: file.read_bytes() for file in folder.iterdir()}
        assert "cannot load the tokenizer" in run_with_hub(hub, tmp_path / "home", code)
        assert hub.downloaded_bytes(WEIGHTS) == 0


def test_a_check_loads_the_tokenizer_without_torch(odd_llama: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "nemo_convert", "check", odd_llama]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    imports = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "transformers.tokenization_utils_fast" in imports
    assert "torch" not in imports


def test_verify_accepts_a_packed_equal_model_and_refuses_a_changed_one(
    odd_llama: Path, odd_nemo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nemo.pack(odd_nemo, tmp_path / "packed.nemo")
    assert convert_by_command("verify", tmp_path / "packed.nemo", odd_llama) == 0
    changed = shutil.copytree(odd_llama, tmp_path / "changed")
    edit_weights(lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"][0, 0].add_(1e-3))(
        changed
    )
    assert convert_by_command("verify", changed, odd_nemo) == 1
    assert "parity gate failed" in capsys.readouterr().err
    # ``verify`` requires a folder and a checkpoint, so two folders are refused.
    assert convert_by_command("verify", odd_llama, odd_llama) == 1


def test_unsafe_and_incomplete_archives_are_refused(tmp_path: Path) -> None:
    """The first archive has a path outside its directory. Of the second, half is missing."""
    unsafe, half = tmp_path / "unsafe.nemo", tmp_path / "half.nemo"
    with tarfile.open(unsafe, "w") as archive:
        entry = tarfile.TarInfo("../outside")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
    (tmp_path / "weights").write_bytes(random.Random(0).randbytes(100_000))
    with tarfile.open(half, "w:gz") as archive:
        archive.add(tmp_path / "weights", "weights")
    half.write_bytes(half.read_bytes()[:50_000])
    for file in (unsafe, half):
        with pytest.raises(RecipeError, match="cannot be unpacked safely"):
            nemo.open_checkpoint(file, tmp_path / "scratch")
    assert not (tmp_path / "outside").exists()


# Loads each checkpoint with stock NeMo. Prints "SUM", the sum of all absolute weights, the name of
# the model's class, and the size of the tokenizer's vocabulary.
STOCK_NEMO_SCRIPT = """
import sys
from pathlib import Path

def main():
    import fiddle
    from nemo import lightning as nl
    from nemo.collections.llm.inference.base import _setup_trainer_and_restore_model
    from nemo.lightning.io import load_context, pl

    pl._fix_tensors_device = lambda checkpoint: checkpoint  # the original fails without CUDA
    for path in map(Path, sys.argv[1:]):
        config = load_context(path / "context", subpath="model", build=False)
        for fusion in ("apply_rope_fusion", "masked_softmax_fusion", "bias_activation_fusion",
                       "bias_dropout_fusion", "gradient_accumulation_fusion", "persist_layer_norm"):
            setattr(config.config, fusion, False)
        config.config.use_cpu_initialization = True
        model = fiddle.build(config)
        strategy = nl.MegatronStrategy(ddp="pytorch", setup_optimizers=False)
        trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=strategy)
        _setup_trainer_and_restore_model(path, trainer, model)
        total = sum(float(p.double().abs().sum()) for p in model.parameters())
        assert not any(name.startswith(("recipes", "nemo_convert")) for name in sys.modules)
        print("SUM", total, type(model).__name__, model.tokenizer.vocab_size)

if __name__ == "__main__":
    main()
"""


def test_stock_nemo_loads_checkpoints_without_our_code(text_file: Path, tmp_path: Path) -> None:
    """Runs NeMo's own loader on the CPU.

    The script turns off what needs a GPU: fused kernels, and moving tensors to a GPU. The MoE
    family is not tested: without TransformerEngine, stock Megatron uses other checkpoint keys for
    experts.
    """
    script = tmp_path / "stock.py"
    script.write_text(STOCK_NEMO_SCRIPT)
    checkpoints, expected = [], []
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        write_tiny_model(tmp_path / family, text_file, family, train=False, **ODD)
        checkpoints.append(tmp_path / f"{family}.nemo")
        convert.to_nemo(tmp_path / family, checkpoints[-1])
        total = sum(float(t.double().abs().sum()) for t in read_tensors(tmp_path / family).values())
        vocab_size = 288  # of the tokenizer, which has fewer tokens than the model has embeddings
        class_name = f"{family.capitalize()}Model"
        expected.append([pytest.approx(total, rel=1e-6), class_name, vocab_size])
    done = subprocess.run(
        [sys.executable, script, *checkpoints],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("SUM")]
    actual = [[float(total), class_name, int(size)] for _, total, class_name, size in lines]
    assert actual == expected


def test_context_keeps_the_settings_for_a_gpu(odd_nemo: Path) -> None:
    """A checkpoint that was written on a CPU must not slow a GPU down."""
    text = (odd_nemo / "context" / "model.yaml").read_text()
    assert "sdpa" not in text
    assert "use_cpu_initialization: false" in text
    assert "apply_rope_fusion: true" in text
