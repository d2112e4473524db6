"""Rehearses jobs with planted defects: ``python defects.py JOBS``.

A defect is a faulty replacement of one function. ``JOBS`` is a JSON file with a list of pairs: a
``RankJob``, and the name of its defect or null. Prints each job's ``RehearsalResult`` as a line of
JSON. ``DEFECTS``, below the replacements, describes each defect.
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


def send_changed(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Returns a patch of ``_forward_both`` that changes the output of rank 0 in training.

    This output is the hidden states that rank 0 sends to the next pipeline stage.
    """

    def forward_and_change(forward: Any, core: Any, *args: Any, **kwargs: Any) -> Any:
        states = forward(core, *args, **kwargs)
        return change(states) if core.training and os.environ["RANK"] == "0" else states

    return wrap(forward_and_change)


def restore_with(change: Callable[[Any], None]) -> Callable[..., Any]:
    """Returns a patch of ``restore_model`` that changes the restored model's config."""

    def restore_and_change(restore: Any, checkpoint: Path) -> Any:
        model = restore(checkpoint)
        change(model.config)
        return model

    return wrap(restore_and_change)


def in_second_call(replacement: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a patch that replaces only the second call of a function.

    ``replacement`` gets the original function, then the arguments of the call.
    """
    call_indices = count()  # from 0

    def call(original: Any, *args: Any, **kwargs: Any) -> Any:
        if next(call_indices) == 1:
            return replacement(original, *args, **kwargs)
        return original(*args, **kwargs)

    return wrap(call)


def total_of_two_columns(original: Any, values: Any, group: Any) -> Any:
    """Returns the right sums [n, 1], but all-reduces a tensor [n, 2, 1] that has each sum twice."""
    # [n, columns] is repeated to [n, 2, columns], whose last axis is summed.
    return original(values.repeat(1, 2).unflatten(-1, (2, -1)), group)[:, :1, 0]


def with_small_buckets(original: Any, *args: Any, **kwargs: Any) -> Any:
    bucket_size = 5  # position of this argument: the number of elements of a bucket
    return original(*args[:bucket_size], 1, *args[bucket_size + 1 :], **kwargs)


def gather_in_one(shard: Any, group: Any) -> Any:
    whole = shard.new_empty(group.size() * len(shard), shard.shape[1])
    torch.distributed.all_gather_into_tensor(whole, shard.contiguous(), group)
    return torch.cat(whole.chunk(group.size()), dim=-1)


def broadcast_from_rank_0(original: Any, *args: Any, **kwargs: Any) -> None:
    if "src" in kwargs:
        kwargs["src"] = 0
    original(*args, **kwargs)


def with_barrier(original: Any, *args: Any) -> Any:
    torch.distributed.barrier()
    return original(*args)


def with_gathered_objects(original: Any, *args: Any) -> Any:
    torch.distributed.all_gather_object([None] * torch.distributed.get_world_size(), 0)
    return original(*args)


_models: list[Any] = []
"""Keeps all loaded models in memory."""


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
        "Each rank expects one row more from every rank than the rank sends.",
        replace_with(gather_too_much),
    ),
    "match_names": (
        "recipes.distillation.trainer:_load_main_weights",
        "Megatron's function restores the main weights. It also finds the teacher's weights.",
        replace_with(load_as_megatron),
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
        "A rank of the last stage all-reduces tensors of another shape.",
        wrap(total_of_two_columns),
    ),
    "wrong_root": (
        "torch.distributed:broadcast_object_list",
        "A rank of the first stage expects a broadcast from rank 0 instead of the last stage.",
        wrap(broadcast_from_rank_0),
    ),
    "skip_receive": (
        "megatron.core.pipeline_parallel.p2p_communication:_batched_p2p_ops",
        "A pipeline stage receives nothing in its second exchange of messages.",
        in_second_call(lambda original, **kwargs: original(**{**kwargs, "tensor_recv_prev": None})),
    ),
    "reverse_groups": (
        "megatron.core.parallel_state:RankGenerator.get_ranks",
        "A rank creates the process groups of each type in reverse order.",
        wrap(lambda original, *args, **kwargs: original(*args, **kwargs)[::-1]),
    ),
    "add_barrier": (
        "recipes.distillation.trainer:_load_main_weights",
        "One rank calls an additional barrier.",
        wrap(with_barrier),
    ),
    "gather_in_one": (
        "recipes.distillation.vocabulary:gather",
        "One rank gathers with another collective: into one tensor instead of a list.",
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
"""Maps the name of each defect to (target, reason, replace), which are fields of its ``Patch``: the
replaced function, a description of the defect, and the factory of the faulty function."""


def main() -> None:
    """Rehearses the jobs of the file that the command line names, each in a fork."""
    jobs_with_defects = json.loads(Path(sys.argv[1]).read_text())
    # Only results go to standard output. What libraries print there goes to standard error.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rehearse = prepare()

    def rehearse_with_defect(job: dict[str, Any], defect: str | None) -> RehearsalResult:
        if defect is not None:
            target, description, replace = DEFECTS[defect]
            # An empty ``source_hash`` means that the original is not checked.
            apply([Patch(target, description, source_hash="", replace=replace)])
        return rehearse(TypeAdapter(RankJob).validate_python(job))

    tasks = (partial(rehearse_with_defect, job, defect) for job, defect in jobs_with_defects)
    for result in in_forks(tasks, cores()):
        print(json.dumps(asdict(result)), file=results, flush=True)


if __name__ == "__main__":
    main()
