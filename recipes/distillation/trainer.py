"""NeMo's trainer, set up for one training stage: strategy, precision, optimizer, checkpoints."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm

from nemo_convert import cpu_backend, nemo
from nemo_convert.hf import copy_side_files
from recipes.core.deadline import StoppedByClockError, deadline, time_is_up
from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Input, rank, world_size
from recipes.distillation.data import TrainingData
from recipes.distillation.model import KDModel
from recipes.distillation.objective import Objective
from recipes.distillation.settings import TrainingConfig
from recipes.distillation.training import CHECKPOINTS, UNFINISHED, steps_in, whole_checkpoints


def train(
    cfg: TrainingConfig,
    start: Path,
    objective: Objective,
    data: Input,
    out: Path,
    log: MetricsLog,
) -> None:
    """Trains a model and writes it to ``out``; resumes from the last whole checkpoint.

    Args:
        cfg: The stage's config.
        start: NeMo checkpoint to start from.
        objective: What is minimised.
        data: Output of ``prepare_data``.
        out: Checkpoint directory to write.
        log: Metrics file; silent on ranks other than 0.
    """
    cpu_backend.enable()
    scratch = out.parent.parent
    restored = nemo.restore_model(start)
    restored.config.seq_length = cfg.seq_length
    _set_recompute(restored.config, cfg.recompute_granularity)
    model = KDModel(restored, objective)
    with nemo.outside_slurm():
        trainer = _trainer(cfg)
    # After construction: NeMo copies what it is given.
    trainer.callbacks.append(_Progress(cfg, log))
    if deadline() is not None:
        trainer.callbacks.append(_Clock(cfg))
    llm.train(
        model=model,
        data=TrainingData.of(cfg, data, restored.tokenizer, objective.teacher.cache),
        trainer=trainer,
        optim=_optimizer(cfg),
        log=nl.NeMoLogger(
            log_dir=str(scratch / "nemo"),
            use_datetime_version=False,
            update_logger_directory=False,
            ckpt=_checkpointing(cfg, scratch / CHECKPOINTS),
        ),
        resume=_resume(scratch / CHECKPOINTS, start),
        tokenizer=None,
    )
    _save_trained(cfg, model, restored, nemo.side_files(start), out)


def _save_trained(
    cfg: TrainingConfig, model: KDModel, restored: Any, side: Path, out: Path
) -> None:
    """Writes the model alone, in the type it was trained in, and says so in both configs."""
    written = restored.__io__.config
    written.params_dtype, written.bf16 = cfg.dtype, cfg.dtype == torch.bfloat16
    # The layout of this training is not the model's.
    written.tensor_model_parallel_size = written.pipeline_model_parallel_size = 1
    written.context_parallel_size = written.expert_model_parallel_size = 1
    written.sequence_parallel = False
    _set_recompute(written, "none")
    with tempfile.TemporaryDirectory() as temporary, model.without_loss_modules():
        staged = Path(temporary) / nemo.SIDE
        copy_side_files(side, staged)
        config = read_json(staged / "config.json")
        config.pop("dtype", None)  # the newer name of the same
        config["torch_dtype"] = str(cfg.dtype).removeprefix("torch.")
        write_json(staged / "config.json", config, indent=2)
        nemo.save_checkpoint(out, restored, model.core_module, staged, rank())


def _set_recompute(config: Any, granularity: str) -> None:
    """What the backward pass computes again: nothing, attention's scores, or all of a layer."""
    config.recompute_granularity = None if granularity == "none" else granularity
    full = granularity == "full"
    config.recompute_method = "uniform" if full else None
    config.recompute_num_layers = 1 if full else None


class _Strategy(nl.MegatronStrategy):  # type: ignore[misc]
    """NeMo's strategy; starts from a checkpoint without what our loss learns, and unrounded."""

    def selective_restore(self) -> None:
        """Loads the weights to start from."""
        model, optimizer = self.lightning_module, self.optimizers[0].mcore_optimizer
        with model.without_loss_modules():
            super().selective_restore()
            if optimizer.config.bf16:  # else there are no other weights than the model's
                weights = Path(self.restore_config.path) / nemo.WEIGHTS
                _load_main_weights(model.core_module, optimizer, weights)


@torch.no_grad()
def _load_main_weights(core: Any, optimizer: Any, weights: Path) -> None:
    """Gives the optimizer's float32 weights what the checkpoint has.

    NeMo copies them from the model's, which are rounded to bfloat16: all start in the middle of a
    rounding interval, and a model of small updates does not move for the first steps.
    """
    state = core.sharded_state_dict(prefix="module.")
    for item in state.values():
        if torch.is_tensor(getattr(item, "data", None)) and item.data.is_floating_point():
            item.data = item.data.float()
            if hasattr(item, "dtype"):
                item.dtype = torch.float32
    exact = dist_checkpointing.load(state, str(weights))
    if optimizer.config.use_distributed_optimizer:
        optimizer.reload_model_params(exact)
        return
    for name, parameter in core.named_parameters():
        if (main := getattr(parameter, "main_param", None)) is not None:
            main.copy_(exact[f"module.{name}"])


