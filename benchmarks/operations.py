"""Milliseconds of what a step of distillation does between its products, in bfloat16 on a CPU.

``python -m benchmarks.operations`` times PyTorch's fused attention, the one of training, norms,
gated activations, rotations and the loss on logits, at the sizes of SmolLM2-135M: forward, with the
way back, and, but for attention, that compiled. Start it with the variables in
``conf/cluster/local.yaml``. With ``--teacher RUN`` it times the forward pass of a run's teacher
instead, in bfloat16 and with PyTorch's int8 weights and activations, and says how far each is from
float32 on the run's text.
``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`` shows a processor without AMX.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.loops import divergence
from nemo_convert.nemo import find_checkpoint
from recipes.backend.attention import attend_in_blocks
from recipes.backend.training_layers import SwiGLU, _RMSNorm, attend
from recipes.core.manifest import ARTIFACT
from recipes.core.one_pass import missing_compiler, one_pass
from recipes.core.screen import plain_table, screen
from recipes.data.token_windows import windows
from recipes.distillation.losses import LogitsLoss, LossTargets, combined_loss
from recipes.engines.machine_rates import best_seconds
from recipes.evaluation.text_quality import load_transformers

SCALE = 0.125


@dataclass(frozen=True)
class Sizes:
    """Of a model and a micro batch; by default SmolLM2-135M's."""

    windows: int = 4
    tokens: int = 256
    heads: int = 9
    groups: int = 3
    head_size: int = 64
    ffn: int = 1536
    vocabulary: int = 49152


@dataclass(frozen=True)
class Times:
    """Milliseconds at best; ``compiled`` is with the way back, too."""

    forward: float
    both: float
    compiled: float | None


def cases(sizes: Sizes) -> dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]]:
    """Each operation, and the shapes of its inputs."""
    attend_by_blocks = attend_in_blocks(attend)
    place = (sizes.tokens, sizes.windows)
    query = (*place, sizes.heads, sizes.head_size)
    key = (*place, sizes.groups, sizes.head_size)
    hidden = sizes.heads * sizes.head_size
    rows = sizes.tokens * sizes.windows
    logits = torch.randn(rows, sizes.vocabulary).bfloat16()
    labels = torch.randint(sizes.vocabulary, (rows,))

    def loss(student: Tensor) -> Tensor:
        targets = LossTargets(logits, labels, (1.0, 0.2))
        return combined_loss(student, targets, LogitsLoss())[0]

    return {
        "attention, PyTorch's": (lambda q, k, v: attend(q, k, v, SCALE), [query, key, key]),
        "attention": (lambda q, k, v: attend_by_blocks(q, k, v, SCALE), [query, key, key]),
        "norm": (lambda x, w: _RMSNorm.apply(x, w, 1e-5), [(*place, hidden), (hidden,)]),
        "gated activation": (lambda x: SwiGLU(None)(x), [(*place, 2 * sizes.ffn)]),
        "loss on logits and next token": (loss, [(rows, sizes.vocabulary)]),
    }


def measure(
    function: Callable[..., Tensor],
    shapes: list[tuple[int, ...]],
    repeats: int,
    compiled_too: bool = True,
) -> Times:
    """Times an operation; the run that warms up also makes the kernels."""
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    upstream = torch.randn_like(function(*inputs))

    def timed(run: Callable[[], object]) -> float:
        return 1000 * best_seconds(run, repeats=repeats)

    def both() -> None:
        function(*inputs).backward(upstream)

    with torch.no_grad():
        forward = timed(lambda: function(*inputs))
    written, compiled = timed(both), None
    if compiled_too and missing_compiler() is None:
        with one_pass():
            compiled = timed(both)
    return Times(forward, written, compiled)


@torch.inference_mode()
def teachers(run_dir: Path, sizes: Sizes, repeats: int) -> Table:
    """A teacher's forward pass in other types, each beside float32 on the same text.

    int8 is PyTorch's dynamic quantisation: weights by channel, activations by tensor as they come.
    """
    whole = load_transformers(find_checkpoint(run_dir / "import_hf" / ARTIFACT))
    whole.config.use_cache = False
    tokens = windows(run_dir / "prepare_data" / ARTIFACT, "validation", sizes.tokens, sizes.windows)
    quantize = torch.ao.quantization.quantize_dynamic
    models = {
        "float32": whole,
        "bfloat16": deepcopy(whole).bfloat16(),
        "int8": quantize(deepcopy(whole), {torch.nn.Linear}, dtype=torch.qint8),
    }
    expected = whole(tokens).logits.flatten(0, 1)
    table = plain_table("teachers", "teacher", "forward, ms", "KL from float32")
    for name, model in models.items():
        kl = divergence(model(tokens).logits.flatten(0, 1), expected) / tokens.numel()
        seconds = best_seconds(partial(model, tokens), repeats=repeats)
        table.add_row(name, f"{1000 * seconds:.0f}", f"{float(kl):.2g}")
    return table


def main() -> None:
    """Reads the command line, measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=Sizes.tokens, help="of a window")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="beginnings of names")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--teacher", type=Path, metavar="RUN", help="its teacher instead")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.teacher:
        screen().print(teachers(args.teacher, Sizes(tokens=args.tokens), args.repeats))
        return
    table = plain_table("operations", "operation", "forward, ms", "with its way back", "compiled")
    for name, (function, shapes) in cases(Sizes(tokens=args.tokens)).items():
        if not args.only or name.startswith(tuple(args.only)):
            found = measure(function, shapes, args.repeats, not name.startswith("attention"))
            compiled = "" if found.compiled is None else f"{found.compiled:.2f}"
            table.add_row(name, f"{found.forward:.2f}", f"{found.both:.2f}", compiled)
    screen().print(table)


if __name__ == "__main__":
    main()
