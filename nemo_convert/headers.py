"""Reads which tensors a model has from the headers of its safetensors files. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_convert.hub import INDEX_FILE, WEIGHTS_FILE, hub_model, is_hub_id, unreachable
from recipes.core.errors import RecipeError
from recipes.core.files import read_json

ROTARY_BUFFER = "rotary_emb.inv_freq"
"""End of the name of a buffer that old checkpoints store. It follows from the config, so it is left
out of all headers."""
LFS_POINTER = b"version https://git-lfs"
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: str
    dtype: str
    """As safetensors spells it: ``BF16``, ``F32``, ``F8_E4M3``."""
    shape: tuple[int, ...]
    begin: int = 0
    """Offset of its first byte in a local file."""
    end: int = 0
    """Offset behind its last byte in a local file."""


Headers = Mapping[str, StoredTensor]
"""Tensors by name."""


def weight_files(folder: Path) -> list[Path]:
    """Lists the weight files that transformers would load, without reading them.

    Other safetensors files, such as ``consolidated.safetensors`` or an adapter, are left out.

    Raises:
        RecipeError: There are no weights, or a shard of the index is missing.
    """
    if (whole := folder / WEIGHTS_FILE).is_file():
        return [whole]
    if not (folder / INDEX_FILE).is_file():
        raise RecipeError(
            f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}.",
            "save the model with save_pretrained(..., safe_serialization=True)",
        )
    files = [folder / name for name in sorted(set(read_index(folder).values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise RecipeError(
            f"{folder}: {', '.join(missing)} of {INDEX_FILE} is missing.",
            "download the model again, or copy all of its shards",
        )
    return files


def read_index(folder: Path) -> dict[str, str]:
    """Returns the shard of each tensor: ``weight_map`` in the index.

    Raises:
        RecipeError: The index is damaged.
    """
    index = read_json(folder / INDEX_FILE)
    if "metadata" not in index:  # transformers 4 fails without it
        raise RecipeError(f"{folder / INDEX_FILE} has no metadata.", 'add "metadata": {} to it')
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise RecipeError(f"{folder / INDEX_FILE} has no weight_map.", "download the model again")
    return {name: file for name, file in files.items() if not name.endswith(ROTARY_BUFFER)}


def read_headers(hf_path: str) -> dict[str, StoredTensor]:
    """Returns the tensors of a model folder or hub model; downloads headers only.

    Raises:
        RecipeError: A file is missing or damaged.
    """
    if is_hub_id(hf_path):
        return _read_hub_headers(hf_path)
    headers: dict[str, StoredTensor] = {}
    for path in weight_files(Path(hf_path)):
        headers |= _read_header(path)
    return headers


def same_bytes(folder: Path, first: StoredTensor, second: StoredTensor) -> bool:
    """Returns whether two tensors of a local folder have the same type, shape and bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with (folder / first.file).open("rb") as one, (folder / second.file).open("rb") as other:
        one.seek(first.begin)
        other.seek(second.begin)
        remaining = first.end - first.begin
        while remaining > 0:
            size = min(CHUNK_BYTES, remaining)
            if one.read(size) != other.read(size):
                return False
            remaining -= size
    return True


def _read_header(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if not start:
        raise RecipeError(f"{path} is empty.", "download it again")
    if start == LFS_POINTER:
        raise RecipeError(
            f"{path} is a Git LFS pointer, not the weights.", f"git -C {path.parent} lfs pull"
        )
    try:
        with safe_open(path, framework="np"):  # verifies the header and the length of the file
            pass
    except SafetensorError as error:
        raise RecipeError(f"{path} is damaged: {error}.", "download it again") from error
    # safe_open gives no offsets. The format is an 8-byte length and a JSON header, then the data.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path.name,
            entry["dtype"],
            tuple(entry["shape"]),
            *(8 + length + offset for offset in entry["data_offsets"]),
        )
        for name, entry in header.items()
        if not name.endswith(ROTARY_BUFFER)
    }


def _read_hub_headers(hf_path: str) -> dict[str, StoredTensor]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        metadata = HfApi().get_safetensors_metadata(**hub_model(hf_path))
    except NotASafetensorsRepoError as error:
        raise RecipeError(
            f"{hf_path} has neither {WEIGHTS_FILE} nor {INDEX_FILE} on the hub.",
            "use a model with safetensors weights",
        ) from error
    except Exception as error:
        raise unreachable(hf_path, "the weights' headers", error) from error
    return {
        name: StoredTensor(file, tensor.dtype, tuple(tensor.shape))
        for file, content in metadata.files_metadata.items()
        for name, tensor in content.tensors.items()
        if not name.endswith(ROTARY_BUFFER)
    }
