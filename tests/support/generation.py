"""Runs a Hugging Face folder's model with the installed or another version of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

CHAT = [
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Because air scatters blue light most."},
    {"role": "user", "content": "And at dusk?"},
]
NEW_TOKENS = 12
"""Maximum number of generated tokens."""
FIRST_TOKEN = 7
"""``ForceEnd`` forces the token with this id before the end-of-text token. Any id would do."""


@dataclass(frozen=True)
class ModelOutput:
    """Output of a model and its tokenizer for ``CHAT``."""

    version: str
    """Version of transformers."""
    chat: list[int]
    """Token ids of the conversation, formatted by the chat template."""
    scores: list[float]
    """Log-probability of each id of ``chat`` except the first, from the ids before it."""
    greedy: list[int]
    """Greedy continuation of ``NEW_TOKENS`` tokens, without an end-of-text token."""
    stopped: list[int]
    """Generated tokens if the second is forced to be the end-of-text token: generation must stop
    there."""
    generation_config: dict[str, Any]


def output_of(folder: Path) -> ModelOutput:
    """Runs a folder's model with this process's version of transformers."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = model.generation_config.to_dict()
    prompt = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    start = prompt["input_ids"].shape[1]
    with torch.no_grad():
        scores = model(prompt["input_ids"]).logits[0, :-1].log_softmax(-1)

    class ForceEnd(LogitsProcessor):  # type: ignore[misc]
        """Forces ``FIRST_TOKEN``, then the end-of-text token."""

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            token = FIRST_TOKEN if ids.shape[1] == start else settings["eos_token_id"]
            return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([token]), 0.0)

    def generate(**options: Any) -> list[int]:
        ids = prompt["input_ids"]
        sequences = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, **options)
        tokens: list[int] = sequences[0, start:].tolist()
        return tokens

    return ModelOutput(
        transformers.__version__,
        prompt["input_ids"][0].tolist(),
        scores.gather(-1, prompt["input_ids"][0, 1:, None])[:, 0].tolist(),
        generate(min_new_tokens=NEW_TOKENS),
        generate(logits_processor=[ForceEnd()]),
        settings,
    )


def require_same_outputs(packages: Path, *folders: Path) -> tuple[str, str]:
    """Requires that two versions of transformers give the same outputs for each folder's model.

    Returns the installed version, and the version in the folder ``packages``.
    """
    process = subprocess.run(
        # -P keeps this file's folder off sys.path, where its modules could hide installed ones.
        [sys.executable, "-P", __file__, *folders],
        env={**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    last_line = process.stdout.splitlines()[-1]  # libraries may print lines before it
    for folder, fields in zip(folders, json.loads(last_line), strict=True):
        output, expected = ModelOutput(**fields), output_of(folder)
        assert output.chat == expected.chat
        assert np.allclose(output.scores, expected.scores, rtol=0, atol=1e-4)
        assert (output.greedy, output.stopped) == (expected.greedy, expected.stopped)
    return expected.version, output.version


if __name__ == "__main__":
    print(json.dumps([asdict(output_of(Path(folder))) for folder in sys.argv[1:]]))
