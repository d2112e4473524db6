"""Lower bounds of the time of serving a model, by the roofline model (Williams et al. 2009)."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_convert.architecture import Architecture
from recipes.planning.transformer import (
    Storage,
    decode_flops,
    decode_traffic,
    prefill_flops,
    weight_traffic,
)


@dataclass(frozen=True)
class Roofline:
    """Rates of a device that bound a model's speed."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, flops: float, traffic: float) -> float:
        """Returns a lower bound of the seconds for FLOPs and bytes of memory traffic."""
        return max(flops / self.flops_per_second, traffic / self.bytes_per_second)


def prefill_seconds(
    arch: Architecture, batch_size: int, prompt_tokens: int, storage: Storage, roofline: Roofline
) -> float:
    """Returns a lower bound of the seconds until a batch's first new tokens."""
    flops = prefill_flops(arch, batch_size, prompt_tokens)
    return roofline.seconds(flops, weight_traffic(arch, storage, batch_size * prompt_tokens))


def decode_seconds(
    arch: Architecture, batch_size: int, context: float, storage: Storage, roofline: Roofline
) -> float:
    """Returns a lower bound of the seconds to generate one token per sequence of a batch.

    Each sequence already has ``context`` tokens.
    """
    flops = decode_flops(arch, batch_size, context)
    return roofline.seconds(flops, decode_traffic(arch, batch_size, context, storage))
