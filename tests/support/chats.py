"""Conversations of a few words each."""

from __future__ import annotations

import json
from pathlib import Path


def write_chats(file: Path, text_file: Path, count: int = 300, letters: int = 12) -> str:
    """Writes conversations of one or two turns, and returns them as a source of text.

    Args:
        file: Where to.
        text_file: Whose texts they are made of, as its last ones.
        count: Conversations.
        letters: Of what the user says; the assistant says twice as much.
    """
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()[-count:]]
    with file.open("w") as opened:
        for number, text in enumerate(texts):
            parts = [text[start : start + letters] for start in range(0, 6 * letters, letters)]
            said = [parts[0], parts[1] + parts[2], parts[3], parts[4] + parts[5]]
            roles = ("user", "assistant", "user", "assistant")
            messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
            opened.write(json.dumps({"messages": messages[: 2 + 2 * (number % 2)]}) + "\n")
    return f"{file}#format=chat"
