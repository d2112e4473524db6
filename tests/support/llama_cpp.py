"""Generates with llama.cpp, and compares with transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

PROMPTS = ("The history of the", "In 1923, 42 of them couldn't")


@dataclass(frozen=True)
class Continuation:
    """Greedy continuation of a prompt."""

    prompt_tokens: int
    tokens: list[int]
    log_probabilities: list[float]
    """Log-probability of each token when it was generated."""


def generate_greedily(file: Path, prompts: Sequence[str], tokens: int) -> list[Continuation]:
    """Returns greedy continuations of at most ``tokens`` tokens by a GGUF file's model."""
    server = _server(file)
    continuations = []
    for prompt in prompts:
        request = {
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0.0,
            "samplers": ["top_k"],
        }
        answer = server.handle_completions({**request, "top_k": 1, "logprobs": 1})
        generated = answer["choices"][0]["logprobs"]["content"]
        ids, values = ([token[name] for token in generated] for name in ("id", "logprob"))
        continuations.append(Continuation(answer["usage"]["prompt_tokens"], ids, values))
    return continuations


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each text, as llama.cpp tokenizes a prompt."""
    server = _server(file)
    answers = []
    for text in texts:
        content = json.dumps({"content": text, "add_special": True}).encode()
        header = {"Content-Type": "application/json"}
        request = Request(f"{server.listening_address}/tokenize", content, header)
        with urlopen(request) as answer:
            answers.append(json.load(answer)["tokens"])
    return answers


def _server(file: Path) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def require_similar_generation(
    folder: Path, file: Path, tolerance: float, length: int = 12
) -> None:
    """Asserts that transformers gives llama.cpp's tokens the largest probability, or almost.

    Args:
        folder: Hugging Face folder of the model.
        file: GGUF file of the model.
        tolerance: Allowed difference of log-probabilities, from rounded weights and activations.
        length: Number of tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, continuation in zip(PROMPTS, generate_greedily(file, PROMPTS, length), strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert continuation.prompt_tokens == ids.shape[1]
        with torch.no_grad():
            logits = model(torch.cat([ids, torch.tensor([continuation.tokens])], dim=1)).logits
        scores = logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        chosen = scores.gather(-1, torch.tensor(continuation.tokens)[:, None])[:, 0]
        assert (scores.max(-1).values - chosen).max() <= tolerance
        assert (torch.tensor(continuation.log_probabilities) - chosen).abs().max() <= tolerance
