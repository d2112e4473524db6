"""Writes Hugging Face folders whose weights have the right names and shapes, but are all 0."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_convert.families import FAMILIES
from nemo_convert.hf_config import read_architecture

ELEMENT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
"""Bytes per element of each safetensors dtype."""
VOCABULARY = {"<unk>": 0, "a": 1, "b": 2}


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the weights that a config implies, by weight name."""
    architecture = read_architecture(config, "test")
    return FAMILIES[architecture.hf_architecture].hf_shapes(architecture)


def write_sparse_weights(
    file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16"
) -> None:
    """Writes weights of zeros as a sparse safetensors file: only its header takes disk space.

    The format is the header's length (8 bytes), the header in JSON, and the weights' data.
    """
    header, end = {}, 0  # offsets count from the start of the data
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * ELEMENT_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        output.truncate(8 + len(text) + end)  # extends the file without writing data


def write_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    """Writes config, weights and a tokenizer of three tokens; returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_sparse_weights(folder / "model.safetensors", expected_shapes(config))
    write_tokenizer(folder, VOCABULARY)
    return folder


def write_tokenizer(folder: Path, vocabulary: Mapping[str, int]) -> None:
    """Writes a tokenizer whose tokens are whole words. The first is the unknown token."""
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": next(iter(vocabulary))}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
