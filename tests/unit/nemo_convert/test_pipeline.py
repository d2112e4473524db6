"""Layers are split over pipeline stages so that Megatron can build the stages."""

from __future__ import annotations

from itertools import product

import pytest

from nemo_convert.pipeline import last_stage_layers, pipeline_split


@pytest.mark.parametrize(
    ("layers", "stages", "split"),
    [
        (30, 1, [30]),
        (30, 3, [10, 10, 10]),
        (3, 2, [2, 1]),
        (30, 4, [7, 8, 8, 7]),
        (24, 7, [2, 4, 4, 4, 4, 4, 2]),
        (9, 8, [2, 1, 1, 1, 1, 1, 1, 1]),
        (5, 5, [1, 1, 1, 1, 1]),
    ],
)
def test_pipeline_splits(layers: int, stages: int, split: list[int]) -> None:
    assert pipeline_split(layers, stages) == split


def test_every_split_can_be_built_and_has_the_fewest_layers_at_the_end() -> None:
    for layers, stages in product(range(1, 130), range(1, 130)):
        if stages > layers:
            with pytest.raises(ValueError, match="cannot fill"):
                pipeline_split(layers, stages)
            continue
        split = pipeline_split(layers, stages)
        assert (len(split), sum(split)) == (stages, layers)
        assert 1 <= split[-1] == min(split)
        assert len(set(split[1:-1])) <= 1
        assert len(set(split)) == 1 or layers % stages
        most_layers = -(-layers // stages)  # rounded up
        if layers - most_layers * (stages - 2) >= 2:  # else the middle stages have fewer layers
            assert max(split) == most_layers


def test_layers_of_the_last_stage_end_with_the_last_layer() -> None:
    assert list(last_stage_layers(30, 4)) == [24, 25, 26, 27, 28, 29, 30]
    assert list(last_stage_layers(4, 1)) == [1, 2, 3, 4]
    assert list(last_stage_layers(4, 4)) == [4]
