"""Program that each rank of ``test_families`` runs: all families in turn, at TP=2 or PP=2."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.manifests import bare_manifest, dataset_result

TP, PP, DP = "TP=2", "PP=2", "DP=2"
"""Parallel layouts. They are also names of output folders."""
DATA_PARALLEL = ("llama", "qwen3_moe")
"""Families that are trained at DP=2: a dense one and an MoE."""
SEQ_LENGTH = 32
LEARNING_RATE = 1e-2  # large enough that one step changes every weight
LOGITS = "logits.safetensors"
"""Name of the file with the teacher's logits."""


def main(layout: str, root: Path) -> None:
    """Trains students for one step, then computes teachers' logits, on this rank of two.

    Outputs go to a folder of the layout in ``root/<family>/``, such as ``TP=2/``.

    Args:
        layout: ``TP``: trains all families and computes logits, at TP=2. ``PP``: trains the
            families ``DATA_PARALLEL`` at DP=2, where each rank has half of the optimizer's weights.
            Then computes logits of all families at PP=2.
        root: Folder of the fixture ``root`` of ``test_families``.
    """
    from megatron.core import parallel_state

    from nemo_convert import nemo

    folders = sorted(path.parent for path in root.glob("*/teacher.nemo"))
    for folder in folders:
        (folder / layout).mkdir(exist_ok=True)
    training_layout = TP if layout == TP else DP
    # Training comes first, because NeMo's trainer must initialise torch.distributed itself.
    for folder in folders:
        if training_layout == TP or folder.name in DATA_PARALLEL:
            out = folder / training_layout
            out.mkdir(exist_ok=True)
            distil(
                folder, root / "data", out, tensor_parallel_size=2 if training_layout == TP else 1
            )
    if training_layout == DP:  # the process groups of DP=2 are replaced with those of PP=2
        parallel_state.destroy_model_parallel()
    parallel = nemo.Parallelism(tensor=2) if layout == TP else nemo.Parallelism(pipeline=2)
    nemo.initialize(parallel)
    for folder in folders:
        write_logits(folder, layout, parallel)


def write_logits(folder: Path, layout: str, parallel: Any) -> None:
    """Computes the teacher's logits with our training layers, and writes them to ``LOGITS``.

    The logits are float32 [batch, sequence, vocabulary]. TP rank 0 of the last pipeline stage
    writes them.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from safetensors.torch import load_file, save_file

    from nemo_convert import nemo

    model = nemo.restore_model(folder / "teacher.nemo")
    core = nemo.build_core(model, parallel, torch.float32, training=True).eval()
    nemo.load_weights(core, folder / "teacher.nemo")
    tokens = load_file(folder.parent / "tokens.safetensors")["tokens"]
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    rank = torch.distributed.get_rank()
    with torch.no_grad():
        if not parallel_state.is_pipeline_first_stage():
            # Megatron's hidden states are [sequence, batch, hidden_size].
            hidden = torch.empty(tokens.shape[1], len(tokens), core.config.hidden_size)
            torch.distributed.recv(hidden, rank - 1)
            core.set_input_tensor(hidden)
        output = core(tokens, positions, None)
        if not parallel_state.is_pipeline_last_stage():
            torch.distributed.send(output.contiguous(), rank + 1)
            return
        logits = gather_from_tensor_model_parallel_region(output)
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        save_file({"logits": logits.contiguous()}, folder / layout / LOGITS)


def distil(folder: Path, data: Path, out: Path, tensor_parallel_size: int) -> None:
    """Trains a student one step in bfloat16, with losses on logits, hidden states and next tokens.

    Args:
        folder: Folder of a family, with ``teacher.nemo`` and ``pruned.nemo``.
        data: Artifact of a dataset.
        out: Folder for the metrics, the student ``work/artifact/s.nemo``, and checkpoints of
            training in ``work/``.
        tensor_parallel_size: Number of tensor-parallel ranks, 1 or 2. With 1, both ranks are
            data-parallel.
    """
    from recipes.core.metrics import METRICS, MetricsLog
    from recipes.core.stage import rank
    from recipes.distillation.objective import Objective, TeacherSource
    from recipes.distillation.settings import DistillConfig
    from recipes.distillation.trainer import train

    cfg = DistillConfig(
        stage="distill",
        precision="bf16-mixed",
        seq_length=SEQ_LENGTH,
        micro_batch_size=2,
        global_batch_size=4,
        max_steps=1,
        warmup_steps=0,
        checkpoint_interval=1,
        lr=LEARNING_RATE,
        weight_decay=0.0,
        tensor_model_parallel_size=tensor_parallel_size,
        sequence_parallel=tensor_parallel_size > 1,
    )
    cfg.resources.devices = 2
    # The teacher's layer 2 was pruned, so the student's layer 3 is compared with the teacher's 4.
    objective = Objective(
        {"kd": 1.0, "hidden": 0.5, "lm": 0.5}, TeacherSource(folder / "teacher.nemo", [(3, 4)])
    )
    log = MetricsLog(out / METRICS if rank() == 0 else None)
    manifest = bare_manifest("data", "dataset", dataset_result(data))
    text: Any = SimpleNamespace(artifact=data, manifest=manifest)
    (out / "work" / "artifact").mkdir(parents=True, exist_ok=True)
    train(cfg, folder / "pruned.nemo", objective, text, out / "work" / "artifact" / "s.nemo", log)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
