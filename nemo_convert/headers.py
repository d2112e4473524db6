"""Reads the names, types and shapes of a model's tensors from safetensors headers. Torch-free."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.client import PARTIAL_CONTENT
from pathlib import Path
from typing import Any

from nemo_convert.hub import (
    INDEX_FILE,
    ROTARY_BUFFER,
    WEIGHTS_FILE,
    hub_arguments,
    is_hub_id,
    read_index,
    side_folder,
    unreachable_error,
)
from recipes.core.errors import RecipeError

LFS_POINTER = b"version https://git-lfs"
"""First bytes of a pointer file, with which Git LFS represents a file that is not downloaded."""
PYTORCH_FORMATS = ("pt", "mlx")
"""Values of ``format`` in a file's metadata that transformers accepts for PyTorch models."""
FIRST_BYTES = 100_000
"""Number of bytes that are read first: most headers are shorter."""
MAX_HEADER_BYTES = 100_000_000
"""Longest header that safetensors reads."""
CHUNK_BYTES = 4 << 20
"""Number of bytes of a local tensor that are compared at a time."""
HEADER_ERRORS = (AttributeError, KeyError, RecursionError, TypeError, ValueError)
"""Errors that parsing a header raises if the bytes are not a header."""
SAMPLES, SAMPLE_BYTES = 8, 64 << 10
"""Two tensors on the hub are compared by this many evenly spread samples of this many bytes."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: str
    dtype: str
    """As safetensors spells it: ``BF16``, ``F32``, ``F8_E4M3``."""
    shape: tuple[int, ...]
    begin: int = 0
    """Offset of the tensor's first byte in the file."""
    end: int = 0
    """Offset after the tensor's last byte in the file."""


Headers = Mapping[str, StoredTensor]
"""Tensors by name."""


