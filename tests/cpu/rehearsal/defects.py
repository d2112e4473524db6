"""Rehearses jobs, in which a function may be replaced by one with a defect: ``defects.py JOBS``.

``JOBS`` is a JSON file with a list of [job, name of the defect or null]. ``DEFECTS`` describes each
defect.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from recipes.backend.patches import Patch, apply, replace_with, wrap
from recipes.core.processes import cores
from recipes.rehearsal.job import RankJob, RehearsalResult
from recipes.rehearsal.worker import in_forks, prepare


def gather_too_much(shard: Any, group: Any) -> Any:
    shards = [shard.new_empty(len(shard) + 1, shard.shape[1]) for _ in range(group.size())]
    torch.distributed.all_gather(shards, shard, group)
    return torch.cat(shards, dim=-1)


def load_as_megatron(core: Any, optimizer: Any, weights: Path) -> None:
    from megatron.core import dist_checkpointing

    state = core.sharded_state_dict(prefix="module.")
    optimizer.reload_model_params(dist_checkpointing.load(state, str(weights)))


def build_with_norms_on_cpu(build: Any, *args: Any, **kwargs: Any) -> Any:
    core = build(*args, **kwargs)
    for layer in core.decoder.layers:
        layer.input_layernorm.cpu()
    return core


def update_with_steps_on_cpu(update: Any, *tensors: Any, **settings: Any) -> None:
    *others, steps = tensors
    update(*others, [torch.tensor(1.0) for _ in steps], **settings)


def prune_by_index_on_cpu(prune: Any, name: str, tensor: Any, *args: Any) -> Any:
    return prune(name, tensor.index_select(0, torch.arange(len(tensor))), *args)


def send_changed(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Changes the hidden states that rank 0 sends to the next pipeline stage in training."""

    def changed(forward: Any, core: Any, *args: Any, **kwargs: Any) -> Any:
        states = forward(core, *args, **kwargs)
        return change(states) if core.training and os.environ["RANK"] == "0" else states

    return wrap(changed)


def restore_with(change: Callable[[Any], None]) -> Callable[..., Any]:
    """Changes the config of a model that is restored from a checkpoint."""

    def restored(restore: Any, checkpoint: Path) -> Any:
        model = restore(checkpoint)
        change(model.config)
        return model

    return wrap(restored)


