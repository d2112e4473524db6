"""Generates text with llama.cpp, and compares its tokens and probabilities with transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

PROMPTS = ("The history of the", "In 1923, 42 of them couldn't")
"""Prompts with words, digits and a contraction, which tokenizers split by different rules."""


@dataclass(frozen=True)
class Continuation:
    """Greedy continuation of a prompt."""

    prompt_tokens: int
    """Number of the prompt's tokens."""
    tokens: list[int]
    """Ids of the generated tokens."""
    log_probabilities: list[float]
    """Log-probability of each token when it was generated."""


def generate_greedily(file: Path, prompts: Sequence[str], max_tokens: int) -> list[Continuation]:
    """Generates with a GGUF file's model a greedy continuation of each prompt, in order."""
    server = _server(file)
    continuations = []
    for prompt in prompts:
        request = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "samplers": ["top_k"],  # the top-1 token is the greedy choice
            "top_k": 1,
            "logprobs": 1,
        }
        response = server.handle_completions(request)
        tokens = response["choices"][0]["logprobs"]["content"]
        ids = [token["id"] for token in tokens]
        log_probabilities = [token["logprob"] for token in tokens]
        prompt_tokens = response["usage"]["prompt_tokens"]
        continuations.append(Continuation(prompt_tokens, ids, log_probabilities))
    return continuations


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each text, with the special tokens that llama.cpp adds to prompts.

    Args:
        file: GGUF file with the tokenizer.
        texts: Texts to tokenize.
    """
    server = _server(file)
    token_ids = []
    for text in texts:
        content = json.dumps({"content": text, "add_special": True}).encode()
        header = {"Content-Type": "application/json"}
        request = Request(f"{server.listening_address}/tokenize", content, header)
        with urlopen(request) as response:
            token_ids.append(json.load(response)["tokens"])
    return token_ids


def _server(file: Path) -> Any:
    """Starts a server of llama.cpp in this process for a GGUF file."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False  # tiny models take 256 tokens
    # Like transformers in float32, the key-value cache must not round.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def require_similar_generation(
    folder: Path, file: Path, tolerance: float, length: int = 12
) -> None:
    """Asserts that transformers and llama.cpp agree about the tokens that llama.cpp generates.

    In transformers, each of these tokens must be the likeliest, or almost. Its log-probability must
    be that in llama.cpp, or almost.

    Args:
        folder: Hugging Face folder of the model.
        file: GGUF file of the model.
        tolerance: Allowed difference of log-probabilities, because llama.cpp rounds weights and
            activations.
        length: Maximum number of generated tokens.
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
        # The logits at a position predict the next token, so the last prompt position is the first.
        scores = logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        token_scores = scores.gather(-1, torch.tensor(continuation.tokens)[:, None])[:, 0]
        assert (scores.max(-1).values - token_scores).max() <= tolerance
        differences = torch.tensor(continuation.log_probabilities) - token_scores
        assert differences.abs().max() <= tolerance
