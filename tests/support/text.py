"""Writes text and conversations for tests."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write_text(path: Path) -> Path:
    """Writes English prose (Python's language reference) as JSON lines."""
    from pydoc_data.topics import topics

    paragraphs = [p for topic in topics.values() for p in topic.split("\n\n") if len(p) > 200]
    path.write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs[:1200]))
    return path


def write_chats(file: Path, text_file: Path, count: int = 300, length: int = 12) -> str:
    """Writes conversations of one or two turns; returns the value of ``data.sources`` for them.

    Args:
        file: The file to write.
        text_file: JSON lines whose last texts are used.
        count: Number of conversations.
        length: Characters of a user's message. The assistant's messages are twice as long.
    """
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()[-count:]]
    with file.open("w") as output:
        for number, text in enumerate(texts):
            parts = [text[start : start + length] for start in range(0, 6 * length, length)]
            contents = [parts[0], parts[1] + parts[2], parts[3], parts[4] + parts[5]]
            roles = ("user", "assistant", "user", "assistant")
            messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
            output.write(json.dumps({"messages": messages[: 2 + 2 * (number % 2)]}) + "\n")
    return f"{file}#format=chat"


def write_token_files(prefix: Path) -> Path:
    """Writes one document of 900 tokens, two bytes each, in Megatron's format."""
    index = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, 1, 2) + struct.pack("<iqqq", 900, 0, 0, 1)
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(bytes(1800))
    return prefix
