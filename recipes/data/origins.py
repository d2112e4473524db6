"""Licence and commit of a source, from its options or from the card of its dataset on a hub."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json
from recipes.data.results import Origin
from recipes.data.sources import parse_source, with_option


def origins_of(sources: Iterable[str], file: Path) -> dict[str, Origin]:
    """Returns the origin of each source.

    Args:
        sources: As they are written in the settings.
        file: Where origins are stored, so that a resumed process reads the same commits.
    """
    if file.exists():
        return {source: Origin(**origin) for source, origin in read_json(file).items()}
    origins = {source: origin_of(source) for source in sources}
    write_json(file, {source: asdict(origin) for source, origin in origins.items()})
    return origins


def pinned(source: str, origin: Origin) -> str:
    """Adds the commit to read to a source on a hub."""
    if origin.commit is None or parse_source(source).revision:
        return source
    return with_option(source, "revision", origin.commit)


def origin_of(text: str) -> Origin:
    """Returns a source's licence and, from the hub, its current commit.

    Raises:
        RecipeError: The hub has no such dataset or cannot be reached.
    """
    source = parse_source(text)
    if source.hub is None or Path(source.hub.name).exists():
        return Origin(source.licence)
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(source.hub.name, revision=source.revision)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"could not read dataset '{source.hub.name}' from the Hugging Face hub: {error}",
            "check its name and revision, the network, and HF_TOKEN for a gated one",
        ) from error
    licence = info.card_data.license if info.card_data else None
    licence = ", ".join(licence) if isinstance(licence, list) else licence
    return Origin(source.licence or licence, info.sha)
