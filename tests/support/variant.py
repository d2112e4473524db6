"""Defines ``Variant``, a test case of a conversion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.folder_changes import Change, edit_json


@dataclass(frozen=True)
class Variant:
    """A change of a folder, and the expected result of converting the changed folder."""

    name: str
    change: Change
    refusal: str = ""
    """Regular expression of the error message; empty if the conversion must be exact."""
    base: str = "llama"
    """Folder to change: FAMILY, saved by transformers 4, or FAMILY-5, saved by transformers 5."""
    reads_weights: bool = False
    """Whether the refusal depends on values of weights, which only a conversion reads. A dry run
    finds every other fault."""


def variants_of_values(
    file: str, refusal: str, values: Mapping[str, Iterable[Any]]
) -> Iterator[Variant]:
    """Yields variants of the model ``llama``, each with another value of a key of a JSON file.

    Args:
        file: Name of the JSON file.
        refusal: Regular expression of the error message, in which "{key}" represents the key.
        values: Values of each key.
    """
    for key, key_values in values.items():
        for value in key_values:
            name = f"{file} with {key}={value!r}"[:99]
            yield Variant(name, edit_json(file, **{key: value}), refusal.format(key=key))
