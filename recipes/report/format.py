"""How the report's pages write figures, and how their templates are rendered."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from recipes.core.files import write_text_atomically
from recipes.evaluation.results import ROLES
from recipes.planning.results import Table
from recipes.report.plots import number, share_bar
from recipes.report.settings import TEMPLATES
from recipes.report.trade_offs import speed_bar

AXES = {
    "num_layers": "Layers",
    "ffn_hidden_size": "Feed-forward size",
    "num_attention_heads": "Attention heads",
    "kv_channels": "Head size",
    "vocab_size": "Vocabulary",
}
"""Of a model's shape, where a person says it otherwise than the field does."""
DASH = Markup('<span class="none">–</span>')


def render_template(template: str, content: Mapping[str, object], path: Path) -> None:
    """Writes one HTML file that loads nothing else."""
    write_text_atomically(path, _environment().get_template(template).render(content))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        FORMATS, figure=any_value, label=label_of, numeric_columns=numeric_columns
    )
    environment.globals |= {"bar": share_bar, "speed_bar": speed_bar, "roles": ROLES}
    return environment


def scaled(value: float, units: str, base: str = "") -> str:
    """Three significant digits or more, in thousands of the unit that fits."""
    power = 0 if abs(value) < 1000 else min(int(math.log10(abs(value)) // 3), len(units))
    text = f"{value / 1000**power:,.1f}" if power else f"{value:,.6g}"
    return f"{text} {units[power - 1] if power else ''}{base}".rstrip()


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whatever is short."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02} min" if hours else f"{minutes} min {rest:02} s"


def _exact(value: float, text: str) -> Markup:
    """A shown number that carries its unrounded value, for machines and for a pointer's hint."""
    exact = json.dumps(value)
    return Markup('<data value="{0}" title="{0}">{1}</data>').format(exact, text)


def _optional(write: Callable[..., str]) -> Callable[..., Markup]:
    def formatted(value: float | None, *args: object) -> Markup:
        return DASH if value is None else _exact(value, write(value, *args).replace("-", "−"))

    return formatted


FORMATS: dict[str, Callable[..., Markup]] = {
    "count": _optional(lambda v: f"{v:,}"),
    "parameters": _optional(lambda v: scaled(v, "KMBT")),
    "bytes": _optional(lambda v: scaled(v, "kMGTP", "B")),
    "flops": _optional(lambda v, unit="FLOP": scaled(float(v), "kMGTPEZ", unit)),
    "duration": _optional(duration),
    "percent": _optional(lambda v, digits=1: f"{v:.{digits}%}"),
    "points": _optional(lambda v, digits=1: f"{100 * v:+.{digits}f}"),
    "signed": _optional(lambda v, digits=3: f"{v:+,.{digits}f}"),
    "decimals": _optional(lambda v, digits=3: f"{v:,.{digits}f}"),
    "times": _optional(lambda v: f"{v:.2f}×"),
    "short": _optional(lambda v: number(v, 3)),
}


def any_value(value: object, name: str) -> Markup:
    """A value of whatever type, written by what its name says it is."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return Markup("yes" if value else "no")
    if isinstance(value, list | tuple):
        return Markup(", ").join(any_value(one, name) for one in value)
    if not isinstance(value, int | float):
        return Markup.escape(value)
    return FORMATS[_format_of(name.lower().replace(" ", "_"), value)](value)


def _format_of(name: str, value: float) -> str:
    for unit in ("bytes", "seconds", "flops", "parameters"):
        if name == unit or name.endswith(f"_{unit}"):
            return {"seconds": "duration"}.get(unit, unit)
    return "count" if isinstance(value, int) or value.is_integer() else "short"


def label_of(name: str) -> str:
    """A field's name as a person would write it."""
    if name in AXES:
        return AXES[name]
    text = name.replace("_", " ").replace(".", ": ")
    return text[:1].upper() + text[1:]


def numeric_columns(table: Table) -> list[str]:
    """Names of the columns that hold numbers alone."""
    return [
        name
        for name, *cells in zip(table.columns, *table.rows, strict=True)
        if cells and all(cell is None or isinstance(cell, int | float) for cell in cells)
    ]
