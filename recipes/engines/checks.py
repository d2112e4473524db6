"""What became of a model in its engine: the same tokens in float32, and its quality."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_convert.hf import load_causal_lm
from nemo_convert.parity import TEXT
from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Input
from recipes.data.token_windows import read_windows
from recipes.engines.openvino import STORED, Logits, Pipeline, weight_types
from recipes.engines.results import EngineComparison, EngineQuality
from recipes.engines.settings import BuildEngineConfig
from recipes.evaluation.predictions import TEACHER, Predictor
from recipes.evaluation.text_quality import score

PROMPT_TOKENS, NEW_TOKENS = 32, 32
LOGITS_TOLERANCE = 1e-3
"""Largest difference of a float32 engine's logits from transformers'."""
NOT_TO_BE_USED = "do without it (engine=null), or install the openvino that is tested: make install"


def compare_engine(
    cfg: BuildEngineConfig, folder: Path, engine: Path, data: Input | None, log: MetricsLog
) -> EngineComparison:
    """Measures an engine against the model that it was built from, in float32.

    Args:
        cfg: The stage's config.
        folder: Hugging Face folder of the model.
        engine: The engine.
        data: Output of ``prepare_data``; without it no quality on text is measured.
        log: Metrics file.

    Raises:
        RecipeError: The engine is a float32 one and does not give the source's logits and tokens,
            or a compressed one and is not compressed.
    """
    source = load_causal_lm(folder)
    logits = Logits(engine)
    prompt = _fixed_prompt(folder)
    with torch.no_grad():
        difference = (logits(prompt).logits - source(prompt).logits).abs().max().item()
    written = Pipeline(engine).generate(prompt, NEW_TOKENS).tokens
    margin = greedy_margin(source, prompt, torch.tensor(written))
    if cfg.precision == "fp32":
        require_same(engine, difference, margin)
    types = require_compressed(cfg, weight_types(engine))
    quality = None
    if data is not None:
        text = read_windows(data, "heldout", cfg.seq_length, cfg.num_windows)
        teacher = Predictor.of(source)
        # Its head cannot be told from the rest.
        whole = Predictor(lambda t: logits(t).logits, lambda found: found, teacher.vocabulary)
        scores = score({TEACHER: teacher, "engine": whole}, text, 1, log)
        quality = EngineQuality(
            scores["engine"].quality(),
            scores[TEACHER].quality(),
            len(text),
            text.tokens.numel(),
            text.predictions,
        )
    return EngineComparison(difference, margin, types, quality)


def _fixed_prompt(folder: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    ids: torch.Tensor = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(
        TEXT, return_tensors="pt"
    )["input_ids"]
    return ids[:, :PROMPT_TOKENS]


@torch.no_grad()
def greedy_margin(source: torch.nn.Module, prompt: torch.Tensor, written: torch.Tensor) -> float:
    """How much less likely than its best the source finds a token that was written, at worst.

    0 where every token [batch, new] is the one that the source itself would have chosen; that two
    tokens with equal logits may change places is no difference.

    Returns:
        The largest difference of logits.
    """
    scores = source(torch.cat([prompt, written], dim=1)).logits[:, prompt.shape[1] - 1 : -1]
    chosen = scores.gather(-1, written[..., None]).squeeze(-1)
    worst: float = (scores.max(-1).values - chosen).max().item()
    return worst


def require_compressed(cfg: BuildEngineConfig, types: dict[str, int]) -> dict[str, int]:
    """Returns the number of weights by type; layers whose width no group fits stay in 8 bits.

    Raises:
        RecipeError: Nothing was compressed as asked for, which NNCF does not say.
    """
    wanted = STORED.get(cfg.precision, ())
    if wanted and not any(types.get(name) for name in wanted):
        raise RecipeError(
            f"precision={cfg.precision} was asked for, but the engine stores "
            f"{', '.join(f'{n:,} {name}' for name, n in types.items())}.",
            f"no layer's width is a multiple of group_size={cfg.group_size}; set one that fits",
        )
    return types


def require_same(engine: Path, difference: float, margin: float) -> None:
    """Raises ``RecipeError`` unless both are within what float32 arithmetic leaves open."""
    if not difference <= LOGITS_TOLERANCE:  # also catches NaN
        raise RecipeError(
            f"engine gate failed: {engine}: logits differ from transformers' by {difference:.2e}, "
            f"more than {LOGITS_TOLERANCE:.0e}.",
            NOT_TO_BE_USED,
        )
    if not margin <= 2 * LOGITS_TOLERANCE:
        raise RecipeError(
            f"engine gate failed: {engine}: it writes a token whose logit is {margin:.2e} below "
            "the one that transformers would choose.",
            NOT_TO_BE_USED,
        )
