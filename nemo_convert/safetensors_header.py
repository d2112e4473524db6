"""The header of a safetensors file, which says where each weight is.

A file begins with the length of a JSON object, in eight bytes, the lowest first. Names are the
object's keys, and offsets count from its end (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TYPES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""The format's names of torch's types."""
_ALIGNMENT = 8
"""A header's length is a multiple of it, so that numbers lie where a processor wants them."""


def read_header(file: Path) -> tuple[dict[str, Any], int] | None:
    """What a file says of each of its weights, and the byte that offsets count from.

    ``None`` where a file has no header.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            return None
        try:
            found = json.loads(opened.read(length))
        except ValueError:
            return None
    found.pop("__metadata__", None)
    return found, 8 + length


def header(
    weights: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The beginning of a file whose weights follow each other in this order.

    Args:
        weights: Type (``str(dtype)``), shape and bytes of each.
        metadata: Words that the header says beside them.
    """
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, size) in weights.items():
        begin, end = end, end + size
        described[name] = {
            "dtype": TYPES[dtype.removeprefix("torch.")],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
