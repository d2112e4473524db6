"""Times engines of a few shapes, and fits what a decoding step of any shape takes.

Weights are random: time does not depend on them. The line through the corners of the search space
is checked on a shape between them, which it has not seen.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from recipes import build_engine, enumerate_shapes
from recipes.architecture import Architecture, read_architecture, with_shape
from recipes.benchmark_runs import Contender, cpu_threads, measure, start_worker
from recipes.errors import RecipeError
from recipes.manifest import Outcome, write_text_atomically
from recipes.preflight import Chain, Problem, one_rank_problems
from recipes.roofline import Shape
from recipes.search_space import (
    Measured,
    Service,
    Space,
    corners,
    latency_ms,
    middle,
    name_of,
    read_gigabytes,
)
from recipes.stage import Inputs, StageConfig, metrics_log, stage_main

KIND = "latency_model"
INPUTS = {"checkpoint": "checkpoint_nemo"}
FILE = "latency.json"


@dataclass
class Config(StageConfig):
    """Settings of ``measure_latency``."""

    engine: build_engine.Config = field(
        default_factory=lambda: build_engine.Config(stage="build_engine")
    )
    """How engines are built."""
    space: Space = field(default_factory=Space)
    service: Service = field(default_factory=Service)
    """Batch and context that a step is timed at; this and the space are put in from the search."""
    new_tokens: int = 32
    repetitions: int = 3
    """Measured runs of every shape, after one that warms up."""
    threads: int | None = None
    """CPU threads; by default those that the launcher gives to a process."""

    def request(self) -> Shape:
        """What is timed: its steps see the service's context on average."""
        prompt = self.service.context_length - self.new_tokens // 2
        return Shape(self.service.batch_size, prompt, self.new_tokens)


def of_chain(cfg: Config, chain: Chain) -> Config:
    """What is timed is what the search will ask for."""
    for search in chain.stages.values():
        if isinstance(search, enumerate_shapes.Config):
            return replace(cfg, space=search.space, service=search.service)
    return cfg


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """Finds engines that cannot be built, and requests that they cannot answer."""
    yield from one_rank_problems(cfg, "each engine runs in a process that it starts")
    yield from build_engine.check(cfg.engine, chain)
    if cfg.new_tokens < 2 or cfg.repetitions < 1 or cfg.request().prompt_tokens < 1:
        yield Problem(
            "grid",
            f"new_tokens={cfg.new_tokens}, repetitions={cfg.repetitions} leave nothing to measure "
            f"in a context of {cfg.service.context_length}",
            "use at least two new tokens, one repetition, and a longer context",
        )
    limit = chain.teacher.max_position_embeddings
    if (longest := cfg.service.context_length + cfg.new_tokens // 2) > limit:
        yield Problem(
            "length",
            f"the context makes {longest} tokens, more than the model's positions, {limit}",
            "lower service.context_length",
        )


def disk_bytes(cfg: Config, chain: Chain) -> int:
    """Engines and models of every shape, none larger than the teacher."""
    shapes = len(corners(chain.teacher, cfg.space)) + 1
    return shapes * (2 + 4) * chain.teacher.parameters()


def require_here(cfg: Config) -> None:
    """Raises ``RecipeError`` unless this machine can build the engines."""
    build_engine.require_here(cfg.engine)


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Builds, times and fits."""
    from nemo_convert import nemo
    from recipes import measure_model  # so that the fingerprint knows its code

    log = metrics_log(out)
    side = nemo.side_files(nemo.find_checkpoint(inputs["checkpoint"].artifact))
    config = json.loads((side / "config.json").read_text(encoding="utf-8"))
    teacher = read_architecture(config, str(side))
    fitted, between = corners(teacher, cfg.space), middle(teacher, cfg.space)
    shapes = [*fitted, *([] if between in fitted else [between])]
    scratch = out.parent / "engines"
    shutil.rmtree(scratch, ignore_errors=True)
    contenders = []
    for done, shape in enumerate(shapes):
        log.progress("engine", done, len(shapes))
        contenders.append(_build(cfg, side, with_shape(config, shape), shape, scratch))
    threads = cfg.threads or cpu_threads()
    start = partial(start_worker, scratch / "trtllm_bench", threads, measure_model.__name__)
    rows = measure(contenders, [cfg.request()], cfg.repetitions, start, log)
    steps = [_step_ms(row, cfg.service.batch_size) for row in rows]
    line = fit(fitted, steps[: len(fitted)], cfg.service)
    service = replace(cfg.service, measured=line)
    results = {
        "measured": asdict(line),
        "threads": threads,
        "engine": {"backend": cfg.engine.backend, "precision": cfg.engine.precision},
        "shapes": [
            {
                "name": name_of(shape),
                "step_ms": step,
                "fitted_ms": latency_ms(shape, service),
                "seen": shape in fitted,
            }
            for shape, step in zip(shapes, steps, strict=True)
        ],
    }
    write_text_atomically(out / FILE, json.dumps(results, indent=1) + "\n")
    return Outcome(metrics=results)


def _build(
    cfg: Config, side: Path, config: dict[str, Any], shape: Architecture, scratch: Path
) -> Contender:
    """An engine of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from nemo_convert.hf import copy_side_files

    folder, engine = (scratch / name_of(shape) / part for part in ("hf", "engine"))
    copy_side_files(side, folder)
    write_text_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    engine.mkdir()
    build_engine.BUILDERS[cfg.engine.backend](cfg.engine, folder, engine)
    return Contender(
        role=name_of(shape),
        backend=cfg.engine.backend,
        precision=cfg.engine.precision,
        model=engine,
        folder=folder,
        architecture=shape,
        group_size=cfg.engine.group_size if cfg.engine.precision == "int4" else None,
        tensor_parallel_size=cfg.engine.tensor_parallel_size,
    )


def _step_ms(row: dict[str, Any], batch_size: int) -> float:
    """Milliseconds of one decoding step of the whole batch, by the median rate."""
    return float(1e3 * batch_size / row["decode_tokens_per_second"]["median"])


def fit(shapes: Sequence[Architecture], steps: Sequence[float], service: Service) -> Measured:
    """The line of least squares of relative errors; nothing takes less than no time.

    Args:
        shapes: At least two of different sizes.
        steps: Milliseconds that each took.
        service: What a step reads is counted for.

    Raises:
        RecipeError: Size makes no difference, so no budget could be kept by it.
    """
    import numpy as np
    from scipy.optimize import nnls

    rows = [
        [1 / step, shape.num_layers / step, read_gigabytes(shape, service) / step]
        for shape, step in zip(shapes, steps, strict=True)
    ]
    found, _ = nnls(np.array(rows), np.ones(len(rows)))
    line = Measured(*(float(value) for value in found))
    if not line.layer_ms and not line.gigabyte_ms:
        raise RecipeError(
            f"smaller engines were not faster: {', '.join(f'{s:.3g}' for s in steps)} ms a step.",
            "measure on a quiet machine, with more repetitions or a larger batch_size",
        )
    return line


if __name__ == "__main__":
    stage_main(run, Config, KIND)
