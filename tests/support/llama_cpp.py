"""llama.cpp itself, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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
