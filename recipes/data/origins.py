"""Finds the licences of sources, and the commits of datasets on a hub. Does not import torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json
from recipes.data.results import Origin
from recipes.data.sources import parse_source, with_option


def origins_of(sources: Iterable[str], file: Path) -> dict[str, Origin]:
    """Returns the origin of each source.

    Reads the origins from the JSON file if it exists, so a resumed process has the same commits.
    Otherwise, writes the file.
    """
    if file.exists():
        return {source: Origin(**origin) for source, origin in read_json(file).items()}
    origins = {source: origin_of(source) for source in sources}
    write_json(file, {source: asdict(origin) for source, origin in origins.items()})
    return origins


def pin_commit(source: str, origin: Origin) -> str:
    """Returns a hub source with its commit as the revision; other sources are unchanged.

    A revision may be a branch or a tag, which can move while the text is read. A commit cannot.
    """
    if origin.commit is None:
        return source
    revision = parse_source(source).revision
    if revision is None:
        return with_option(source, "revision", origin.commit)
    return source.replace(f"revision={revision}", f"revision={origin.commit}")


@cache
def known_licences(entries: tuple[str, ...], seconds: float) -> dict[str, str | None]:
    """Returns each source's licence from its options or its card on the hub; ``None`` if unknown.

    Sends no more requests after an error, so a plan waits for an unreachable hub only once.
    ``seconds`` is the timeout of each request.
    """
    licences = {entry: parse_source(entry).licence for entry in entries}
    without_option = [entry for entry, licence in licences.items() if licence is None]
    with contextlib.suppress(RecipeError):
        for entry in without_option:
            licences[entry] = origin_of(entry, seconds).licence
    return licences


def origin_of(entry: str, timeout: float | None = None) -> Origin:
    """Returns a source's licence and, for a hub dataset, the commit.

    The default ``timeout``, in seconds, is that of ``huggingface_hub``.

    Raises:
        RecipeError: The hub does not have the dataset, or cannot be reached.
    """
    source = parse_source(entry)
    # The library ``datasets`` accepts a local folder as the name of a dataset: it has no commit.
    if source.hub is None or Path(source.hub.name).exists():
        return Origin(source.licence)
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(source.hub.name, revision=source.revision, timeout=timeout)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"could not read dataset '{source.hub.name}' from the Hugging Face hub: {error}",
            "check its name and revision, the network, and HF_TOKEN for a gated dataset",
        ) from error
    card = info.card_data.to_dict() if info.card_data else {}
    licence = card.get("license")
    # "other" means a licence that the hub does not list. Then ``license_name`` has its name.
    if licence in (None, "other"):
        licence = card.get("license_name") or licence
    licence = ", ".join(licence) if isinstance(licence, list) else licence
    return Origin(source.licence or licence, info.sha)
