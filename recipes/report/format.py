"""Renders the templates of pages and model cards, and formats values for them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from nemo_convert.licences import with_restriction
from recipes.core.files import write_text_atomically
from recipes.core.statistics import margin95
from recipes.evaluation.results import ROLES
from recipes.report.plots import number
from recipes.report.settings import TEMPLATES

LABELS = {
    "num_layers": "Layers",
    "ffn_hidden_size": "FFN size",
    "num_moe_experts": "Experts",
    "moe_ffn_hidden_size": "Expert FFN size",
    "num_attention_heads": "Attention heads",
    "num_query_groups": "Query groups",
    "kv_channels": "Head size",
    "vocab_size": "Vocabulary",
}
"""Labels of fields whose names, with spaces for underscores, would not be readable."""
DASH = Markup('<span class="none">–</span>')
"""Represents a value of ``None``."""


def render_template(template: str, content: Mapping[str, object], path: Path) -> None:
    """Renders a template with the variables ``content`` into one file, which loads no other files.

    Values in HTML templates are escaped.
    """
    write_text_atomically(path, _environment().get_template(template).render(content))


@cache
def _environment() -> Environment:
    """Returns the Jinja environment, with the filters and macros that all templates can use."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FORMATS, any_value=any_value, label=label_of, plain=plain)
    environment.filters["licence"] = with_restriction
    environment.globals |= {"roles": ROLES, "margin95": margin95}
    macros = environment.get_template("macros.html.j2").make_module()
    # All macros become global, so that templates need not import them.
    environment.globals |= {
        name: macro for name, macro in vars(macros).items() if not name.startswith("_")
    }
    return environment


def with_prefix(value: float, prefixes: str, unit: str = "") -> str:
    """Formats a value with a unit prefix, such as "1.5 kB" for 1500.

    ``prefixes`` has one letter for each power of 1000, such as "kMGT".
    """
    if abs(value) < 1000:
        return f"{value:,.6g} {unit}".rstrip()
    power = min(int(math.log10(abs(value)) // 3), len(prefixes))
    # The largest values of a prefix would be rounded to "1,000.0", so they get the next prefix.
    if power < len(prefixes) and abs(value) / 1000**power >= 999.95:
        power += 1
    return f"{value / 1000**power:,.1f} {prefixes[power - 1]}{unit}"


def duration(seconds: float) -> str:
    """Formats a duration, such as "1.5 s", "2 min 05 s" or "3 h 07 min"."""
    if seconds < 59.95:  # from here on, the text would be "60.0 s"
        return f"{seconds:.1f} s"
    minutes, remaining_seconds = divmod(round(seconds), 60)
    hours, remaining_minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {remaining_minutes:02} min"
    return f"{minutes} min {remaining_seconds:02} s"


def plain(text: str) -> str:
    """Replaces line breaks and Markdown syntax by spaces, for text within a line of Markdown."""
    return re.sub(r"[`<>|\[\]!\s]+", " ", text).strip()


def _optional(format_value: Callable[..., str]) -> Callable[..., Markup]:
    """Returns a Jinja filter that shows ``None`` as a dash, and other values as ``format_value``.

    A tooltip has all digits of the value. The filter has the arguments of ``format_value``.
    """

    def format_or_dash(value: float | None, *args: object) -> Markup:
        if value is None:
            return DASH
        text = format_value(value, *args).replace("-", "−")
        return Markup('<data value="{0}" title="{0}">{1}</data>').format(json.dumps(value), text)

    return format_or_dash


FORMATS: dict[str, Callable[..., Markup]] = {
    "count": _optional(lambda v: f"{v:,}"),
    "parameters": _optional(lambda v: with_prefix(v, "KMBT")),
    "bytes": _optional(lambda v: with_prefix(v, "kMGTP", "B")),
    "flops": _optional(lambda v, unit="FLOP": with_prefix(float(v), "kMGTPEZ", unit)),
    "duration": _optional(duration),
    "percent": _optional(lambda v, digits=1: f"{v:.{digits}%}"),
    "points": _optional(lambda v, digits=1: f"{100 * v:+.{digits}f}"),
    "signed": _optional(lambda v, digits=3: f"{v:+,.{digits}f}"),
    "decimals": _optional(lambda v, digits=3: f"{v:,.{digits}f}"),
    "times": _optional(lambda v: f"{v:.2f}×"),
    "short": _optional(lambda v: number(v, 3)),
    "shown_as": _optional(lambda _, text: text),
}
"""Jinja filters by name. ``points`` shows a fraction in percentage points, with its sign.
``shown_as`` shows its argument, a text that is already formatted."""


def any_value(value: object, name: str) -> Markup:
    """Formats a value of any type, or each item of a list.

    If the last word of the field's ``name`` or label is a unit, as in ``total_bytes``, the value is
    formatted with this unit.
    """
    if value is None:
        return DASH
    if isinstance(value, bool):
        return Markup("yes" if value else "no")
    if isinstance(value, list | tuple):
        return Markup(", ").join(any_value(item, name) for item in value)
    if not isinstance(value, int | float):
        return Markup.escape(value)
    unit = name.lower().replace(" ", "_").rpartition("_")[2]
    if unit in ("bytes", "seconds", "flops", "parameters"):
        return FORMATS["duration" if unit == "seconds" else unit](value)
    is_whole = isinstance(value, int) or value.is_integer()
    return FORMATS["count" if is_whole else "short"](value)


def label_of(name: str) -> str:
    """Returns a field's name in words, for example "Teacher loss" for ``teacher_loss``.

    A dot, as in ``plan.seconds``, becomes a colon.
    """
    text = name.replace("_", " ").replace(".", ": ")
    return LABELS.get(name) or text[:1].upper() + text[1:]
