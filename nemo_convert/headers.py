"""Reads the names, types and shapes of a model's tensors from safetensors headers. Torch-free."""

from __future__ import annotations

import json
import math
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
    is_file,
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
"""Number of bytes of a file that are read first. Most headers are shorter."""
MAX_HEADER_BYTES = 100_000_000
"""Longest header that safetensors reads."""
CHUNK_BYTES = 4 << 20
"""Number of bytes that ``have_same_bytes`` compares at a time, for local tensors."""
SAMPLES, SAMPLE_BYTES = 8, 64 << 10
"""Number of samples by which two tensors on the hub are compared, and bytes of each sample."""
HEADER_ERRORS = (AttributeError, KeyError, RecursionError, TypeError, ValueError)
"""Errors that ``_read_header`` raises if a file has no valid header."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: str
    """Path of the file, relative to the model folder."""
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
        RecipeError: There are no weights, a shard of the index is missing, or a file is a broken
            link or a folder (see ``is_file``).
    """
    if is_file(folder / WEIGHTS_FILE):
        return [WEIGHTS_FILE]
    if not is_file(folder / INDEX_FILE):
        what = f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}."
        raise RecipeError(what, "save the model with save_pretrained(..., safe_serialization=True)")
    files = sorted(set(read_index(folder).values()))
    if missing := [file for file in files if not is_file(folder / file)]:
        what = f"{folder} does not have {', '.join(missing)}, which {INDEX_FILE} lists."
        raise RecipeError(what, "download the model again, or copy all of its shards")
    return files


def read_headers(hf_path: str) -> dict[str, StoredTensor]:
    """Returns the tensors of a model folder or hub model; downloads headers only.

    Raises:
        RecipeError: A file is missing or damaged.
    """
    if is_hub_id(hf_path):
        files = _hub_weight_files(hf_path)
        with ThreadPoolExecutor() as threads:
            headers = [*threads.map(partial(_read_hub_header, hf_path), files)]
    else:
        headers = [_read_local_header(hf_path, file) for file in weight_files(Path(hf_path))]
    return {name: tensor for header in headers for name, tensor in header.items()}


