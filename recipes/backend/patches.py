"""Replaces attributes of libraries. Checks that a patch was written for the installed original."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from recipes.core.errors import RecipeError

Replacement = Callable[[Any], Any]


@dataclass(frozen=True)
class Patch:
    """One replaced attribute of a library."""

    target: str
    """``module:attribute`` or ``module:Class.attribute``."""
    reason: str
    """Why the original does not work here."""
    source_hash: str
    """``fingerprint`` of the original. If it has changed, the patch must be reviewed. Empty if the
    original is code of this repository."""
    replace: Replacement
    """Receives the original and returns the replacement."""


def constant(value: Any) -> Replacement:
    """Returns a replacement: a function that returns ``value`` for any arguments."""
    return lambda original: lambda *args, **kwargs: value


def replace_with(new: Any) -> Replacement:
    """Returns a replacement that is ``new`` itself, such as a function, a class or a flag."""
    return lambda original: new


def wrap(wrapper: Callable[..., Any]) -> Replacement:
    """Returns a replacement that calls ``wrapper`` with the original as its first argument."""

    def replace(original: Any) -> Any:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        return wrapped

    return replace


def patches(prefix: str, *rows: tuple[str, str, str, Replacement]) -> tuple[Patch, ...]:
    """Returns a patch for each row: its target without ``prefix``, then the other fields."""
    return tuple(
        Patch(f"{prefix}{name}", reason, source_hash, replace)
        for name, reason, source_hash, replace in rows
    )


def fingerprint(original: Any) -> str:
    """Hashes the source of a function or class. The fingerprint of a flag is the name of its type.

    Functions in C have no source. For them this hashes the signature, which PyTorch states in the
    first line of the docstring.
    """
    if not callable(original):
        return type(original).__name__
    try:
        text = inspect.getsource(original)
    except (TypeError, OSError):
        text = (original.__doc__ or "").strip().partition("\n")[0] or repr(type(original))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def apply(patches: Iterable[Patch]) -> None:
    """Applies patches for the rest of this process.

    Raises:
        RecipeError: A target does not exist, or has another fingerprint than its patch states.
    """
    for patch in patches:
        holder, name, original = _find(patch)
        setattr(holder, name, patch.replace(original))


@contextmanager
def applied(patches: Iterable[Patch]) -> Iterator[None]:
    """Applies patches for the duration of a ``with`` block, then restores the originals.

    Raises:
        RecipeError: As ``apply`` does.
    """
    originals: list[tuple[Any, str, Any]] = []
    try:
        for patch in patches:
            originals.append(_find(patch))
            holder, name, original = originals[-1]
            setattr(holder, name, patch.replace(original))
        yield
    finally:
        for holder, name, original in reversed(originals):
            setattr(holder, name, original)


def _find(patch: Patch) -> tuple[Any, str, Any]:
    """Returns the module or class with the target, the attribute's name, and the original."""
    module, _, path = patch.target.partition(":")
    *parents, name = path.split(".")
    holder: Any = importlib.import_module(module)
    try:
        for parent in parents:
            holder = getattr(holder, parent)
        original = getattr(holder, name)
    except AttributeError as error:
        raise _changed(patch, "does not exist") from error
    if patch.source_hash and (current := fingerprint(original)) != patch.source_hash:
        raise _changed(patch, f"has the fingerprint {current}, not {patch.source_hash}")
    return holder, name, original


def _changed(patch: Patch, what: str) -> RecipeError:
    return RecipeError(
        f"{patch.target} {what} in the installed version. It is patched because: {patch.reason}.",
        "install the locked versions (make install), or review the patch in recipes/backend or "
        "recipes/rehearsal and write the new fingerprint there",
    )
