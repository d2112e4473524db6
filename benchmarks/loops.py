"""Baselines of ``benchmarks.distill``: PyTorch loops, and ModelOpt's Hugging Face trainer.

All baselines use transformers models with scaled dot-product attention, fused AdamW with float32
weights, and clipped gradients. In bfloat16, the student runs in autocast, and the teacher has
bfloat16 weights.
"""

from __future__ import annotations

import importlib.util
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from benchmarks.distill import Shape, TrainingRun
from nemo_convert.nemo import find_checkpoint
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT
from recipes.data.token_sequences import first_sequences
from recipes.evaluation.text_quality import load_transformers

LR, BETA1, BETA2, WEIGHT_DECAY, CLIP = 1e-4, 0.9, 0.95, 0.1, 1.0
"""The optimizer settings of the stage ``distill``, with a constant learning rate. ``CLIP`` is the
largest norm of the gradient."""


@dataclass(frozen=True)
class LoopInputs:
    """Inputs of a baseline. Both models are transformers models."""

    teacher: Any
    student: Any
    batches: Tensor
    """Tokens, int64 [steps, micro batch, sequence]."""
    bfloat16: bool
    """Whether models run in autocast to bfloat16. If not, they run in float32."""


def loss_of(inputs: LoopInputs, tokens: Tensor) -> Tensor:
    """Returns a batch's mean KL(teacher ‖ student) per token, in float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=inputs.bfloat16):
        with torch.inference_mode():
            teacher_logits = inputs.teacher(tokens).logits
        student_logits = inputs.student(tokens).logits
    student_log_probs, teacher_log_probs = (
        log_softmax(logits.float().flatten(0, 1), dim=-1)
        for logits in (student_logits, teacher_logits)
    )
    kl_sum = kl_div(student_log_probs, teacher_log_probs, log_target=True, reduction="sum")
    return kl_sum / tokens.numel()


def train_in_loop(inputs: LoopInputs, record: TrainingRun) -> None:
    """Trains in a plain PyTorch loop. Adds each step to ``record``."""
    optimizer = torch.optim.AdamW(
        inputs.student.parameters(),
        lr=LR,
        betas=(BETA1, BETA2),
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    for tokens in inputs.batches:
        loss = loss_of(inputs, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(inputs.student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        record.ends.append(time.time())
        record.losses.append(loss.item())


def train_with_modelopt(inputs: LoopInputs, record: TrainingRun) -> None:
    """Trains with ModelOpt's ``KDTrainer``. Adds each step to ``record``.

    Raises ``RecipeError`` if accelerate, which the trainer needs, is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise RecipeError("accelerate is not installed", "install it with make install")
    from modelopt.torch.distill.plugins.huggingface import KDTrainer, LMLogitsLoss
    from transformers import TrainerCallback, TrainingArguments

    class RecordSteps(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if "loss" in more["logs"]:  # the last log entry is a summary without a loss
                record.ends.append(time.time())
                record.losses.append(more["logs"]["loss"])

    class UnshuffledTrainer(KDTrainer):
        def _get_train_sampler(self, *_: Any) -> None:
            """Returns ``None``, so that sequences keep their order."""

    _, micro_batch, _ = inputs.batches.shape
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=inputs.bfloat16,
            max_steps=len(inputs.batches),
            per_device_train_batch_size=micro_batch,
            optim="adamw_torch_fused",
            learning_rate=LR,
            adam_beta1=BETA1,
            adam_beta2=BETA2,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = UnshuffledTrainer(
            inputs.student,
            settings,
            distill_config={
                "teacher_model": inputs.teacher,
                # The compared modules of student and teacher; "" is the whole model.
                "criterion": {("", ""): LMLogitsLoss()},
            },
            train_dataset=[{"input_ids": s, "labels": s} for s in inputs.batches.flatten(0, 1)],
            callbacks=[RecordSteps()],
        )
        trainer.train()


LOOPS: dict[str, tuple[Callable[[LoopInputs, TrainingRun], None], bool]] = {
    "loop-fp32": (train_in_loop, False),
    "loop-bf16": (train_in_loop, True),
    "modelopt-bf16": (train_with_modelopt, True),
}
"""Training function of each baseline, and whether the models run in bfloat16."""


def run_baseline(name: str, shape: Shape, run_dir: Path) -> TrainingRun:
    """Trains a baseline in this process, with the teacher, student and text of ``run_dir``.

    Raises:
        RecipeError: The run has too little text, or a library of the baseline is not installed.
    """
    train, bfloat16 = LOOPS[name]
    count = shape.steps * shape.micro_batch
    prepared_text = run_dir / "prepare_data" / ARTIFACT
    sequences = first_sequences(prepared_text, "train", shape.seq_length, count)
    if len(sequences) < count:
        raise RecipeError(
            f"training needs {count} sequences, but {run_dir} has {len(sequences)}",
            "lower --steps",
        )
    teacher = load_transformers(find_checkpoint(run_dir / "import_hf" / ARTIFACT))
    student = load_transformers(find_checkpoint(run_dir / "prune" / ARTIFACT))
    teacher.config.use_cache = student.config.use_cache = False
    teacher = teacher.to(torch.bfloat16 if bfloat16 else torch.float32)
    record = TrainingRun()
    batches = sequences.view(shape.steps, shape.micro_batch, shape.seq_length)
    train(LoopInputs(teacher, student.train(), batches, bfloat16), record)
    record.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # from KiB
    return record
