"""Rehearses jobs with defects: ``defects.py JOBS`` (JSON: a list of [job, defect or null])."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from recipes.rehearsal.job import RankJob, RehearsalResult
from recipes.rehearsal.worker import in_fork, prepare


def mix_devices() -> None:
    """A tensor is made on the CPU, but the logits are on the GPU."""
    import torch

    from recipes.distillation import model

    loss = model.combined_loss

    def mixed(student: Any, *args: Any) -> Any:
        return loss(student * torch.ones(student.shape[-1]), *args)

    model.combined_loss = mixed


def gather_too_much() -> None:
    """Ranks gather one row more than each of them has."""
    import torch
    from torch.distributed import all_gather

    from recipes.distillation import vocabulary

    def gather(shard: Any, group: Any) -> Any:
        shards = [shard.new_empty(len(shard) + 1, shard.shape[1]) for _ in range(group.size())]
        all_gather(shards, shard, group)
        return torch.cat(shards, dim=-1)

    vocabulary.gather = gather


def match_names() -> None:
    """Main weights are restored as Megatron does, which also matches the teacher's names."""
    from megatron.core import dist_checkpointing

    from recipes.distillation import trainer

    def load(core: Any, optimizer: Any, weights: Path) -> None:
        state = core.sharded_state_dict(prefix="module.")
        optimizer.reload_model_params(dist_checkpointing.load(state, str(weights)))

    trainer._load_main_weights = load


def leave_on_cpu() -> None:
    """A model is cast but not moved, and Megatron makes its local norms on the CPU."""
    from nemo_convert import nemo

    build = nemo.build_core

    def built(*args: Any, **kwargs: Any) -> Any:
        core = build(*args, **kwargs)
        for layer in core.decoder.layers:
            layer.input_layernorm.cpu()
        return core

    nemo.build_core = built


def count_steps_on_cpu() -> None:
    """The step counts and the scale of the fused optimizer are on the CPU."""
    import torch

    from recipes.backend import adamw

    update = adamw.adamw

    def updated(weights: Any, gradients: Any, *states: Any, **settings: Any) -> None:
        *moments, maxima, steps = states
        steps = [torch.tensor(1.0) for _ in steps]
        update(weights, gradients, *moments, maxima, steps, **settings)

    adamw.adamw = updated


def index_on_cpu() -> None:
    """Rows of a weight on the GPU are chosen by an index on the CPU."""
    import torch

    from recipes.search import measure

    prune_weight = measure.prune_weight

    def indexed(name: str, tensor: Any, *args: Any) -> Any:
        return prune_weight(name, tensor.index_select(0, torch.arange(len(tensor))), *args)

    measure.prune_weight = indexed


def send_half() -> None:
    """A pipeline stage sends the student's hidden states without the teacher's."""
    _send(lambda both: both[..., : both.shape[-1] // 2].contiguous())


def send_wide() -> None:
    """A pipeline stage sends hidden states in float32, but the next one expects bfloat16."""
    _send(lambda both: both.float())


def _send(change: Callable[[Any], Any]) -> None:
    from recipes.distillation import model

    forward = model._forward_both

    def changed(core: Any, *args: Any, **kwargs: Any) -> Any:
        both = forward(core, *args, **kwargs)
        return change(both) if core.training and os.environ["RANK"] == "0" else both

    model._forward_both = changed


def widen() -> None:
    """A model is built with a wider feed-forward layer than its checkpoint has."""
    _restore_with(lambda config: setattr(config, "ffn_hidden_size", config.ffn_hidden_size + 16))


def add_norms() -> None:
    """A model is built with norms of queries and keys, which its checkpoint does not have."""
    _restore_with(lambda config: setattr(config, "qk_layernorm", True))


def _restore_with(change: Callable[[Any], None]) -> None:
    from nemo_convert import nemo

    restore = nemo.restore_model

    def restored(checkpoint: Path) -> Any:
        model = restore(checkpoint)
        change(model.config)
        return model

    nemo.restore_model = restored


def lose_a_row() -> None:
    """A conversion makes weights without their last row."""
    from nemo_convert import convert

    make = convert.MergedWeights.__call__
    convert.MergedWeights.__call__ = lambda weights, *where: make(weights, *where)[:-1]


def keep_all() -> None:
    """All evaluated models stay in memory, in float32."""
    import torch

    from recipes.evaluation import text_quality

    load, models = text_quality.load_transformers, []

    def loaded(checkpoint: Path, dtype: Any) -> Any:
        models.append(load(checkpoint, torch.float32))
        return models[-1]

    text_quality.load_transformers = loaded


def main() -> None:
    planned = json.loads(Path(sys.argv[1]).read_text())
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rehearse = prepare()
    for plain, defect in planned:

        def with_defect(job: RankJob, defect: str | None = defect) -> RehearsalResult:
            if defect is not None:
                globals()[defect]()
            return rehearse(job)

        result = in_fork(with_defect, TypeAdapter(RankJob).validate_python(plain))
        print(json.dumps(asdict(result)), file=results, flush=True)


if __name__ == "__main__":
    main()
