"""How Megatron splits layers over pipeline stages. Torch-free."""

from __future__ import annotations


def pipeline_split(num_layers: int, stages: int) -> list[int]:
    """Layers on each pipeline stage; as even as Megatron can build them.

    Megatron-Core lets the first and the last stage differ and wants the others equal
    (``num_layers_in_first_pipeline_stage`` and ``num_layers_in_last_pipeline_stage``, read in
    ``megatron/core/transformer/transformer_block.py``). The last stage also has the head and the
    loss, so none has fewer layers than it: where a long pipeline of few layers leaves a remainder,
    the first stage takes it.

    Raises:
        ValueError: There are fewer layers than stages.
    """
    if not 1 <= stages <= num_layers:
        raise ValueError(f"{num_layers} layers cannot fill {stages} pipeline stages")
    each, rest = divmod(num_layers, stages)
    if rest == 0:
        return [each] * stages
    # One layer more in the middle, unless that leaves nothing for one of the ends.
    middle = each + 1 if num_layers - (stages - 2) * (each + 1) >= 2 else each
    ends = num_layers - (stages - 2) * middle
    last = min(ends // 2, middle)
    return [ends - last, *[middle] * (stages - 2), last]


def last_stage_layers(num_layers: int, stages: int) -> range:
    """Layers on the last pipeline stage, counted from 1."""
    return range(num_layers - pipeline_split(num_layers, stages)[-1] + 1, num_layers + 1)
