"""Where a step of distillation spends its time: ``python -m benchmarks.profile DISTILL``.

``DISTILL`` is a stage directory that the launcher has prepared, for example with ``dry_run=true``
and its inputs complete. The stage runs in this process under PyTorch's profiler, in a temporary
directory, and nothing of it is kept. Start it with the variables in ``conf/cluster/local.yaml``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, schedule

from recipes.core.manifest import check_artifact
from recipes.core.screen import screen
from recipes.core.stage import REQUEST, Input
from recipes.distillation.callbacks import StepLogger
from recipes.distillation.settings import DistillConfig
from recipes.stages import distill

STEPS, WARM_UP = 3, 4
PARTS = {
    "matrix products of linear layers": ("aten::mm",),
    "attention": ("_CausalAttention", "_CausalAttentionBackward"),
    "loss on logits": ("_Distillation", "_DistillationBackward"),
    "optimizer": ("Optimizer.step",),
    "norms": ("_RMSNorm", "_RMSNormBackward"),
    "gated activation": ("_SwiGLU", "_SwiGLUBackward"),
}
"""Ranges that do not contain each other; what is left are rotations, sums, copies and gradients."""


def run(stage_dir: Path, profiler: profile) -> None:
    """Runs the stage, telling the profiler of every step."""
    request: Any = OmegaConf.to_container(OmegaConf.load(stage_dir / REQUEST))
    merged = OmegaConf.merge(OmegaConf.structured(DistillConfig), request["config"])
    cfg: Any = OmegaConf.to_object(merged)
    cfg.max_steps, cfg.warmup_steps = WARM_UP + STEPS + 1, 1
    inputs = {}
    for name, spec in request["inputs"].items():
        directory = Path(spec["directory"])
        inputs[name] = Input(directory, check_artifact(directory, spec["kind"], rehash=False))

    logged = StepLogger.on_train_batch_end

    def on_train_batch_end(self: StepLogger, *args: Any) -> None:
        logged(self, *args)
        profiler.step()

    StepLogger.on_train_batch_end = on_train_batch_end  # type: ignore[assignment,method-assign]
    with tempfile.TemporaryDirectory() as scratch, profiler:
        out = Path(scratch) / "work" / "artifact"
        out.mkdir(parents=True)
        distill.run(cfg, inputs, out)


def milliseconds(profiler: profile) -> dict[str, float]:
    """Time of each part in a step, and of the whole step."""
    events = profiler.key_averages()
    found = {
        part: sum(e.cpu_time_total for e in events if e.key.split("#")[0] in names)
        for part, names in PARTS.items()
    }
    found["all"] = sum(e.self_cpu_time_total for e in events)
    return {part: time / 1000 / STEPS for part, time in found.items()}


def main() -> None:
    """Profiles and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage_dir", type=Path)
    profiler = profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=WARM_UP, warmup=0, active=STEPS, repeat=1),
    )
    run(parser.parse_args().stage_dir.resolve(), profiler)
    times = milliseconds(profiler)
    whole = times.pop("all")
    table = Table("part of a step", "ms", "share")
    for part, time in [*times.items(), ("everything else", whole - sum(times.values()))]:
        table.add_row(part, f"{time:.0f}", f"{time / whole:.0%}")
    table.add_row("a step, while profiled", f"{whole:.0f}", "")
    screen().print(table)


if __name__ == "__main__":
    main()