def have_same_bytes(hf_path: str, first: StoredTensor, second: StoredTensor) -> bool:
    """Returns whether two tensors of a model, of one type and shape, have the same bytes.

    Tensors on the hub are not downloaded: only evenly spread samples of their bytes are compared.

    Raises:
        RecipeError: The hub does not send the samples.
    """
    size, on_hub = first.end - first.begin, is_hub_id(hf_path)
    chunk_bytes = SAMPLE_BYTES if on_hub else CHUNK_BYTES
    # Local tensors are compared completely: each chunk starts where the last one ends.
    step = max(chunk_bytes, size // SAMPLES) if on_hub else chunk_bytes

    def read_chunk(tensor: StoredTensor, offset: int) -> bytes:
        begin = tensor.begin + offset
        return _read_range(hf_path, tensor.file, begin, min(begin + chunk_bytes, tensor.end))

    def is_same_chunk(offset: int) -> bool:
        return read_chunk(first, offset) == read_chunk(second, offset)

    with ThreadPoolExecutor() as threads:
        return all(threads.map(is_same_chunk, range(0, size, step)))


def _read_local_header(hf_path: str, file: str) -> dict[str, StoredTensor]:
    """Like ``_read_header``; raises ``RecipeError`` for an invalid file, or a Git LFS pointer."""
    path = Path(hf_path) / file
    with path.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if not start:
        raise RecipeError(f"{path} is empty.", "download it again")
    if start == LFS_POINTER:
        what = f"{path} is a Git LFS pointer, not the weights."
        raise RecipeError(what, f"git -C {path.parent} lfs pull")
    try:
        return _read_header(hf_path, file, str(path))
    except HEADER_ERRORS as error:
        raise RecipeError(f"{path} is damaged: {error}.", "download it again") from error


def _read_header(hf_path: str, file: str, label: str) -> dict[str, StoredTensor]:
    """Reads the header of a safetensors file: an 8-byte length, then JSON. The data follows.

    Args:
        hf_path: Model folder or hub id.
        file: File in the folder or on the hub.
        label: Name of the file in an error message.

    Returns:
        The tensors by name, without ``ROTARY_BUFFER``.

    Raises:
        HEADER_ERRORS: The file has no header, or its header does not describe the file.
        RecipeError: The metadata names a format that is not in ``PYTORCH_FORMATS``.
    """
    start = _read_range(hf_path, file, 0, FIRST_BYTES)
    header_end = 8 + int.from_bytes(start[:8], "little")
    if header_end > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {header_end} bytes, more than {MAX_HEADER_BYTES}")
    # A header longer than FIRST_BYTES is read again, in full.
    data = start if header_end <= len(start) else _read_range(hf_path, file, 0, header_end)
    # A header must be UTF-8, which decode() requires. json.loads of bytes would also accept UTF-16.
    header = json.loads(data[8:header_end].decode(), object_pairs_hook=_without_duplicates)
    _require_known_format(label, header.pop("__metadata__", None))
    tensors = {
        name: StoredTensor(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            *(header_end + offset for offset in entry["data_offsets"]),
        )
        for name, entry in header.items()
    }
    _require_contiguous(tensors.values(), header_end, _file_size(hf_path, file))
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ROTARY_BUFFER)}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object. Raises ``ValueError`` for a repeated key, which json itself accepts."""
    json_object = dict(pairs)
    if len(json_object) < len(pairs):
        raise ValueError("a key of its header is repeated")
    return json_object


def _require_contiguous(
    tensors: Iterable[StoredTensor], begin: int, file_bytes: int | None
) -> None:
    """Raises ``ValueError`` unless the tensors fill a file without gaps, as safetensors requires.

    safetensors' own check needs numpy or torch, which a login node may lack. The first tensor must
    start at byte ``begin``. ``file_bytes`` is the size of the file; ``None`` if it is unknown.
    """
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        numbers = [*tensor.shape, tensor.begin, tensor.end]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"a tensor has an invalid shape or offset: {numbers}")
        # The first number in a type is its bits: 16 for BF16, 8 for F8_E4M3. BOOL also has 8 bits.
        digits = re.search(r"\d+", tensor.dtype)
        bits = math.prod(tensor.shape) * (int(digits[0]) if digits else 8)
        if tensor.begin != begin or 8 * (tensor.end - begin) != bits:
            raise ValueError(
                f"a tensor of type {tensor.dtype} and shape {[*tensor.shape]} does not fill the "
                f"{bits / 8:.0f} bytes from byte {begin}"
            )
        begin = tensor.end  # where the next tensor must begin
    if file_bytes not in (None, begin):
        raise ValueError(f"it has {file_bytes} bytes, not {begin}")


def _read_range(hf_path: str, file: str, begin: int, end: int) -> bytes:
    """Reads the bytes of a file from ``begin`` to ``end``, or to the end of a shorter file."""
    if is_hub_id(hf_path):
        return _request_range(hf_path, file, begin, end)
    with (Path(hf_path) / file).open("rb") as stream:
        stream.seek(begin)
        return stream.read(end - begin)


def _request_range(hf_path: str, file: str, begin: int, end: int) -> bytes:
    """Like ``_read_range``, for a file on the hub.

    Raises:
        EntryNotFoundError: The hub does not have the file.
        RecipeError: The hub does not send the bytes.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(filename=file, **hub_arguments(hf_path))
    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
    headers["Accept-Encoding"] = "identity"  # response.raw below does not decompress
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    is_header = begin == 0  # its length is unknown, so the range may be longer than the file
    try:
        with get_session().get(url, headers=headers, stream=True, timeout=timeout) as response:
            hf_raise_for_status(response)
            if not is_header and response.status_code != PARTIAL_CONTENT:
                fix = "use a hub that answers range requests, or download the model first"
                raise RecipeError(f"the hub sends {file} of {hf_path} only as a whole.", fix)
            # A hub without range requests sends the whole file; only its beginning is read.
            data: bytes = response.raw.read(end - begin)
            if not is_header and len(data) < end - begin:
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
    """Refuses metadata with a format that is not in ``PYTORCH_FORMATS``, as transformers does.

    Raises ``ValueError`` if a value is not a string.
    """
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


def _hub_weight_files(hf_path: str) -> list[str]:
    """Lists the files that ``weight_files`` would list after a download."""
    from huggingface_hub import HfApi

    try:
        if HfApi().file_exists(filename=WEIGHTS_FILE, **hub_arguments(hf_path)):
            return [WEIGHTS_FILE]
    except Exception as error:
        raise unreachable_error(hf_path, WEIGHTS_FILE, error) from error
    folder = side_folder(hf_path)  # downloads the index, if there is one
    if (folder / INDEX_FILE).is_file():
        return sorted(set(read_index(folder).values()))
    what = f"{hf_path} has neither {WEIGHTS_FILE} nor {INDEX_FILE} on the hub."
    raise RecipeError(what, "use a model with safetensors weights")


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
