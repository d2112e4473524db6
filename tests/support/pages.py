"""Renders reports with changed results, and reads their HTML."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from recipes.core.stage import Input
from tests.support.reports import render_page, with_result

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
"""HTML ids of the plots that every report has."""
OPTIONAL_PLOTS = (
    "plot-tasks",
    "plot-speedups",
    "plot-by-size",
    "plot-by-latency",
    "plot-search",
    "plot-added-layers",
)
"""HTML ids of the plots that a report has only with optional inputs, such as ``search``."""


class Page(HTMLParser):
    """The tags and text of an HTML page. Asserts that every tag is closed in the right order."""

    VOID = frozenset({"meta", "br"})
    """Elements that have no end tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []  # name and attributes of each tag
        self.text = ""
        self._open_tags: list[str] = []
        self.feed(text)
        assert self._open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)  # appends to ``tags``
        if tag not in self.VOID:
            self._open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        """Returns the values of the attribute ``name``, one for each tag that has the attribute."""
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    def numbers(self) -> set[float]:
        """Returns the unrounded numbers of the page: the ``value`` of each ``<data>`` tag."""
        return {float(attrs["value"]) for tag, attrs in self.tags if tag == "data"}


def all_numbers(value: Any) -> set[float]:
    """Returns all numbers in nested dicts and lists. Booleans do not count as numbers."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return {number for item in value for number in all_numbers(item)}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {float(value)} if is_number else set()


def section(text: str, name: str) -> str:
    """Returns the HTML of the section with the id ``name``. ``text`` is the HTML of the page."""
    start = text.index(f'<section id="{name}">')
    return text[start:].partition("</section>")[0] + "</section>"


def table(text: str, name: str) -> str:
    """Returns the HTML of the table with the id ``table-NAME``, without its first tag."""
    return text[text.index(f'id="table-{name}"') :].partition("</table>")[0]


def render_with(inputs: dict[str, Input], folder: Path, **results: Any) -> str:
    """Renders a report into a folder and returns its HTML.

    Each keyword of ``results`` is an input's name, and its value replaces the input's result.
    """
    changed = {name: with_result(inputs[name], result) for name, result in results.items()}
    return render_page({**inputs, **changed}, folder)
