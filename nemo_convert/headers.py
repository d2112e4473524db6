"""Reads the names, types and shapes of a model's tensors from safetensors headers. Torch-free."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nemo_convert.hub import (
    INDEX_FILE,
    ROTARY_BUFFER,
    WEIGHTS_FILE,
    hub_model,
    is_hub_id,
    read_index,
    side_folder,
    unreachable_error,
)
from recipes.core.errors import RecipeError

LFS_POINTER = b"version https://git-lfs"
FORMATS = ("pt", "mlx")
"""Values of ``format`` in a file's metadata with which transformers reads it by PyTorch."""
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
    """Offset after its last byte in a local file."""


Headers = Mapping[str, StoredTensor]
"""Tensors by name."""


def weight_files(folder: Path) -> list[Path]:
    """Lists the weight files that transformers would load, without reading them.

    Other safetensors files, such as ``consolidated.safetensors`` or an adapter, are left out.

    Raises:
        RecipeError: There are no weights, or a shard of the index is missing.
    """
    if (single_file := folder / WEIGHTS_FILE).is_file():
        return [single_file]
    if single_file.is_symlink():
        raise RecipeError(
            f"{single_file} is a link to {single_file.readlink()}, which does not exist.",
            "download the model again, or copy the files that the links name (cp -L)",
        )
    if not (folder / INDEX_FILE).is_file():
        raise RecipeError(
            f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}.",
            "save the model with save_pretrained(..., safe_serialization=True)",
        )
    files = [folder / name for name in sorted(set(read_index(folder).values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise RecipeError(
            f"{folder} does not have {', '.join(missing)}, which {INDEX_FILE} lists.",
            "download the model again, or copy all of its shards",
        )
    return files


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
    _require_known_format(path, header.pop("__metadata__", None))
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


def _require_known_format(file: object, metadata: Mapping[str, str] | None) -> None:
    """Refuses a file that transformers would not read: it requires the format, or no metadata."""
    if metadata and metadata.get("format") not in FORMATS:
        raise RecipeError(
            f"{file} has the format {metadata.get('format')} in its metadata, not pt.",
            "save the model with save_pretrained, or the file with safetensors.torch.save_file("
            'weights, file, metadata={"format": "pt"})',
        )


def _read_hub_headers(hf_path: str) -> dict[str, StoredTensor]:
    with ThreadPoolExecutor() as threads:
        headers = [*threads.map(partial(_read_hub_header, hf_path), _hub_weight_files(hf_path))]
    return {name: tensor for header in headers for name, tensor in header.items()}


def _hub_weight_files(hf_path: str) -> list[str]:
    """Lists the files that ``weight_files`` would list after a download."""
    from huggingface_hub import HfApi

    if HfApi().file_exists(filename=WEIGHTS_FILE, **hub_model(hf_path)):
        return [WEIGHTS_FILE]
    folder = side_folder(hf_path)
    if (folder / INDEX_FILE).is_file():
        return sorted(set(read_index(folder).values()))
    raise RecipeError(
        f"{hf_path} has neither {WEIGHTS_FILE} nor {INDEX_FILE} on the hub.",
        "use a model with safetensors weights",
    )


def _read_hub_header(hf_path: str, file: str) -> dict[str, StoredTensor]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError

    fix = "choose a complete revision of the model: model.hf_path=NAME@COMMIT"
    try:
        header = HfApi().parse_safetensors_file_metadata(filename=file, **hub_model(hf_path))
    except EntryNotFoundError as error:
        what = f"{hf_path} does not have {file} on the hub, which {INDEX_FILE} lists."
        raise RecipeError(what, fix) from error
    except (SafetensorsParsingError, struct.error) as error:
        raise RecipeError(f"{file} of {hf_path} is damaged on the hub.", fix) from error
    except Exception as error:
        raise unreachable_error(hf_path, f"the header of {file}", error) from error
    _require_known_format(f"{file} of {hf_path}", header.metadata)
    return {
        name: StoredTensor(file, tensor.dtype, tuple(tensor.shape))
        for name, tensor in header.tensors.items()
        if not name.endswith(ROTARY_BUFFER)
    }
