"""What a Hugging Face folder says: here, or by this file as a program, in another transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHAT = [
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Because air scatters blue light most."},
    {"role": "user", "content": "And at dusk?"},
]
NEW_TOKENS, SECOND = 12, 7
"""Tokens that are generated; the one before a forced end."""


@dataclass(frozen=True)
class Said:
    """What a model and its tokenizer made of a conversation."""

    version: str
    chat: list[int]
    """Its ids by the chat template."""
    scores: list[float]
    """Their log-probabilities, but for the first's."""
    greedy: list[int]
    """The likeliest continuation, with no end."""
    stopped: list[int]
    """What was generated where the second token is made to be the end."""
    generation_config: dict[str, Any]


def said_by(folder: Path) -> Said:
    """Asks the transformers of this process."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = model.generation_config.to_dict()
    asked = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    start = asked["input_ids"].shape[1]
    with torch.no_grad():
        scores = model(asked["input_ids"]).logits[0, :-1].log_softmax(-1)

    class End(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            next_one = SECOND if ids.shape[1] == start else settings["eos_token_id"]
            return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([next_one]), 0.0)

    def new(**options: Any) -> list[int]:
        ids = asked["input_ids"]
        made = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, **options)
        tokens: list[int] = made[0, start:].tolist()
        return tokens

    return Said(
        transformers.__version__,
        asked["input_ids"][0].tolist(),
        scores.gather(-1, asked["input_ids"][0, 1:, None])[:, 0].tolist(),
        new(min_new_tokens=NEW_TOKENS),
        new(logits_processor=[End()]),
        settings,
    )


def said_in(packages: Path, *folders: Path) -> list[Said]:
    """Asks the transformers of a folder of packages, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-P", __file__, *folders],
        env={**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Said(**found) for found in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    print(json.dumps([asdict(said_by(Path(folder))) for folder in sys.argv[1:]]))
