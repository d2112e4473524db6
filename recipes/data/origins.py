"""Licence and commit of a source, from its options or, of a dataset on a hub, from its card."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json
from recipes.data.results import Origin
from recipes.data.sources import parse_source, with_option


def origins_of(sources: Iterable[str], kept: Path) -> dict[str, Origin]:
    """What is known of each source; a process that goes on with another's work takes what it found.

    Args:
        sources: As they are written in the settings.
        kept: File to keep it in, so that no newer commit is read from the middle on.
    """
    if kept.exists():
        return {source: Origin(**found) for source, found in read_json(kept).items()}
    origins = {source: origin_of(source) for source in sources}
    write_json(kept, {source: asdict(found) for source, found in origins.items()})
    return origins


def pinned(source: str, origin: Origin) -> str:
    """A source with the commit to read, if it is on a hub."""
    if origin.commit is None or parse_source(source).revision:
        return source
    return with_option(source, "revision", origin.commit)


def origin_of(text: str) -> Origin:
    """What is known of a source; a hub is asked for the commit that will be read.

    Raises:
        RecipeError: The hub has no such dataset, or is out of reach.
    """
    source = parse_source(text)
    if source.hub is None or Path(source.hub.name).exists():
        return Origin(source.licence)
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(source.hub.name, revision=source.revision)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"could not read dataset '{source.hub.name}' from the Hugging Face hub: {error}",
            "check its name and revision, the network, and HF_TOKEN for a gated one",
        ) from error
    card = found.card_data.license if found.card_data else None
    named = ", ".join(card) if isinstance(card, list) else card
    return Origin(source.licence or named, found.sha)