def _trainer(cfg: TrainingConfig) -> Any:
    on_cpu = not torch.cuda.is_available()
    strategy = _Strategy(
        tensor_model_parallel_size=cfg.tensor_model_parallel_size,
        pipeline_model_parallel_size=cfg.pipeline_model_parallel_size,
        context_parallel_size=cfg.context_parallel_size,
        expert_model_parallel_size=cfg.expert_model_parallel_size,
        sequence_parallel=cfg.splits_sequence,
        pipeline_dtype=cfg.dtype,
        ddp=DistributedDataParallelConfig(
            grad_reduce_in_fp32=cfg.grad_reduce_in_fp32, use_distributed_optimizer=not on_cpu
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
            precision=cfg.precision,
            params_dtype=cfg.dtype,
            pipeline_dtype=cfg.dtype,
            grad_reduce_in_fp32=cfg.grad_reduce_in_fp32,
        ),
        max_steps=cfg.max_steps,
        val_check_interval=min(cfg.val_check_interval, cfg.max_steps),
        check_val_every_n_epoch=None,  # counts steps from the start, also after a restart
        limit_val_batches=cfg.limit_val_batches,
        limit_test_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )


def _optimizer(cfg: TrainingConfig) -> Any:
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


def _checkpointing(cfg: TrainingConfig, directory: Path) -> Any:
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


def _resume(checkpoints: Path, start: Path) -> Any:
    """Resumes from the newest whole checkpoint, else starts from the weights of ``start``.

    NeMo gives up when the last checkpoint is unfinished, as it is after a kill while saving; the
    one before is whole, so that is used instead.
    """
    whole = whole_checkpoints(checkpoints)
    if rank() == 0:
        for marker in checkpoints.glob(f"*{UNFINISHED}"):
            shutil.rmtree(checkpoints / marker.name.removesuffix(UNFINISHED), ignore_errors=True)
            marker.unlink()
    restore = nl.RestoreConfig(path=str(start), load_artifacts=False)
    if not whole:
        return nl.AutoResume(restore_config=restore)
    latest = max(whole, key=steps_in)
    return nl.AutoResume(restore_config=restore, resume_from_path=str(latest))


class _Progress(Callback):
    """Logs every step, and keeps an update that is not finite from the weights."""

    def __init__(self, cfg: TrainingConfig, log: MetricsLog) -> None:
        self._cfg, self._log = cfg, log
        self._last = time.monotonic()
        self._norm = 0.0
        self._skipped = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock, and stands guard before the optimizer's update."""
        self._last = time.monotonic()
        optimizer = trainer.optimizers[0].mcore_optimizer
        norm, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads

        def get_grad_norm() -> float:
            self._norm = float(norm())
            return self._norm

        optimizer.get_grad_norm = get_grad_norm
        optimizer.step_with_ready_grads = lambda: self._guarded(update, trainer, pl_module)

    def _guarded(self, update: Callable[[], bool], trainer: Any, model: KDModel) -> bool:
        """Updates unless the gradient's norm is not finite, which every rank sees alike."""
        if math.isfinite(self._norm):
            return update()
        self._skipped += 1
        if self._skipped > self._cfg.max_nonfinite_steps:
            losses = ", ".join(f"{n} {value:.4g}" for n, value in model.share_losses().items())
            skipped = self._cfg.max_nonfinite_steps
            raise RecipeError(
                f"step {trainer.global_step + 1}: the gradient is not finite ({losses})"
                + (f", and {skipped} such step(s) were skipped before." if skipped else ".")
                + " The weights were not touched; the last checkpoint is good.",
                f"lower stages.{self._cfg.stage}.lr, or look at the text of this step",
            )
        return False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Logs the step's losses, gradient norm, learning rate and speed."""
        now = time.monotonic()
        tokens = self._cfg.global_batch_size * self._cfg.seq_length
        values = {
            **pl_module.share_losses(),
            "grad_norm": self._norm,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        if not math.isfinite(self._norm):
            values = {name: v if math.isfinite(v) else None for name, v in values.items()}
            values["skipped"] = True
        values["tokens_per_second"] = round(tokens / (now - self._last), 1)
        self._last = now
        self._log.progress(self._cfg.stage, trainer.global_step, self._cfg.max_steps, **values)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Logs the next-token loss on the validation part."""
        loss = float(trainer.callback_metrics["val_loss"])
        self._log.progress("validate", trainer.global_step, self._cfg.max_steps, val_loss=loss)
        self._last = time.monotonic()


class _Clock(Callback):
    """Saves and stops when the deadline has come.

    Not NeMo's own way, a timer that ends the fit as if it were complete: what follows would use a
    half-trained model. And not a signal: it would have to reach every rank through a container.
    """

    def __init__(self, cfg: TrainingConfig) -> None:
        self._cfg = cfg

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Asks all ranks, whose clocks differ, after every step but the last."""
        step = trainer.global_step
        if step >= self._cfg.max_steps:
            return
        if not trainer.strategy.reduce_boolean_decision(time_is_up(), all=False):
            return
        saving = trainer.checkpoint_callback
        saving._save_topk_checkpoint(trainer, saving._monitor_candidates(trainer))
        raise StoppedByClockError(
            f"stopped by the clock at step {step} of {self._cfg.max_steps}; a checkpoint is saved.",
            "run the same command to go on",
        )
