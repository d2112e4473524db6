"""llama.cpp itself, in this process, beside transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROMPTS = ("The history of the", "In 1923, 42 of them couldn't")


@dataclass(frozen=True)
class Said:
    """What a model made of a prompt."""

    prompt_tokens: int
    tokens: list[int]
    log_probabilities: list[float]
    """Of these tokens, when each was said."""


def greedy(file: Path, prompts: Sequence[str], tokens: int) -> list[Said]:
    """A GGUF file's likeliest continuations, of so many tokens or up to the end of the text."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    found = []
    for prompt in prompts:
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "samplers": ["top_k"]}
        answer = server.handle_completions({**asked, "top_k": 1, "logprobs": 1})
        said = answer["choices"][0]["logprobs"]["content"]
        ids, values = ([token[name] for token in said] for name in ("id", "logprob"))
        found.append(Said(answer["usage"]["prompt_tokens"], ids, values))
    return found


def require_near_words(folder: Path, file: Path, tolerance: float, length: int = 12) -> None:
    """Of what llama.cpp says, no word is less likely to transformers than its best, nor than said.

    But for a ``tolerance`` of log-probabilities, which rounded weights and activations leave.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, said in zip(PROMPTS, greedy(file, PROMPTS, length), strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert said.prompt_tokens == ids.shape[1]
        with torch.no_grad():
            logits = model(torch.cat([ids, torch.tensor([said.tokens])], dim=1)).logits
        scores = logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        chosen = scores.gather(-1, torch.tensor(said.tokens)[:, None])[:, 0]
        assert (scores.max(-1).values - chosen).max() <= tolerance
        assert (torch.tensor(said.log_probabilities) - chosen).abs().max() <= tolerance
