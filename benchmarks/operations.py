"""Times the operations of a distillation step, except linear layers, in bfloat16 on a CPU.

``python -m benchmarks.operations`` times PyTorch's fused attention, the attention of training,
norms, gated activations and the loss on logits, at the sizes of SmolLM2-135M. It times the forward
pass, forward and backward pass together, and both passes compiled (not for attention). Start the
benchmark with the environment variables of ``conf/cluster/local.yaml``. The variable
``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`` disables AMX.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.backend.training_layers import SwiGLU, _RMSNorm, attend, attend_in_blocks
from recipes.core.compiled import compilation, missing_compiler
from recipes.core.screen import plain_table, screen
from recipes.distillation.losses import LogitsLoss, LossTargets, combined_loss
from recipes.engines.machine_rates import best_seconds

SCALE = 0.125
"""Scale of attention scores: 1 / √64, for heads of size 64."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and a micro batch; by default SmolLM2-135M's."""

    sequences: int = 4
    tokens: int = 256
    heads: int = 9
    groups: int = 3
    head_size: int = 64
    ffn: int = 1536
    vocabulary: int = 49152


@dataclass(frozen=True)
class Times:
    """Shortest times in milliseconds."""

    forward: float
    both: float
    """Time of forward and backward pass."""
    compiled: float | None
    """Time of the compiled forward and backward pass; ``None`` if not measured."""


def cases(sizes: Sizes) -> dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]]:
    """Returns the operations by name, each with the shapes of its inputs."""
    leading = (sizes.tokens, sizes.sequences)
    query = (*leading, sizes.heads, sizes.head_size)
    key = (*leading, sizes.groups, sizes.head_size)
    hidden = sizes.heads * sizes.head_size
    rows = sizes.tokens * sizes.sequences
    logits = torch.randn(rows, sizes.vocabulary).bfloat16()
    labels = torch.randint(sizes.vocabulary, (rows,))

    def loss(student: Tensor) -> Tensor:
        targets = LossTargets(logits, labels, (1.0, 0.2))  # weights of KD and next-token loss
        return combined_loss(student, targets, LogitsLoss())[0]

    return {
        "attention, PyTorch's": (lambda q, k, v: attend(q, k, v, SCALE), [query, key, key]),
        "attention": (lambda q, k, v: attend_in_blocks(q, k, v, SCALE), [query, key, key]),
        "norm": (lambda x, w: _RMSNorm.apply(x, w, 1e-5), [(*leading, hidden), (hidden,)]),
        "gated activation": (lambda x: SwiGLU(None)(x), [(*leading, 2 * sizes.ffn)]),
        "KD and next-token loss": (loss, [(rows, sizes.vocabulary)]),
    }


def measure(
    function: Callable[..., Tensor],
    shapes: list[tuple[int, ...]],
    repeats: int,
    compile_too: bool = True,
) -> Times:
    """Times an operation. Kernels are compiled during the warm-up, which does not count."""
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    upstream = torch.randn_like(function(*inputs))  # the gradient of the output

    def best_ms(run: Callable[[], object]) -> float:
        return 1000 * best_seconds(run, repeats=repeats)

    def both() -> None:
        function(*inputs).backward(upstream)

    with torch.no_grad():
        forward = best_ms(lambda: function(*inputs))
    eager, compiled = best_ms(both), None
    if compile_too and missing_compiler() is None:
        with compilation():
            compiled = best_ms(both)
    return Times(forward, eager, compiled)


def main() -> None:
    """Reads the command line, measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=Sizes.tokens, help="of a sequence")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    table = plain_table("milliseconds", "operation", "forward", "forward and backward", "compiled")
    for name, (function, shapes) in cases(Sizes(tokens=args.tokens)).items():
        times = measure(function, shapes, args.repeats, not name.startswith("attention"))
        compiled = "" if times.compiled is None else f"{times.compiled:.2f}"
        table.add_row(name, f"{times.forward:.2f}", f"{times.both:.2f}", compiled)
    screen().print(table)


if __name__ == "__main__":
    main()
