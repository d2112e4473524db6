"""Builds engines to time, and fits a latency model to their times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.files import write_json
from recipes.engines.backends import BUILDERS
from recipes.engines.results import BenchmarkRow
from recipes.engines.timing import TimedModel
from recipes.search.settings import MeasureLatencyConfig
from recipes.search.space import LatencyFit, Service, gigabytes_per_step, name_of


def build_random_engine(
    cfg: MeasureLatencyConfig,
    side_files: Path,
    config: dict[str, Any],
    shape: Architecture,
    scratch: Path,
) -> TimedModel:
    """Builds an engine of ``shape`` with random weights, in a folder of ``scratch``.

    ``side_files`` is the folder of the teacher's tokenizer, generation config and similar files.
    ``config`` is the Hugging Face config of ``shape``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from nemo_convert.hf import copy_side_files

    shape_folder = scratch / name_of(shape)
    folder, engine = shape_folder / "hf", shape_folder / "engine"
    copy_side_files(side_files, folder)
    write_json(folder / "config.json", config, indent=2)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    engine.mkdir()
    BUILDERS[cfg.engine.backend](cfg.engine, folder, engine)
    return TimedModel(
        role=name_of(shape),
        backend=cfg.engine.backend,
        storage=cfg.engine.storage,
        path=engine,
        folder=folder,
        architecture=shape,
        tensor_parallel_size=cfg.engine.tensor_parallel_size,
    )


def step_ms(row: BenchmarkRow) -> float:
    """Returns the milliseconds of a decoding step, in which each sequence gets one token."""
    return 1e3 * row.batch_size / row.decode_tokens_per_second.median


def fit_latency(
    shapes: Sequence[Architecture], step_times: Sequence[float], service: Service
) -> LatencyFit:
    """Fits a latency model by least squares of relative errors, with coefficients of at least 0.

    Args:
        shapes: Timed shapes, which must have at least two different sizes.
        step_times: Milliseconds of a decoding step of each shape.
        service: Precision, batch size and context length of the timed steps.

    Raises:
        RecipeError: Smaller shapes were not faster.
    """
    import numpy as np
    from scipy.optimize import nnls

    # The equation of a shape is step_ms + layer_ms * layers + gigabyte_ms * gigabytes = time.
    # Divided by the time, its right side is 1, and errors are relative.
    rows = [
        [1 / time, shape.num_layers / time, gigabytes_per_step(shape, service) / time]
        for shape, time in zip(shapes, step_times, strict=True)
    ]
    coefficients, _ = nnls(np.array(rows), np.ones(len(rows)))
    latency = LatencyFit(*coefficients.tolist())
    if not latency.layer_ms and not latency.gigabyte_ms:
        times = ", ".join(f"{time:.3g}" for time in step_times)
        raise RecipeError(
            f"smaller engines were not faster: {times} ms a step.",
            "measure on a quiet machine, with more repetitions or a larger batch_size",
        )
    return latency
