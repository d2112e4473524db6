"""Reads the HTML pages of reports."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

PLOTS = (
    "plot-quality",
    "plot-loss",
    "plot-val-loss",
    "plot-lr",
    "plot-grad-norm",
    "plot-layers",
    "plot-sizes",
    "plot-cost",
    "plot-work",
    "plot-by-parameters",
)
OPTIONAL_PLOTS = (
    "plot-tasks",
    "plot-speedups",
    "plot-by-size",
    "plot-by-latency",
    "plot-search",
    "plot-added-layers",
)
"""Plots that a report has only with optional inputs, such as ``search``."""


class Page(HTMLParser):
    """Parses the tags and text of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        """Returns the attribute's value in each tag that has the attribute."""
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    def numbers(self) -> set[float]:
        """Returns the unrounded numbers of the page, which are values of ``<data>`` tags."""
        return {float(attrs["value"]) for tag, attrs in self.tags if tag == "data"}


def all_numbers(value: Any) -> set[float]:
    """Returns all numbers in nested data. Booleans do not count."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return {n for v in value for n in all_numbers(v)}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {float(value)} if is_number else set()


def section(text: str, name: str) -> str:
    """Returns one section of a page."""
    return text[text.index(f'<section id="{name}">') :].partition("</section>")[0] + "</section>"