def in_second_call(change: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces only the second call of a function."""
    calls = count()

    def changed(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = change if next(calls) == 1 else lambda f, *a, **k: f(*a, **k)
        return call(original, *args, **kwargs)

    return wrap(changed)


def total_of_two_columns(original: Any, values: Any, group: Any) -> Any:
    """Returns the right sums [n, 1], but reduces a tensor [n, 2, 1], in which each sum is twice."""
    return original(values.repeat(1, 2).unflatten(-1, (2, -1)), group)[:, :1, 0]


def with_small_buckets(original: Any, *args: Any, **kwargs: Any) -> Any:
    *before, _, names = args[:7]  # the last two are the size of a bucket and the parameters' names
    return original(*before, 1, names, *args[7:], **kwargs)


def gather_in_one(shard: Any, group: Any) -> Any:
    whole = shard.new_empty(group.size() * len(shard), shard.shape[1])
    torch.distributed.all_gather_into_tensor(whole, shard.contiguous(), group)
    return torch.cat(whole.chunk(group.size()), dim=-1)


def expect_from_the_first(original: Any, *args: Any, **kwargs: Any) -> None:
    original(*args, **(kwargs | {"src": 0} if "src" in kwargs else kwargs))


def with_barrier(original: Any, *args: Any) -> Any:
    torch.distributed.barrier()
    return original(*args)


def with_gathered_objects(original: Any, *args: Any) -> Any:
    torch.distributed.all_gather_object([None] * torch.distributed.get_world_size(), 0)
    return original(*args)


_models: list[Any] = []


def keep_in_float32(load: Any, checkpoint: Path, dtype: Any) -> Any:
    _models.append(load(checkpoint, torch.float32))
    return _models[-1]


DEFECTS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "mix_devices": (
        "recipes.distillation.model:combined_loss",
        "A tensor is made on the CPU, but the logits are on the GPU.",
        wrap(lambda loss, logits, *a, **k: loss(logits * torch.ones(logits.shape[-1]), *a, **k)),
    ),
    "gather_too_much": (
        "recipes.distillation.vocabulary:gather",
        "Each rank expects one row more from the other ranks than they have.",
        replace_with(gather_too_much),
    ),
    "match_names": (
        "recipes.distillation.trainer:_load_main_weights",
        "Main weights are restored by Megatron's function, which also finds the teacher's weights.",
        replace_with(load_as_megatron),
    ),
    "leave_on_cpu": (
        "nemo_convert.nemo:build_core",
        "A model is cast but not moved to the GPU, and Megatron makes its own norms on the CPU.",
        wrap(build_with_norms_on_cpu),
    ),
    "count_steps_on_cpu": (
        "recipes.backend.adamw:adamw",
        "The step counts of the fused optimizer are on the CPU.",
        wrap(update_with_steps_on_cpu),
    ),
    "index_on_cpu": (
        "recipes.search.measure:prune_weight",
        "Rows of a weight on the GPU are selected by an index on the CPU.",
        wrap(prune_by_index_on_cpu),
    ),
    "send_half": (
        "recipes.distillation.model:_forward_both",
        "A pipeline stage sends the student's hidden states without the teacher's.",
        send_changed(lambda states: states[..., : states.shape[-1] // 2].contiguous()),
    ),
    "send_wide": (
        "recipes.distillation.model:_forward_both",
        "A pipeline stage sends hidden states in float32, but the next one expects bfloat16.",
        send_changed(lambda states: states.float()),
    ),
    "skip_all_reduce": (
        "recipes.distillation.vocabulary:all_reduce",
        "A rank skips its second all-reduce.",
        in_second_call(lambda original, *args, **kwargs: None),
    ),
    "reduce_maximum": (
        "recipes.distillation.vocabulary:all_reduce",
        "A rank computes the maximum in its second all-reduce instead of the sum.",
        in_second_call(
            lambda original, tensor, group: original(tensor, torch.distributed.ReduceOp.MAX, group)
        ),
    ),
    "small_buckets": (
        "megatron.core.distributed.distributed_data_parallel:_ParamAndGradBuffer",
        "A rank reduces each parameter's gradient alone; the other ranks use larger buckets.",
        wrap(with_small_buckets),
    ),
    "total_two_columns": (
        "recipes.distillation.losses:sum_columns",
        "A rank of the last stage sums tensors of another shape.",
        wrap(total_of_two_columns),
    ),
    "wrong_root": (
        "torch.distributed:broadcast_object_list",
        "A rank of the first stage expects a broadcast from rank 0 instead of the last stage.",
        wrap(expect_from_the_first),
    ),
    "skip_receive": (
        "megatron.core.pipeline_parallel.p2p_communication:_batched_p2p_ops",
        "A pipeline stage receives nothing in its second exchange of messages.",
        in_second_call(lambda original, **kwargs: original(**{**kwargs, "tensor_recv_prev": None})),
    ),
    "reverse_groups": (
        "megatron.core.parallel_state:RankGenerator.get_ranks",
        "A rank creates process groups in another order.",
        wrap(lambda original, *args, **kwargs: original(*args, **kwargs)[::-1]),
    ),
    "add_barrier": (
        "recipes.distillation.trainer:_load_main_weights",
        "One rank calls an additional barrier.",
        wrap(with_barrier),
    ),
    "gather_in_one": (
        "recipes.distillation.vocabulary:gather",
        "One rank gathers with a different collective.",
        replace_with(gather_in_one),
    ),
    "gather_objects": (
        "recipes.distillation.model:KDModel.share_losses",
        "Only one rank gathers objects.",
        wrap(with_gathered_objects),
    ),
    "widen": (
        "nemo_convert.nemo:restore_model",
        "A model is built with a wider feed-forward layer than its checkpoint has.",
        restore_with(lambda c: setattr(c, "ffn_hidden_size", c.ffn_hidden_size + 16)),
    ),
    "add_norms": (
        "nemo_convert.nemo:restore_model",
        "A model is built with norms of queries and keys, which its checkpoint does not have.",
        restore_with(lambda config: setattr(config, "qk_layernorm", True)),
    ),
    "lose_a_row": (
        "nemo_convert.convert:MergedWeights.__call__",
        "A conversion makes weights without their last row.",
        wrap(lambda make, *args: make(*args)[:-1]),
    ),
    "keep_cache": (
        "recipes.backend.device:release_cached_memory",
        "A search starts a training while the allocator still caches memory of a measurement.",
        replace_with(lambda: None),
    ),
    "keep_all": (
        "recipes.evaluation.text_quality:load_transformers",
        "All evaluated models stay in memory, in float32.",
        wrap(keep_in_float32),
    ),
}
"""Defects by name: the replaced function, a description of the defect, and the replacement."""


def main() -> None:
    pairs = json.loads(Path(sys.argv[1]).read_text())
    # Only results go to the standard output; what libraries print goes to the standard error.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rehearse = prepare()

    def with_defect(job: dict[str, Any], defect: str | None) -> RehearsalResult:
        if defect is not None:
            target, description, replacement = DEFECTS[defect]
            # An empty fingerprint means that the original is not checked.
            apply([Patch(target, description, "", replacement)])
        return rehearse(TypeAdapter(RankJob).validate_python(job))

    tasks = (partial(with_defect, *pair) for pair in pairs)
    for result in in_forks(tasks, cores()):
        print(json.dumps(asdict(result)), file=results, flush=True)


if __name__ == "__main__":
    main()
