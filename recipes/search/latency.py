"""What a decoding step of any shape takes: a line fitted to engines that were timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.files import write_json
from recipes.engines.backends import BUILDERS
from recipes.engines.results import BenchmarkRow
from recipes.engines.timing import Contender
from recipes.search.settings import MeasureLatencyConfig
from recipes.search.space import LatencyFit, Service, name_of, read_gigabytes


def build_random_engine(
    cfg: MeasureLatencyConfig,
    side: Path,
    config: dict[str, Any],
    shape: Architecture,
    scratch: Path,
) -> Contender:
    """An engine of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from nemo_convert.hf import copy_side_files

    folder, engine = (scratch / name_of(shape) / part for part in ("hf", "engine"))
    copy_side_files(side, folder)
    write_json(folder / "config.json", config, indent=2)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    engine.mkdir()
    BUILDERS[cfg.engine.backend](cfg.engine, folder, engine)
    return Contender(
        role=name_of(shape),
        backend=cfg.engine.backend,
        precision=cfg.engine.precision,
        model=engine,
        folder=folder,
        architecture=shape,
        group_size=cfg.engine.scale_group,
        tensor_parallel_size=cfg.engine.tensor_parallel_size,
    )


def step_ms(row: BenchmarkRow) -> float:
    """Milliseconds of one decoding step of the whole batch, by the median rate."""
    return 1e3 * row.batch_size / row.decode_tokens_per_second.median


def fit(shapes: Sequence[Architecture], steps: Sequence[float], service: Service) -> LatencyFit:
    """The line of least squares of relative errors; nothing takes less than no time.

    ``steps`` are the milliseconds that each shape took, at least two of which differ in size; that
    size makes no difference is refused, since no budget could be kept by it.
    """
    import numpy as np
    from scipy.optimize import nnls

    rows = [
        [1 / step, shape.num_layers / step, read_gigabytes(shape, service) / step]
        for shape, step in zip(shapes, steps, strict=True)
    ]
    found, _ = nnls(np.array(rows), np.ones(len(rows)))
    line = LatencyFit(*(float(value) for value in found))
    if not line.layer_ms and not line.gigabyte_ms:
        raise RecipeError(
            f"smaller engines were not faster: {', '.join(f'{s:.3g}' for s in steps)} ms a step.",
            "measure on a quiet machine, with more repetitions or a larger batch_size",
        )
    return line
