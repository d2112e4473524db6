"""Compares an engine with the model that it was built from."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from nemo_convert.hf import load_causal_lm
from nemo_convert.parity import TEXT
from recipes.core import statistics
from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Input
from recipes.data.token_sequences import read_sequences
from recipes.engines.openvino import COMPRESSED_TYPES, Pipeline, load_engine, weight_types
from recipes.engines.results import EngineComparison, EngineQuality
from recipes.engines.settings import BuildEngineConfig
from recipes.evaluation.predictions import TEACHER, Predictor
from recipes.evaluation.text_quality import score

PROMPT_TOKENS, NEW_TOKENS = 32, 32
"""Tokens of the prompt, whose logits are compared, and of the continuation, which is checked."""
LOGITS_TOLERANCE = 1e-3
"""Largest allowed difference between the logits of a float32 engine and of transformers."""


def compare_engine(
    cfg: BuildEngineConfig, folder: Path, engine: Path, data: Input | None, log: MetricsLog
) -> EngineComparison:
    """Compares an engine with its source model in ``folder``, run by transformers in float32.

    Quality is measured on the held-out text of ``data``, the output of ``prepare_data``; with
    ``None``, quality is not measured.

    Raises:
        RecipeError: No layer is compressed as configured (``require_compressed``); or the precision
            is ``fp32``, and logits or tokens differ (``require_same``).
    """
    source, engine_model = load_causal_lm(folder), load_engine(engine)

    def engine_logits(tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = engine_model(tokens, attention_mask=torch.ones_like(tokens)).logits
        return logits

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    prompt = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :PROMPT_TOKENS]
    with torch.no_grad():
        difference = engine_logits(prompt) - source(prompt).logits
    max_difference = difference.abs().max().item()
    generated = Pipeline(engine).generate(prompt, NEW_TOKENS).tokens
    margin = greedy_margin(source, prompt, torch.tensor(generated))
    if cfg.precision == "fp32":
        require_same(engine, max_difference, margin)
    types = weight_types(engine)
    require_compressed(cfg, types)
    quality = None
    if data is not None:
        text = read_sequences(data, "heldout", cfg.seq_length, cfg.num_sequences)
        source_predictor = Predictor.of(source)
        # A ``Predictor`` has hidden states and a head. An engine returns only logits, so they
        # replace the hidden states, and the head is the identity function.
        engine_predictor = Predictor(
            engine_logits, lambda logits: logits, source_predictor.vocabulary
        )
        # ``score`` compares with the model of the key TEACHER: here the source model.
        predictors = {TEACHER: source_predictor, "engine": engine_predictor}
        scores = score(predictors, text, log)
        quality = EngineQuality(
            engine=scores["engine"].quality(),
            source=scores[TEACHER].quality(),
            sequences=len(text),
            tokens=text.tokens.numel(),
            predictions=text.predictions,
            loss_difference=statistics.difference(scores["engine"].losses, scores[TEACHER].losses),
        )
    return EngineComparison(max_difference, margin, types, quality)


@torch.no_grad()
def greedy_margin(source: torch.nn.Module, prompt: torch.Tensor, tokens: torch.Tensor) -> float:
    """Returns the largest gap between the source's best logit and the logit of a generated token.

    The engine continued ``prompt`` [batch, prompt] by ``tokens`` [batch, new]. The result is 0 if
    each is the source model's greedy choice. Logits are compared instead of tokens, because if two
    tokens have equal logits, both are correct.
    """
    # The logits at a position are for the next token. So the logits for the first generated token
    # are at the last position of the prompt.
    logits = source(torch.cat([prompt, tokens], dim=1)).logits[:, prompt.shape[1] - 1 : -1]
    generated = logits.gather(-1, tokens[..., None]).squeeze(-1)
    margin: float = (logits.max(-1).values - generated).max().item()
    return margin


def require_compressed(cfg: BuildEngineConfig, types: dict[str, int]) -> None:
    """Raises ``RecipeError`` unless at least one layer is compressed as configured.

    With ``int4``, a layer's number of inputs must be a multiple of the group size or of 32, the
    smallest group size that OpenVINO falls back to. Other layers silently keep 8 bits.

    ``types`` is the result of ``weight_types``.
    """
    expected = COMPRESSED_TYPES.get(cfg.precision, ())
    fix = "set precision=fp32"
    if cfg.scale_group is not None:  # ``group_size``, if the precision uses groups
        fix = f"set a group_size that divides the layers' widths; {cfg.scale_group} divides none"
    if expected and not any(types.get(name) for name in expected):
        raise RecipeError(
            f"the engine is not compressed to precision={cfg.precision}: it stores "
            f"{', '.join(f'{n:,} {name}' for name, n in types.items())}",
            fix,
        )


def require_same(engine: Path, difference: float, margin: float) -> None:
    """Raises ``RecipeError`` unless logits and greedy tokens agree up to float32 rounding."""
    problem = ""
    max_margin = 2 * LOGITS_TOLERANCE  # a margin is between two logits, and both may be inexact
    if not difference <= LOGITS_TOLERANCE:  # also catches NaN
        problem = (
            f"logits differ from those of transformers by {difference:.2e}, which is more than "
            f"{LOGITS_TOLERANCE:.0e}"
        )
    elif not margin <= max_margin:
        problem = f"the engine generated a token whose logit is {margin:.2e} below the best logit"
    if problem:
        raise RecipeError(
            f"engine check failed: {engine}: {problem}",
            "install the tested version of openvino (make install), or set engine=null",
        )
