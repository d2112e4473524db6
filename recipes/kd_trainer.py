"""NeMo's trainer, set up for distillation: strategy, precision, optimizer, data, checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm

from nemo_convert import cpu_backend, nemo
from nemo_convert.hf import copy_side_files
from recipes.errors import RecipeError
from recipes.indexed_dataset import prefix
from recipes.kd_model import KDModel
from recipes.manifest import write_text_atomically
from recipes.metrics import MetricsLog
from recipes.sources import read_json
from recipes.stage import Input, rank, world_size

if TYPE_CHECKING:
    from recipes.distill import Config

UNFINISHED = "-unfinished"
"""Suffix of the marker that NeMo keeps beside a checkpoint while it is being written."""


def distill_checkpoint(
    cfg: Config, student: Path, teacher: Path, data: Input, out: Path, log: MetricsLog
) -> None:
    """Trains the student and writes it to ``out``; resumes from the last whole checkpoint.

    Args:
        cfg: The stage's config.
        student: NeMo checkpoint to start from.
        teacher: NeMo checkpoint to learn from.
        data: Output of ``prepare_data``.
        out: Checkpoint directory to write.
        log: Metrics file; silent on ranks other than 0.
    """
    cpu_backend.enable()
    scratch = out.parent.parent
    checkpoints = scratch / "checkpoints"
    student_model = nemo.restore_model(student)
    student_model.config.seq_length = cfg.seq_length
    model = KDModel(
        student_model,
        nemo.restore_model(teacher),
        teacher / nemo.WEIGHTS,
        temperature=cfg.temperature,
        kd_weight=cfg.kd_weight,
        lm_weight=cfg.lm_weight,
    )
    trainer = _trainer(cfg)
    # After construction: NeMo copies what it is given.
    trainer.callbacks.append(_Progress(cfg, log))
    llm.train(
        model=model,
        data=_data(cfg, data, student_model.tokenizer, scratch / "index"),
        trainer=trainer,
        optim=_optimizer(cfg),
        log=nl.NeMoLogger(
            log_dir=str(scratch / "nemo"),
            use_datetime_version=False,
            update_logger_directory=False,
            ckpt=_checkpointing(cfg, checkpoints),
        ),
        resume=_resume(checkpoints, student),
        tokenizer=None,
    )
    _save_student(cfg, model, student_model, nemo.side_files(student), out)


def _save_student(cfg: Config, model: KDModel, student_model: Any, side: Path, out: Path) -> None:
    """Writes the student alone, in the type it was trained in, and says so in both configs."""
    student_model.__io__.config.params_dtype = cfg.dtype
    student_model.__io__.config.bf16 = cfg.dtype == torch.bfloat16
    with tempfile.TemporaryDirectory() as temporary, model.core_module.hide_loss_modules():
        staged = Path(temporary) / nemo.SIDE
        copy_side_files(side, staged)
        config = read_json(staged / "config.json")
        config.pop("dtype", None)  # the newer name of the same
        config["torch_dtype"] = str(cfg.dtype).removeprefix("torch.")
        write_text_atomically(staged / "config.json", json.dumps(config, indent=2) + "\n")
        nemo.save_checkpoint(out, student_model, model.core_module, staged, rank())


def _trainer(cfg: Config) -> Any:
    on_cpu = not torch.cuda.is_available()
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=cfg.tensor_model_parallel_size,
        pipeline_model_parallel_size=cfg.pipeline_model_parallel_size,
        pipeline_dtype=cfg.dtype,
        ddp=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=not on_cpu
        ),
        process_group_backend="gloo" if on_cpu else None,
        # NeMo's progress bar gathers on rank 0 only and hangs with several gloo ranks.
        replace_progress_bar=False,
        ckpt_async_save=False,
        gradient_as_bucket_view=True,
    )
    devices = int(world_size() // cfg.resources.nodes)
    return nl.Trainer(
        devices=devices,
        num_nodes=cfg.resources.nodes,
        accelerator="cpu" if on_cpu else "gpu",
        strategy=strategy,
        plugins=nl.MegatronMixedPrecision(
            precision=cfg.precision, params_dtype=cfg.dtype, pipeline_dtype=cfg.dtype
        ),
        max_steps=cfg.max_steps,
        val_check_interval=min(cfg.val_check_interval, cfg.max_steps),
        limit_val_batches=cfg.limit_val_batches,
        limit_test_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )


def _optimizer(cfg: Config) -> Any:
    on_cpu = not torch.cuda.is_available()
    return nl.MegatronOptimizerModule(
        config=OptimizerConfig(
            optimizer="adam",
            lr=cfg.lr,
            min_lr=cfg.min_lr,
            weight_decay=cfg.weight_decay,
            adam_beta1=cfg.adam_beta1,
            adam_beta2=cfg.adam_beta2,
            clip_grad=cfg.clip_grad,
            bf16=cfg.precision == "bf16-mixed",
            params_dtype=cfg.dtype,
            use_distributed_optimizer=not on_cpu,
        ),
        lr_scheduler=nl.lr_scheduler.CosineAnnealingScheduler(
            max_steps=cfg.max_steps,
            warmup_steps=cfg.warmup_steps,
            constant_steps=0,
            min_lr=cfg.min_lr,
        ),
    )


def _data(cfg: Config, data: Input, tokenizer: Any, index: Path) -> Any:
    paths = {part: [str(prefix(data.artifact, part))] for part in ("train", "validation")}
    return llm.PreTrainingDataModule(
        paths={**paths, "test": paths["validation"]},
        seq_length=cfg.seq_length,
        micro_batch_size=cfg.micro_batch_size,
        global_batch_size=cfg.global_batch_size,
        tokenizer=tokenizer,
        num_workers=0,
        pin_memory=torch.cuda.is_available(),
        index_mapping_dir=str(index),
        seed=cfg.seed,
    )


def _checkpointing(cfg: Config, directory: Path) -> Any:
    return nl.ModelCheckpoint(
        dirpath=str(directory),
        filename="{step}",
        monitor="step",
        mode="max",
        save_top_k=cfg.keep_checkpoints,
        save_last=False,
        every_n_train_steps=cfg.checkpoint_interval,
        save_optim_on_train_end=True,
        save_context_on_train_end=False,
        always_save_context=False,
    )


def _resume(checkpoints: Path, student: Path) -> Any:
    """Resumes from the newest whole checkpoint, else starts from the student's weights.

    NeMo gives up when the last checkpoint is unfinished, as it is after a kill while saving; the
    one before is whole, so that is used instead.
    """
    unfinished = {p.name.removesuffix(UNFINISHED) for p in checkpoints.glob(f"*{UNFINISHED}")}
    whole = [p for p in checkpoints.glob("*") if p.is_dir() and p.name not in unfinished]
    if rank() == 0:
        for name in unfinished:
            shutil.rmtree(checkpoints / name, ignore_errors=True)
            (checkpoints / f"{name}{UNFINISHED}").unlink()
    restore = nl.RestoreConfig(path=str(student), load_artifacts=False)
    if not whole:
        return nl.AutoResume(restore_config=restore)
    latest = max(whole, key=lambda path: int(path.name.rpartition("=")[2].split("-")[0]))
    return nl.AutoResume(restore_config=restore, resume_from_path=str(latest))


class _Progress(Callback):
    """Logs every step and stops on a loss that is not finite."""

    def __init__(self, cfg: Config, log: MetricsLog) -> None:
        self._cfg, self._log = cfg, log
        self._last = time.monotonic()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock."""
        self._last = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Logs the step's losses, gradient norm, learning rate and speed."""
        now, step = time.monotonic(), trainer.global_step
        tokens = self._cfg.global_batch_size * self._cfg.seq_length
        pl_module.share_losses()
        values = {
            **pl_module.last_losses,
            "teacher_loss": pl_module.teacher_loss,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": round(tokens / (now - self._last), 1),
        }
        norm = trainer.callback_metrics.get("grad_norm")
        if norm is not None:
            values["grad_norm"] = float(norm)
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise RecipeError(
                f"step {step}: {', '.join(bad)} is not finite.", "lower stages.distill.lr"
            )
        self._last = now
        self._log.progress("distill", step, self._cfg.max_steps, **values)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Logs the student's next-token loss on the validation part."""
        loss = float(trainer.callback_metrics["val_loss"])
        self._log.progress("validate", trainer.global_step, self._cfg.max_steps, val_loss=loss)
        self._last = time.monotonic()
