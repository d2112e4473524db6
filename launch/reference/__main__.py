"""``python -m launch.reference``: writes what stands below the marks in ``docs`` anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from launch.reference.configuration import configuration
from launch.reference.trouble import trouble
from recipes.core.files import REPO_ROOT, write_text_atomically

DOCS = REPO_ROOT / "docs"
MARK = "<!-- From here on: python -m launch.reference -->\n"
PAGES: Mapping[str, Callable[[], Iterator[str]]] = {
    "configuration.md": configuration,
    "trouble.md": trouble,
}


def written(name: str) -> str:
    """A page as it should be: what a person wrote, the mark, and what the code says now."""
    above, mark, _ = (DOCS / name).read_text(encoding="utf-8").partition(MARK)
    return "\n".join([above + mark, *PAGES[name]()])


def main() -> None:
    """Writes the pages."""
    for name in PAGES:
        write_text_atomically(DOCS / name, written(name))


if __name__ == "__main__":
    main()
