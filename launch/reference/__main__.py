"""``python -m launch.reference``: writes the tables of ``docs/configuration.md`` from the code."""

from __future__ import annotations

from launch.reference.configuration import configuration
from recipes.core.files import REPO_ROOT, write_text_atomically

PAGE = REPO_ROOT / "docs" / "configuration.md"
MARK = "<!-- From here on: python -m launch.reference -->\n"


def page() -> str:
    """Returns the page with what a person wrote above the mark, and tables from the code below."""
    above, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return "\n".join([above + mark, *configuration()])


if __name__ == "__main__":
    write_text_atomically(PAGE, page())
