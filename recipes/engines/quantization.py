"""Quantizes a trained Hugging Face model with ModelOpt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint

from nemo_convert.hf import copy_side_files, load_causal_lm
from recipes.backend.device import device
from recipes.backend.without_cuda import enable
from recipes.core.errors import RecipeError
from recipes.core.files import write_text_atomically
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Input
from recipes.data.token_sequences import read_sequences
from recipes.engines.results import QuantizationQuality, QuantizationResult
from recipes.engines.settings import QuantizeConfig
from recipes.engines.tensorrt_llm import QUANT_ALGOS, declared_quantization
from recipes.evaluation.predictions import TEACHER, Predictor
from recipes.evaluation.text_quality import score

SERVED_DTYPE = "bfloat16"
"""Data type in which models are loaded, and in which unquantized weights are exported."""
QUANTIZATION_CONFIGS = {"fp8": mtq.FP8_DEFAULT_CFG, "int4_awq": mtq.INT4_AWQ_CFG}
"""ModelOpt's config by ``format``."""


def quantize_folder(
    cfg: QuantizeConfig, folder: Path, data: Input, out: Path, log: MetricsLog
) -> QuantizationResult:
    """Quantizes the model in ``folder`` and writes it to ``out``, with tokenizer and model card.

    Reads the calibration and held-out splits of ``data``, the output of ``prepare_data``. Raises
    ``RecipeError`` if ModelOpt wrote a format other than ``cfg.format``, or if the loss of the
    quantized model is not finite.
    """
    enable("torch")  # patches for machines without a GPU
    calibration = read_sequences(data, "calibration", cfg.seq_length, cfg.num_sequences)
    tokens = calibration.tokens.to(device())
    model = load_causal_lm(folder, SERVED_DTYPE).to(device())

    def calibrate(model: torch.nn.Module) -> None:
        # AWQ's scales depend on the batch size, so it is always 1.
        for number, batch in enumerate(tokens.split(1), 1):
            model(batch)
            log.progress("calibrate", number, len(tokens))

    settings: dict[str, Any] = copy.deepcopy(QUANTIZATION_CONFIGS[cfg.format])
    if cfg.kv_cache_dtype == "fp8":
        settings["quant_cfg"].update(copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"]))
    with torch.no_grad():
        model = mtq.quantize(model, settings, calibrate)
    quality = _quality(cfg, folder, model, data, log)
    with torch.no_grad():
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=out)
    config = (out / "config.json").read_text(encoding="utf-8")
    # Copies tokenizer, templates and card. It also overwrites the quantized model's config.
    copy_side_files(folder, out)
    write_text_atomically(out / "config.json", config)
    algorithm, expected = declared_quantization(out), QUANT_ALGOS[cfg.format]
    if algorithm != expected:
        raise RecipeError(
            f"ModelOpt wrote {algorithm} instead of {expected} for format={cfg.format}",
            "use another format, or the nvidia-modelopt that pyproject.toml pins",
        )
    return QuantizationResult(expected, quality)


def _quality(
    cfg: QuantizeConfig, folder: Path, model: Any, data: Input, log: MetricsLog
) -> QuantizationQuality:
    """Compares ``model`` with its original in ``folder``, on held-out text.

    ``model`` needs no low-precision kernels, because ModelOpt only simulates the quantization.
    """
    text = read_sequences(data, "heldout", cfg.seq_length, cfg.num_eval_sequences)
    original = load_causal_lm(folder, SERVED_DTYPE).to(device())
    # ``score`` compares all models with the model whose key is TEACHER.
    models = {TEACHER: Predictor.of(original), "quantized": Predictor.of(model)}
    scores = score(models, text, log)
    quality = QuantizationQuality(scores[TEACHER].quality(), scores["quantized"].quality())
    if not quality.quantized.loss < float("inf"):  # also catches NaN
        raise RecipeError(
            f"the model quantized with format={cfg.format} has a loss of {quality.quantized.loss}",
            "use another format",
        )
    return quality
