"""Replaces attributes of libraries, after a check that the originals are the expected ones."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

from recipes.core.errors import RecipeError

MakeReplacement = Callable[[Any], Any]
"""Factory of a replacement: receives the original attribute and returns its replacement."""


@dataclass(frozen=True)
class Patch:
    """One replaced attribute of a library or of this repository."""

    target: str
    """``module:attribute`` or ``module:Class.attribute``."""
    reason: str
    """Why the original is replaced."""
    source_hash: str
    """``fingerprint`` of the original for which the patch was written. Another original is refused
    until the patch is reviewed. Empty for code of this repository, which is not checked."""
    replace: MakeReplacement


def constant(value: Any) -> MakeReplacement:
    """Returns a factory whose replacement is a function that always returns ``value``."""
    return lambda original: lambda *args, **kwargs: value


def replace_with(new: Any) -> MakeReplacement:
    """Returns a factory whose replacement is ``new``, such as a function, a class or a flag."""
    return lambda original: new


def wrap(wrapper: Callable[..., Any]) -> MakeReplacement:
    """Returns a factory whose replacement calls ``wrapper`` with the original as first argument."""

    def replace(original: Any) -> Any:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        return wrapped

    return replace


def patches(prefix: str, *rows: tuple[str, str, str, MakeReplacement]) -> tuple[Patch, ...]:
    """Returns a patch per row of target (without ``prefix``), reason, hash and replacement."""
    return tuple(
        Patch(f"{prefix}{name}", reason, source_hash, replace)
        for name, reason, source_hash, replace in rows
    )


def fingerprint(original: Any) -> str:
    """Hashes the source of a function or class. For other values, returns the name of their type.

    Functions in C have no source. For them, this hashes the first line of the docstring, in which
    PyTorch states the signature; without a docstring, their type.
    """
    if not callable(original):
        return type(original).__name__
    try:
        text = inspect.getsource(original)
    except (TypeError, OSError):
        first_line = (original.__doc__ or "").strip().partition("\n")[0]
        text = first_line or repr(type(original))
        # Memory addresses of default values differ between processes.
        text = re.sub(r" object at 0x[0-9a-f]+", "", text)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def apply(patches: Iterable[Patch]) -> None:
    """Applies patches for the rest of this process.

    Raises:
        RecipeError: A target does not exist or has another fingerprint than ``source_hash``.
    """
    for patch in patches:
        holder, name, original = _find(patch)
        setattr(holder, name, patch.replace(original))


@contextmanager
def applied(patches: Iterable[Patch]) -> Iterator[None]:
    """Does what ``apply`` does, and restores the originals after the ``with`` block."""
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


def apply_to(instance: object, *patches: Patch) -> None:
    """Applies patches to methods of one object. Other objects of its class keep the originals.

    ``Patch.replace`` receives the function in the class. It returns a function with the same
    arguments, including ``self``.

    Raises:
        RecipeError: As ``apply`` does, or the object's class overrides the target.
    """
    for patch in patches:
        _, name, original = _find(patch)
        if getattr(type(instance), name) is not original:
            raise _target_error(patch, f"is overridden by {type(instance).__name__}")
        setattr(instance, name, MethodType(patch.replace(original), instance))


def _find(patch: Patch) -> tuple[Any, str, Any]:
    """Returns the module or class with the target, the attribute's name, and the original.

    Raises the errors of ``apply``.
    """
    module, _, path = patch.target.partition(":")
    library = module.partition(".")[0]
    *parents, name = path.split(".")
    holder: Any = importlib.import_module(module)
    try:
        for parent in parents:
            holder = getattr(holder, parent)
        original = getattr(holder, name)
    except AttributeError as error:
        raise _target_error(patch, f"does not exist in the installed {library}") from error
    if patch.source_hash and (current := fingerprint(original)) != patch.source_hash:
        problem = f"has the fingerprint {current}, not {patch.source_hash}"
        raise _target_error(patch, f"{problem}, in the installed {library}")
    return holder, name, original


def _target_error(patch: Patch, problem: str) -> RecipeError:
    return RecipeError(
        f"{patch.target} {problem}. It is patched because: {patch.reason}.",
        "install the locked versions (make install), or review the patch in recipes/backend or "
        "recipes/rehearsal and write the new fingerprint there",
    )
