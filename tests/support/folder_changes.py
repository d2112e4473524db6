"""Changes of Hugging Face folders, from which ``variants`` makes test cases.

Functions such as ``add_weight`` only return a ``Change``. Calling the ``Change`` with a folder then
changes this folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[[Path], None]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Absent(Enum):
    """Marks a key that ``edit_json`` removes."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


@dataclass(frozen=True)
class Variant:
    """A change of a folder, and the expected result of converting the changed folder."""

    name: str
    change: Change
    refusal: str = ""
    """Regular expression of the error message; empty if the folder is converted exactly."""
    base: str = "llama"
    """Folder to change: FAMILY, saved by transformers 4, or FAMILY-5, saved by transformers 5."""
    reads_weights: bool = False
    """Whether the fault is in the values of weights, which only a conversion reads."""


def edit_json(file: str, **values: Any) -> Change:
    """Changes keys of a JSON file."""

    def change(folder: Path) -> None:
        old = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        new = {key: value for key, value in (old | values).items() if value is not ABSENT}
        (folder / file).write_text(json.dumps(new))

    return change


def edit_config(**values: Any) -> Change:
    """Changes keys of ``config.json``."""
    return edit_json("config.json", **values)


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Change:
    """Calls ``change`` on the dictionary of all weights, and saves the changed weights."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return apply


def add_weight(name: str, *shape: int) -> Change:
    """Adds a weight."""
    return edit_weights(lambda tensors: tensors.update({name: torch.ones(*shape)}))


def drop_weight(name: str) -> Change:
    """Removes a weight."""
    return edit_weights(lambda tensors: tensors.pop(name))


def cast_weights(dtype: torch.dtype, word: str = "") -> Change:
    """Casts the weights whose names contain a word."""
    return edit_weights(
        lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items() if word in n})
    )


def write_file(file: str, text: str | bytes) -> Change:
    """Writes a file, and creates its parent directories."""

    def change(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def remove_files(*files: str) -> Change:
    """Removes files."""

    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink(missing_ok=True)

    return change


def all_of(*changes: Change) -> Change:
    """Combines several changes, which are made in order."""

    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def split_weights(names: tuple[str, str], extra: Mapping[str, str] | None = None) -> Change:
    """Splits the weights into two files and an index. The index also has the entries ``extra``."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        index = {}
        for number, file in enumerate(names):
            shard = dict(list(tensors.items())[number::2])
            (folder / file).parent.mkdir(exist_ok=True)
            save_file(shard, folder / file, {"format": "pt"})
            index |= dict.fromkeys(shard, file)
        (folder / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": {**index, **(extra or {})}})
        )

    return change


def add_weights_file(file: str) -> Change:
    """Adds a file with weights of the same names but other values."""

    def change(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        save_file({n: t + 1 for n, t in load_file(folder / WEIGHTS).items()}, folder / file)

    return change


def untie(tensors: dict[str, Tensor]) -> None:
    """Adds a head that differs from the embedding in one row. For ``edit_weights``."""
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][7] += 0.01


def set_last_embedding(value: float) -> Change:
    """Sets the embedding's last row, which no token of ``parity.TEXT`` uses."""
    return edit_weights(lambda tensors: tensors[EMBEDDING][-1].fill_(value))


def use_sentencepiece(folder: Path) -> None:
    """Replaces the tokenizer with a sentencepiece model."""
    from sentencepiece import SentencePieceTrainer

    for file in folder.glob("tokenizer*"):
        file.unlink()
    SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["the hat on that hen", "ten tan ants eat a note", "o no, not the tea"] * 99
        ),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    edit_json("tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_bos_token=True)(folder)


def use_vocabulary_and_merges(folder: Path) -> None:
    """Replaces the tokenizer with ``vocab.json`` and ``merges.txt``, the files of GPT-2."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    edit_json("tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token="<eos>")(folder)


def add_tokens(folder: Path) -> None:
    """Adds ten tokens. The embedding has no rows for the last four, 294 to 297."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    [token] = tokenizer["added_tokens"]
    tokenizer["added_tokens"] += [
        {**token, "id": 288 + n, "content": f"<new{n}>"} for n in range(10)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def link_weights(folder: Path) -> None:
    """Replaces the weights with a link to them, as in the cache of ``huggingface_hub``."""
    blob = folder.with_name(folder.name + ".blob")
    shutil.move(folder / WEIGHTS, blob)
    (folder / WEIGHTS).symlink_to(blob)


def truncate_weights(folder: Path) -> None:
    """Removes the last bytes of the weights."""
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-7])


def change_nothing(folder: Path) -> None:
    """Changes nothing."""
