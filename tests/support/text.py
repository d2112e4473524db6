"""Writes text, conversations and token files for tests."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write_text(path: Path) -> Path:
    """Writes up to 1200 paragraphs of Python's language reference as JSON lines.

    Returns:
        ``path``.
    """
    from pydoc_data.topics import topics

    paragraphs = [text for topic in topics.values() for text in topic.split("\n\n")]
    prose = [text for text in paragraphs if len(text) > 200]  # no headings or short examples
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose[:1200]))
    return path


def write_chats(file: Path, text_file: Path, count: int = 300, length: int = 12) -> str:
    """Writes conversations, alternately of one and of two turns.

    Args:
        file: The file to write.
        text_file: JSON lines. The texts of its last ``count`` lines become messages.
        count: Number of conversations.
        length: Characters of a user's message. The assistant's messages are twice as long.

    Returns:
        The source for ``data.sources``.
    """
    lines = text_file.read_text().splitlines()[-count:]
    # The texts may start with punctuation alone, which does not count as a question.
    texts = ["Q" + json.loads(line)["text"] for line in lines]
    with file.open("w") as output:
        for number, text in enumerate(texts):
            messages: list[dict[str, str]] = []
            start = 0
            for role, size in 2 * [("user", length), ("assistant", 2 * length)]:
                # Spaces around an answer would be left out.
                messages.append({"role": role, "content": text[start : start + size].strip()})
                start += size
            num_turns = 1 + number % 2
            output.write(json.dumps({"messages": messages[: 2 * num_turns]}) + "\n")
    return f"{file}#format=chat"


def write_token_files(prefix: Path) -> Path:
    """Writes one document of 900 tokens with id 0 in Megatron's format; returns ``prefix``."""
    # Magic bytes, version, dtype (8 is uint16), number of sequences, number of document bounds.
    header = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, 1, 2)
    # Length of the sequence, its byte offset, and the document's bounds: sequences 0 to 1.
    index = struct.pack("<iqqq", 900, 0, 0, 1)
    prefix.with_suffix(".idx").write_bytes(header + index)
    prefix.with_suffix(".bin").write_bytes(bytes(2 * 900))
    return prefix
