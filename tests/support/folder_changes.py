"""Changes of Hugging Face folders and NeMo checkpoints, from which ``variants`` makes test cases.

A ``Change`` is a function that changes the folder of its argument. Some functions here are
themselves a ``Change``, such as ``add_tokens``. Others return a ``Change``, such as ``add_weight``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[[Path], None]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
SHARDS = ("a.safetensors", "b.safetensors")


class Absent(Enum):
    """Type of ``ABSENT``, the value that makes ``edit_json`` remove a key."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


def edit_json(file: str, **values: Any) -> Change:
    """Sets top-level keys of a JSON file, which may be missing; ``ABSENT`` removes a key."""

    def change(folder: Path) -> None:
        old = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        new = {key: value for key, value in (old | values).items() if value is not ABSENT}
        (folder / file).write_text(json.dumps(new))

    return change


def edit_config(**values: Any) -> Change:
    """Sets top-level keys of ``config.json``; ``ABSENT`` removes a key."""
    return edit_json("config.json", **values)


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Change:
    """Loads all weights, calls ``change`` to edit their dictionary in place, and saves them."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return apply


def add_weight(name: str, *shape: int) -> Change:
    """Adds a weight of ones."""
    return edit_weights(lambda tensors: tensors.update({name: torch.ones(*shape)}))


def drop_weight(name: str) -> Change:
    """Removes a weight."""
    return edit_weights(lambda tensors: tensors.pop(name))


def cast_weights(dtype: torch.dtype, word: str = "") -> Change:
    """Casts the weights whose names contain ``word``; by default, casts all weights."""

    def cast(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if word in name:
                tensors[name] = tensor.to(dtype)

    return edit_weights(cast)


def write_file(file: str, text: str | bytes) -> Change:
    """Writes a file, and creates its parent directories."""

    def change(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def change_bytes(file: str, change: Callable[[bytes], bytes]) -> Change:
    """Changes the content of a file."""

    def apply(folder: Path) -> None:
        (folder / file).write_bytes(change((folder / file).read_bytes()))

    return apply


def remove_files(*files: str) -> Change:
    """Removes files. The folder may lack some of them."""

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


def split_weights(shards: tuple[str, str], extra: Mapping[str, str] | None = None) -> Change:
    """Splits the weights into two shards and an index.

    Args:
        shards: Files of the shards. Weights are assigned to them alternately.
        extra: Files of further weights, by weight, which only the index's ``weight_map`` lists.
            May also replace the files of existing weights.
    """

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        weight_map: dict[str, str] = {}
        for number, file in enumerate(shards):
            shard = dict(list(tensors.items())[number::2])  # every second weight
            (folder / file).parent.mkdir(exist_ok=True)
            save_file(shard, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
        weight_map |= extra or {}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


def add_weights_file(file: str) -> Change:
    """Adds another file with weights of the same names, whose values are larger by 1."""

    def change(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        tensors = load_file(folder / WEIGHTS)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / file)

    return change


def untie(tensors: dict[str, Tensor]) -> None:
    """Adds a head that differs from the embedding in one row. Pass it to ``edit_weights``."""
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][7] += 0.01  # any row


def use_sentencepiece(folder: Path) -> None:
    """Replaces the tokenizer with a sentencepiece model, trained on a few sentences."""
    from sentencepiece import SentencePieceTrainer

    for file in folder.glob("tokenizer*"):
        file.unlink()
    sentences = ["the hat on that hen", "ten tan ants eat a note", "o no, not the tea"] * 99
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=290,  # at most: the embedding has 294 rows
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    edit_json(TOKENIZER, tokenizer_class="LlamaTokenizer", add_bos_token=True)(folder)


def use_vocabulary_and_merges(folder: Path) -> None:
    """Replaces the tokenizer with ``vocab.json`` and ``merges.txt``, the files of GPT-2."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    # Depending on its version, tokenizers saves a merge as "a b" or as ["a", "b"].
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    edit_json(TOKENIZER, tokenizer_class="GPT2Tokenizer", unk_token="<eos>")(folder)


def add_tokens(folder: Path) -> None:
    """Adds ten tokens, with ids 288 to 297. The embedding has 294 rows: none for the last four."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    [token] = tokenizer["added_tokens"]  # <eos>; the tokenizer has ids 0 to 287
    new_tokens = [{**token, "id": 288 + n, "content": f"<new{n}>"} for n in range(10)]
    edit_json("tokenizer.json", added_tokens=[token, *new_tokens])(folder)


def link_weights(folder: Path) -> None:
    """Moves the weights out of the folder and links to them, as the ``huggingface_hub`` cache."""
    blob = folder.with_name(folder.name + ".blob")
    shutil.move(folder / WEIGHTS, blob)
    (folder / WEIGHTS).symlink_to(blob)


def change_nothing(folder: Path) -> None:
    """Changes nothing."""
