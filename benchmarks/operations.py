"""Times the operations of a distillation step, except linear layers, in bfloat16 on a CPU.

``python -m benchmarks.operations`` times PyTorch's fused attention, the attention of the stage
``distill``, norms, gated activations and the loss on logits, at the sizes of SmolLM2-135M. Set the
environment variables of ``conf/cluster/local.yaml`` first. To measure without AMX, also set
``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16``.
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
    """Tokens per sequence."""
    heads: int = 9
    """Heads of queries."""
    groups: int = 3
    """Heads of keys and values."""
    head_size: int = 64
    ffn: int = 1536
    """Hidden size of the feed-forward layer."""
    vocabulary: int = 49152


@dataclass(frozen=True)
class Times:
    """Shortest times of an operation's passes, in milliseconds."""

    forward: float
    forward_backward: float
    compiled: float | None
    """Compiled forward and backward pass; ``None`` if not measured."""


def cases(sizes: Sizes) -> dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]]:
    """Returns the operations by name, each with the shapes of its inputs.

    Activations have Megatron's layout [tokens, sequences, ...]. The loss has one input, the
    student's logits.
    """
    leading = (sizes.tokens, sizes.sequences)
    query = (*leading, sizes.heads, sizes.head_size)
    key = (*leading, sizes.groups, sizes.head_size)
    hidden = sizes.heads * sizes.head_size
    rows = sizes.tokens * sizes.sequences
    teacher_logits = torch.randn(rows, sizes.vocabulary).bfloat16()
    labels = torch.randint(sizes.vocabulary, (rows,))

    def loss(student_logits: Tensor) -> Tensor:
        targets = LossTargets(teacher_logits, labels, (1.0, 0.2))  # KD and next-token weights
        return combined_loss(student_logits, targets, LogitsLoss())[0]  # the weighted sum

    return {
        "attention, PyTorch's": (lambda q, k, v: attend(q, k, v, SCALE), [query, key, key]),
        "attention": (lambda q, k, v: attend_in_blocks(q, k, v, SCALE), [query, key, key]),
        "norm": (lambda x, w: _RMSNorm.apply(x, w, 1e-5), [(*leading, hidden), (hidden,)]),
        "gated activation": (lambda x: SwiGLU(config=None)(x), [(*leading, 2 * sizes.ffn)]),
        "KD and next-token loss": (loss, [(rows, sizes.vocabulary)]),
    }


def measure(
    function: Callable[..., Tensor],
    shapes: list[tuple[int, ...]],
    repeats: int,
    compile_too: bool = True,
) -> Times:
    """Times an operation on random inputs.

    With ``compile_too``, also times compiled passes, without the time to compile, if a compiler is
    installed.
    """
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    upstream = torch.randn_like(function(*inputs))  # the gradient of the output

    def best_ms(run: Callable[[], object]) -> float:
        return 1000 * best_seconds(run, repeats=repeats)

    def forward_backward() -> None:
        function(*inputs).backward(upstream)

    with torch.no_grad():
        forward = best_ms(lambda: function(*inputs))
    eager = best_ms(forward_backward)
    compiled = None
    if compile_too and missing_compiler() is None:
        with compilation():
            compiled = best_ms(forward_backward)
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
        is_attention = name.startswith("attention")  # has no function that can be compiled
        times = measure(function, shapes, args.repeats, compile_too=not is_attention)
        compiled = "" if times.compiled is None else f"{times.compiled:.2f}"
        table.add_row(name, f"{times.forward:.2f}", f"{times.forward_backward:.2f}", compiled)
    screen().print(table)


if __name__ == "__main__":
    main()
