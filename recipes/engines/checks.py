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
from recipes.engines.openvino import COMPRESSED_TYPES, Logits, Pipeline, weight_types
from recipes.engines.results import EngineComparison, EngineQuality
from recipes.engines.settings import BuildEngineConfig
from recipes.evaluation.predictions import TEACHER, Predictor
from recipes.evaluation.text_quality import score

PROMPT_TOKENS, NEW_TOKENS = 32, 32
"""Lengths of the prompt and of its continuation, with which logits and tokens are compared."""
LOGITS_TOLERANCE = 1e-3
"""Largest allowed difference between the logits of a float32 engine and of transformers."""
ENGINE_FIX = "install the tested version of openvino (make install), or set engine=null"


def compare_engine(
    cfg: BuildEngineConfig, folder: Path, engine: Path, data: Input | None, log: MetricsLog
) -> EngineComparison:
    """Compares an engine with the model that it was built from, run by transformers in float32.

    Args:
        cfg: The stage's config.
        folder: Hugging Face folder of the model.
        engine: The engine's folder.
        data: Output of ``prepare_data``. Quality is measured on its held-out text; with ``None``,
            quality is not measured.
        log: Metrics file.

    Raises:
        RecipeError: A float32 engine does not return the model's logits and tokens, or an engine
            was not compressed as configured.
    """
    source = load_causal_lm(folder)
    engine_model = Logits(engine)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    prompt = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :PROMPT_TOKENS]
    with torch.no_grad():
        difference = engine_model(prompt).logits - source(prompt).logits
    max_difference = difference.abs().max().item()
    generated = Pipeline(engine).generate(prompt, NEW_TOKENS).tokens
    margin = greedy_margin(source, prompt, torch.tensor(generated))
    if cfg.precision == "fp32":
        require_same(engine, max_difference, margin)
    types = require_compressed(cfg, weight_types(engine))
    quality = None
    if data is not None:
        text = read_sequences(data, "heldout", cfg.seq_length, cfg.num_sequences)
        source_predictor = Predictor.of(source)
        # A ``Predictor`` has hidden states and a head. An engine gives only logits, so they replace
        # the hidden states, and the head is the identity function.
        engine_predictor = Predictor(
            lambda tokens: engine_model(tokens).logits,
            lambda logits: logits,
            source_predictor.vocabulary,
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

    The result is 0 if every token is the source's greedy choice. Logits are compared instead of
    tokens, because if two tokens have equal logits, both are correct.

    Args:
        source: The source model, in transformers.
        prompt: Tokens [batch, prompt].
        tokens: Tokens [batch, new] that the engine generated.
    """
    # The logits at a position are for the next token. So the logits for the first generated token
    # are at the last position of the prompt.
    logits = source(torch.cat([prompt, tokens], dim=1)).logits[:, prompt.shape[1] - 1 : -1]
    generated = logits.gather(-1, tokens[..., None]).squeeze(-1)
    margin: float = (logits.max(-1).values - generated).max().item()
    return margin


def require_compressed(cfg: BuildEngineConfig, types: dict[str, int]) -> dict[str, int]:
    """Requires that at least one layer is compressed as configured; returns ``types``.

    NNCF compresses the weights. With ``int4``, it silently keeps 8 bits in a layer if the number of
    the layer's inputs is a multiple of neither the group size nor 32.

    Args:
        cfg: The stage's config.
        types: Number of weights by stored type, such as ``u8``.

    Raises:
        RecipeError: No layer has the configured type.
    """
    expected = COMPRESSED_TYPES.get(cfg.precision, ())
    fix = "set precision=fp32"
    if cfg.scale_group:
        fix = f"set a group_size that divides the layers' widths; {cfg.scale_group} divides none"
    if expected and not any(types.get(name) for name in expected):
        raise RecipeError(
            f"the engine is not compressed to precision={cfg.precision}: it stores "
            f"{', '.join(f'{n:,} {name}' for name, n in types.items())}",
            fix,
        )
    return types


def require_same(engine: Path, difference: float, margin: float) -> None:
    """Raises ``RecipeError`` unless logits and greedy tokens agree up to float32 rounding."""
    problem = ""
    if not difference <= LOGITS_TOLERANCE:  # also catches NaN
        problem = (
            f"logits differ from those of transformers by {difference:.2e}, which is more than "
            f"{LOGITS_TOLERANCE:.0e}"
        )
    elif not margin <= 2 * LOGITS_TOLERANCE:  # each of the two logits may be off by one tolerance
        problem = f"the engine generated a token whose logit is {margin:.2e} below the best logit"
    if problem:
        raise RecipeError(f"engine check failed: {engine}: {problem}", ENGINE_FIX)
