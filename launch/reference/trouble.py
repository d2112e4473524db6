"""Every rule of preflight and every error, with what is said and the fix, read from the code."""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module

from recipes.core.files import REPO_ROOT
from recipes.planning import rules
from recipes.planning.rules import REFUSED_FIELDS

PACKAGES = ("launch", "nemo_convert", "recipes")


@dataclass(frozen=True)
class Message:
    """What is said of an error, with names in angle brackets for what was found."""

    rule: str
    """Its constant in ``rules``; empty for an error that is no rule's."""
    what: str
    fix: str
    """Empty where there is none."""

    def __str__(self) -> str:
        return (
            f"- `{self.what}`" + (f"\n  Fix: `{self.fix}`" if _has_words(self.fix) else "") + "\n"
        )


def trouble() -> Iterator[str]:
    """The parts of the page."""
    by_rule: dict[str, set[str]] = defaultdict(set)
    by_package: dict[str, set[str]] = defaultdict(set)
    for file in sorted(path for name in PACKAGES for path in (REPO_ROOT / name).rglob("*.py")):
        package = file.parent.relative_to(REPO_ROOT).as_posix()
        for message in messages(ast.parse(file.read_text(encoding="utf-8"))):
            said = by_rule[message.rule] if message.rule else by_package[package]
            said.add(str(message))
    yield from _rules(by_rule)
    for package, lines in by_package.items():
        about = (import_module(package.replace("/", ".")).__doc__ or "").strip()
        yield f"## Errors of {package}\n"
        yield f"{about.splitlines()[0]}\n"
        yield from sorted(lines)


def _rules(said: Mapping[str, set[str]]) -> Iterator[str]:
    """The rules as in their table, below its headings."""
    for heading, constant in re.findall(
        r"^(?:# (.+)|(\w+) = Rule\()", inspect.getsource(rules), re.M
    ):
        if heading:
            yield f"## Rules: {heading[0].lower()}{heading[1:]}\n"
            continue
        rule = getattr(rules, constant)
        see = f" See {rule.reference}." if rule.reference else ""
        yield f"### {rule.name}\n"
        yield f"{rule.severity.capitalize()}: {rule.reason}.{see}\n"
        yield from sorted(said[constant])
        yield from (f"- There is no `{f}`.\n" for f, r in REFUSED_FIELDS.items() if r is rule)


def messages(tree: ast.Module) -> Iterator[Message]:
    """Every ``Problem(…)`` and ``RecipeError(…)`` of a file that has words of its own."""
    named = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Name("Problem"), [ast.Attribute(attr=rule), what, fix]):
                pass
            case ast.Call(ast.Name("RecipeError"), [what, *rest]):
                rule, fix = "", rest[0] if rest else ast.Constant("")
            case _:
                continue
        said, mend = (" ".join(_text(part, named).split()) for part in (what, fix))
        if _has_words(said):
            yield Message(rule, said, mend)


def _has_words(text: str) -> bool:
    return bool(re.search(r"\w", re.sub(r"<\w+>", "", text)))


def _text(node: ast.expr, named: Mapping[str, ast.expr]) -> str:
    """What an expression says, as far as its source tells."""
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.JoinedStr(parts):
            return "".join(_text(part, named) for part in parts)
        case ast.FormattedValue(value):
            return _text(value, named)
        case ast.BinOp(left, ast.Add(), right):
            return _text(left, named) + _text(right, named)
        case ast.IfExp(_, one, other):
            return " / ".join(filter(None, (_text(part, named) for part in (one, other))))
        case ast.Name(name) if isinstance(named.get(name), ast.Constant | ast.JoinedStr):
            return _text(named[name], named)
    return _placeholder(node)


def _placeholder(node: ast.expr) -> str:
    """The name of a value that is only known later; nothing for a name that is near."""
    match node:
        case ast.BinOp(value):
            return _placeholder(value)
        case ast.Name(name) | ast.Attribute(attr=name):
            return f"<{name.lower()}>"
        case ast.Call(ast.Name("did_you_mean")):
            return ""
    return "…"
