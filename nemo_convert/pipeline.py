"""Splits layers over pipeline stages as Megatron can build them. Torch-free."""

from __future__ import annotations


def pipeline_split(num_layers: int, stages: int) -> list[int]:
    """Returns the number of layers on each pipeline stage, split as evenly as Megatron allows.

    In Megatron-Core, all stages but the first and the last must have the same number of layers
    (``megatron/core/transformer/transformer_block.py``). The last stage also computes the head and
    the loss, so it gets the fewest layers. The first stage takes the remainder.

    Raises:
        ValueError: There are fewer layers than stages.
    """
    if not 1 <= stages <= num_layers:
        raise ValueError(f"{num_layers} layers cannot fill {stages} pipeline stages")
    per_stage, remainder = divmod(num_layers, stages)
    if remainder == 0:
        return [per_stage] * stages
    # Middle stages get one layer more, unless the first or the last would then have no layer.
    num_middle, per_middle = stages - 2, per_stage + 1
    if num_layers - num_middle * per_middle < 2:
        per_middle = per_stage
    first_and_last = num_layers - num_middle * per_middle  # layers of both stages together
    last = min(first_and_last // 2, per_middle)  # never more layers than another stage
    return [first_and_last - last, *[per_middle] * num_middle, last]


def last_stage_layers(num_layers: int, stages: int) -> range:
    """Returns the numbers of the layers on the last pipeline stage, counted from 1."""
    return range(num_layers - pipeline_split(num_layers, stages)[-1] + 1, num_layers + 1)
