"""Cheaper layouts of a training."""

from __future__ import annotations

from dataclasses import replace

from recipes.planning.layouts import best, fits, proposals
from recipes.planning.workload import Layout
from tests.unit.planning.models import H100, LLAMA, distillation, with_experts


def test_proposals_fit_and_the_first_is_the_cheapest() -> None:
    job = distillation(replace(LLAMA, num_layers=16), LLAMA, layout=Layout(devices=8), steps=100)
    found = proposals(job, H100)
    assert found
    assert all(fits(p.job, H100) for p in found)
    dollars = [p.cost.dollars for p in found]
    assert dollars == sorted(dollars)
    assert best(job, replace(H100, memory_bytes=8e9), 8, 8) is None
    small = best(job, replace(H100, memory_bytes=24e9), 8, 8)
    assert small is not None
    assert small.cost.memory.total < 24e9


def test_a_layout_must_split_the_width_of_the_experts() -> None:
    """An MoE's config has the width of a dense layer, too, which is not used."""
    arch = with_experts(LLAMA, ffn_hidden_size=30, moe_ffn_hidden_size=96)
    layout = Layout(devices=8, tensor=8, sequence_parallel=True)
    job = distillation(arch, None, layout=layout, global_batch_size=8)
    assert fits(job, H100)
    assert not fits(replace(job, trained=replace(arch, moe_ffn_hidden_size=100)), H100)
    assert not fits(replace(job, layout=replace(layout, tensor=1, expert=3, devices=3)), H100)


def test_what_a_loss_on_hidden_states_refuses_is_not_proposed() -> None:
    """Where only recomputation fits into memory, nothing is left to propose."""
    layout, shape = Layout(devices=8), replace(LLAMA, num_layers=16)
    job = distillation(shape, LLAMA, layout=layout, seq_length=8192, steps=100)
    small = replace(H100, memory_bytes=22e9)
    found = best(job, small, 8, 8)
    assert found is not None
    assert found.job.layout.recompute_granularity == "full"
    hidden = replace(job, compares_hidden_states=True)
    assert best(hidden, small, 8, 8) is None
    every = proposals(hidden, H100)
    assert every
    assert {(p.job.layout.recompute_granularity, p.job.layout.pipeline) for p in every} == {
        ("none", 1)
    }
