"""Layers are split over pipeline stages so that Megatron can build the stages."""

from __future__ import annotations

from itertools import product

import pytest

from nemo_convert.pipeline import last_stage_layers, pipeline_split


@pytest.mark.parametrize(
    ("layers", "stages", "split"),
    [
        (3, 2, [2, 1]),  # the last stage has fewer layers, because it also computes the loss
        (30, 4, [7, 8, 8, 7]),
        (24, 7, [2, 4, 4, 4, 4, 4, 2]),  # the middle stages must have the same number of layers
    ],
)
def test_layers_per_stage(layers: int, stages: int, split: list[int]) -> None:
    assert pipeline_split(layers, stages) == split


def test_every_split_can_be_built_and_has_the_fewest_layers_at_the_end() -> None:
    for layers, stages in product(range(1, 130), range(1, 130)):
        if stages > layers:
            with pytest.raises(ValueError, match="cannot fill"):
                pipeline_split(layers, stages)
            continue
        split = pipeline_split(layers, stages)
        assert (len(split), sum(split)) == (stages, layers)
        assert split[-1] >= 1
        assert split[-1] == min(split)
        assert len(set(split[1:-1])) <= 1, "the middle stages have the same number of layers"
        if layers % stages == 0:
            assert len(set(split)) == 1
        most_layers = -(-layers // stages)  # layers / stages, rounded up
        # If the middle stages have this many layers, one layer must remain for each other stage.
        if layers - most_layers * (stages - 2) >= 2:
            assert max(split) == most_layers


def test_layers_of_the_last_stage_end_with_the_last_layer() -> None:
    """Layers count from 1."""
    assert list(last_stage_layers(30, 4)) == [24, 25, 26, 27, 28, 29, 30]
    assert list(last_stage_layers(4, 1)) == [1, 2, 3, 4]
    assert list(last_stage_layers(4, 4)) == [4]