def weight_files(folder: Path) -> list[str]:
    """Lists the weight files in a folder that transformers would load, without reading them.

    Other safetensors files, such as ``consolidated.safetensors`` or an adapter, are left out.

    Raises:
        RecipeError: There are no weights, or a shard of the index is missing.
    """
    if (single_file := folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
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
    files = sorted(set(read_index(folder).values()))
    # Path.is_file raises an error for a name that is too long.
    if missing := [file for file in files if not os.path.isfile(folder / file)]:
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
    headers = (_read_local_header(hf_path, file) for file in weight_files(Path(hf_path)))
    return {name: tensor for header in headers for name, tensor in header.items()}


def have_same_bytes(hf_path: str, first: StoredTensor, second: StoredTensor) -> bool:
    """Returns whether two tensors of a model, of one type and shape, have the same bytes.

    Tensors on the hub are not downloaded: only evenly spread samples of their bytes are compared.

    Raises:
        RecipeError: The hub does not send the samples.
    """
    size, on_hub = first.end - first.begin, is_hub_id(hf_path)
    # Of local files, all bytes are compared: each chunk starts where the last one ends.
    chunk = SAMPLE_BYTES if on_hub else CHUNK_BYTES
    step = max(chunk, size // SAMPLES) if on_hub else chunk

    def is_same(start: int) -> bool:
        first_chunk, second_chunk = (
            _read_range(hf_path, t.file, t.begin + start, min(t.begin + start + chunk, t.end))
            for t in (first, second)
        )
        return first_chunk == second_chunk

    with ThreadPoolExecutor() as threads:
        return all(threads.map(is_same, range(0, size, step)))


def _read_local_header(hf_path: str, file: str) -> dict[str, StoredTensor]:
    path = Path(hf_path) / file
    with path.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if not start:
        raise RecipeError(f"{path} is empty.", "download it again")
    if start == LFS_POINTER:
        raise RecipeError(
            f"{path} is a Git LFS pointer, not the weights.", f"git -C {path.parent} lfs pull"
        )
    try:
        return _read_header(hf_path, file, str(path))
    except HEADER_ERRORS as error:
        raise RecipeError(f"{path} is damaged: {error}.", "download it again") from error


def _read_header(hf_path: str, file: str, label: str) -> dict[str, StoredTensor]:
    """Reads the header of a safetensors file: an 8-byte length, then JSON. The data follows.

    ``label`` names the file in an error message.

    Raises:
        AttributeError, KeyError, RecursionError, TypeError, ValueError: The file has no header, or
            its header does not describe the file.
    """
    start = _read_range(hf_path, file, 0, FIRST_BYTES)
    end = 8 + int.from_bytes(start[:8], "little")
    if end > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {end} bytes")
    # A header longer than FIRST_BYTES is read again, in full.
    data = start if end <= len(start) else _read_range(hf_path, file, 0, end)
    # Of bytes, json.loads also accepts UTF-16.
    header = json.loads(data[8:end].decode(), object_pairs_hook=_without_duplicates)
    _require_known_format(label, header.pop("__metadata__", None))
    tensors = {
        name: StoredTensor(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            *(end + offset for offset in entry["data_offsets"]),
        )
        for name, entry in header.items()
    }
    _require_contiguous(tensors.values(), end, _file_size(hf_path, file))
    return {name: t for name, t in tensors.items() if not name.endswith(ROTARY_BUFFER)}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ``ValueError`` if a JSON object has a key twice; json itself takes the last value."""
    if len(entries := dict(pairs)) < len(pairs):
        raise ValueError("a key of its header is repeated")
    return entries


def _require_contiguous(tensors: Iterable[StoredTensor], begin: int, length: int | None) -> None:
    """Raises ``ValueError`` unless the tensors fill a file without gaps, as safetensors requires.

    safetensors' own check needs numpy or torch, which a login node may lack.
    """
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        numbers = [*tensor.shape, tensor.begin, tensor.end]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"a tensor's shape and offsets are {numbers}")
        digits = re.search(r"\d+", tensor.dtype)  # BOOL has no digits; it has 8 bits
        bits = math.prod(tensor.shape) * (int(digits[0]) if digits else 8)
        if tensor.begin != begin or 8 * (tensor.end - begin) != bits:
            raise ValueError(f"{tensor.dtype} {[*tensor.shape]} is not {bits / 8:.0f} bytes long")
        begin = tensor.end
    if length not in (None, begin):
        raise ValueError(f"it has {length} bytes, not {begin}")


def _read_range(hf_path: str, file: str, begin: int, end: int) -> bytes:
    """Reads the bytes of a file from ``begin`` to ``end``, or to the end of a shorter file."""
    if is_hub_id(hf_path):
        return _request_range(hf_path, file, begin, end)
    with (Path(hf_path) / file).open("rb") as stream:
        stream.seek(begin)
        return stream.read(end - begin)


def _request_range(hf_path: str, file: str, begin: int, end: int) -> bytes:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(filename=file, **hub_arguments(hf_path))
    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
    headers["Accept-Encoding"] = "identity"  # response.raw below does not decompress
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        with get_session().get(url, headers=headers, stream=True, timeout=timeout) as response:
            hf_raise_for_status(response)
            if begin and response.status_code != PARTIAL_CONTENT:
                raise RecipeError(
                    f"the hub sends {file} of {hf_path} only as a whole.",
                    "use a hub that answers range requests, or download the model first",
                )
            # A hub without range requests sends the whole file; only its beginning is read.
            data: bytes = response.raw.read(end - begin)
            # A range from 0 is for a header, and may be longer than the file.
            if begin and len(data) < end - begin:
                raise OSError("the connection ended early")
            return data
    except (EntryNotFoundError, RecipeError):
        raise
    except Exception as error:
        raise unreachable_error(hf_path, file, error) from error


def _file_size(hf_path: str, file: str) -> int | None:
    """Returns the number of bytes of a file; ``None`` if the hub does not tell it."""
    if not is_hub_id(hf_path):
        return (Path(hf_path) / file).stat().st_size
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        metadata = get_hf_file_metadata(hf_hub_url(filename=file, **hub_arguments(hf_path)))
    except Exception as error:
        raise unreachable_error(hf_path, file, error) from error
    size: int | None = metadata.size
    return size


def _require_known_format(file: str, metadata: Mapping[str, str] | None) -> None:
    """Refuses formats that are not in ``PYTORCH_FORMATS``; transformers would not read the file."""
    if metadata is None:
        return
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata has a value that is not text")
    if metadata.get("format") not in PYTORCH_FORMATS:
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

    try:
        if HfApi().file_exists(filename=WEIGHTS_FILE, **hub_arguments(hf_path)):
            return [WEIGHTS_FILE]
    except Exception as error:
        raise unreachable_error(hf_path, WEIGHTS_FILE, error) from error
    folder = side_folder(hf_path)
    if (folder / INDEX_FILE).is_file():
        return sorted(set(read_index(folder).values()))
    raise RecipeError(
        f"{hf_path} has neither {WEIGHTS_FILE} nor {INDEX_FILE} on the hub.",
        "use a model with safetensors weights",
    )


def _read_hub_header(hf_path: str, file: str) -> dict[str, StoredTensor]:
    from huggingface_hub.errors import EntryNotFoundError

    fix = "choose a complete revision of the model: model.hf_path=NAME@COMMIT"
    try:
        return _read_header(hf_path, file, f"{file} of {hf_path}")
    except EntryNotFoundError as error:
        what = f"{hf_path} does not have {file} on the hub, which {INDEX_FILE} lists."
        raise RecipeError(what, fix) from error
    except HEADER_ERRORS as error:
        raise RecipeError(f"{file} of {hf_path} is damaged on the hub: {error}.", fix) from error
