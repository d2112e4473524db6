"""Which first-party code a function can reach, read from the source without importing anything.

A definition (a function, a class, an assignment at the top of a module) reaches every name that
stands in it: of its own module, and of first-party modules that it or its module imports. Other
statements at the top of a module, such as a registration, run when it is imported, so they come
with any of its definitions. Docstrings, comments and formatting are left out.

So a reworded rule, a check or a plan changes nothing of a stage whose result it cannot touch, and
a changed line of a loss changes every stage that trains with it.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FIRST_PARTY = ("recipes", "nemo_convert")
WHOLE = "*"
"""Stands for all of a module."""
FOR_TYPES = "TYPE_CHECKING"

Place = tuple[str, str]
"""A module and a name in it, or ``WHOLE``."""


@dataclass(frozen=True)
class _Definition:
    """What a statement of a module says, and which names it uses."""

    digest: str
    uses: frozenset[str]
    """Names, and ``name.attribute`` where an attribute of a name is read."""
    imports: dict[str, Place]
    """First-party names that are imported inside of it."""


@dataclass(frozen=True)
class _Module:
    definitions: dict[str, tuple[_Definition, ...]]
    """By name; several where a name is assigned more than once."""
    others: tuple[_Definition, ...]
    imports: dict[str, Place]


def reachable_code(root: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """Hashes of all code that can be reached from names, as ``module:name``, or whole modules.

    Returns:
        By module, the hashes of its definitions, each with its name.

    Raises:
        ValueError: There is no such module or name, or an import does not say what it uses.
    """
    found: dict[str, set[str]] = {}
    seen: set[Place] = set()
    queue: list[Place] = []
    for start in names:
        module, _, name = start.partition(":")
        if not _is_module(root, module) or (name and name not in _read(root, module).definitions):
            raise ValueError(f"there is no code {start}")
        queue.append((module, name or WHOLE))
    while queue:
        place = queue.pop()
        if place in seen:
            continue
        seen.add(place)
        for name, definition in _parts(_read(root, place[0]), place[1]):
            found.setdefault(place[0], set()).add(f"{name} {definition.digest}")
            queue += _reached(root, place[0], definition)
    return {module: sorted(hashes) for module, hashes in sorted(found.items())}


def _parts(module: _Module, name: str) -> Iterator[tuple[str, _Definition]]:
    """What a name of a module stands for, and what comes with it."""
    wanted = module.definitions if name == WHOLE else {name: module.definitions.get(name, ())}
    for key, definitions in wanted.items():
        for definition in definitions:
            yield key, definition
    for other in module.others:
        yield "", other


def _reached(root: Path, name: str, definition: _Definition) -> Iterator[Place]:
    """Places that a definition of a module names."""
    module = _read(root, name)
    imports = {**module.imports, **definition.imports}
    for used in definition.uses:
        first, _, attribute = used.partition(".")
        if first in module.definitions and first not in definition.imports:
            yield name, first
        elif first in imports:
            yield _imported(root, imports[first], attribute)
    roots = {used.partition(".")[0] for used in definition.uses}
    # Imported for its effects, or for a name that is put together as it runs.
    yield from (place for alias, place in definition.imports.items() if alias not in roots)


def _imported(root: Path, place: Place, attribute: str) -> Place:
    """What an imported name stands for, where an attribute of it may be all that is used."""
    module, name = place
    if name != WHOLE or not attribute:
        return place
    if _is_module(root, f"{module}.{attribute}"):
        return f"{module}.{attribute}", WHOLE
    return module, attribute if attribute in _read(root, module).definitions else WHOLE


def _path(root: Path, module: str) -> Path | None:
    base = root.joinpath(*module.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _is_module(root: Path, module: str) -> bool:
    return module.split(".")[0] in FIRST_PARTY and _path(root, module) is not None


@cache
def _read(root: Path, name: str) -> _Module:
    path = _path(root, name)
    assert path is not None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions: dict[str, tuple[_Definition, ...]] = {}
    others: list[_Definition] = []
    for statement in _without_docstrings(tree).body:
        if isinstance(statement, ast.Import | ast.ImportFrom) or _is_if(statement, FOR_TYPES):
            continue
        definition = _definition(root, path, statement)
        if names := _defines(statement):
            for defined in names:
                definitions[defined] = (*definitions.get(defined, ()), definition)
        elif not _is_if(statement, "__name__ == '__main__'"):
            others.append(definition)
    imports = _imports(root, path, tree.body)
    for nested in tree.body:
        if _is_if(nested, FOR_TYPES):
            imports |= _imports(root, path, list(ast.walk(nested)))
    return _Module(definitions, tuple(others), imports)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """Drops every statement that is only a text, below a field as well as below a function."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [s for s in body if not _is_text(s)]
            node.body = kept or [ast.Pass()] if not isinstance(node, ast.Module) else kept  # type: ignore[attr-defined]
    return tree


def _is_text(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_if(statement: ast.AST, condition: str) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == condition


def _defines(statement: ast.stmt) -> list[str]:
    """Names that a statement at the top of a module defines and does nothing else."""
    match statement:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AsyncFunctionDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            names = [n for target in targets for n in ast.walk(target)]
        case ast.AnnAssign(target=target) | ast.AugAssign(target=target):
            names = list(ast.walk(target))
        case _:
            return []
    plain = all(isinstance(n, ast.Name | ast.Tuple | ast.expr_context) for n in names)
    return [n.id for n in names if isinstance(n, ast.Name)] if plain else []


def _definition(root: Path, path: Path, statement: ast.stmt) -> _Definition:
    nodes = list(ast.walk(statement))
    uses: set[str] = set()
    attributed: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            uses.add(f"{node.value.id}.{node.attr}")
            attributed.add(id(node.value))
    uses |= {n.id for n in nodes if isinstance(n, ast.Name) and id(n) not in attributed}
    digest = hashlib.sha256(ast.dump(statement).encode()).hexdigest()
    return _Definition(digest, frozenset(uses), _imports(root, path, nodes))


def _imports(root: Path, path: Path, nodes: Iterable[ast.AST]) -> dict[str, Place]:
    """First-party names that statements import, and where each is from."""
    found: dict[str, Place] = {}
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(name.split(".")[0] in FIRST_PARTY for name in names):
            raise ValueError(f"{path}: write 'from … import' of first-party modules")
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: relative imports hide what a result depends on")
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if _is_module(root, whole):
                    found[alias.asname or alias.name] = (whole, WHOLE)
                elif _is_module(root, str(node.module)):
                    found[alias.asname or alias.name] = (str(node.module), alias.name)
    return found
