"""Real text for tests."""

from __future__ import annotations

import json
from pathlib import Path


def write_text(path: Path) -> Path:
    """Real English prose: the language reference that comes with Python."""
    from pydoc_data.topics import topics

    paragraphs = [p for topic in topics.values() for p in topic.split("\n\n") if len(p) > 200]
    path.write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs[:1200]))
    return path
