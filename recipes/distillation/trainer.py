"""Sets up NeMo's trainer for a training stage and runs it."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import LambdaCallback
from megatron.core.dist_checkpointing import ShardedTensor, load_tensors_metadata
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm

from nemo_convert import nemo
from nemo_convert.hf import copy_side_files
from nemo_convert.sharded import read_sharded
from recipes.backend.cpu_speed import speed_patches
from recipes.backend.device import COLLECTIVE_TIMEOUT, collective_backend, device, select_gpu
from recipes.backend.megatron_faults import mend
from recipes.backend.without_cuda import enable as enable_patches_without_cuda
from recipes.core.compiled import compilation
from recipes.core.files import link_or_copy, read_json, write_json
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Input, deadline, metrics_file, rank, shared_store, world_size
from recipes.core.wheels import cache_dir
from recipes.distillation.callbacks import (
    CollectGarbage,
    Profile,
    SaveStudents,
    StepLogger,
    StopAtDeadline,
    StopAtRecovered,
    gather_weights,
)
from recipes.distillation.data import TrainingData
from recipes.distillation.model import KDModel
from recipes.distillation.objective import Objective
from recipes.distillation.settings import DistillConfig, TrainingConfig
from recipes.distillation.training import (
    CHECKPOINTS,
    UNFINISHED,
    complete_checkpoints,
    steps_of_checkpoint,
)


def train(
    cfg: TrainingConfig, start: Path, objective: Objective, data: Input, out: Path, log: MetricsLog
) -> None:
    """Trains a model, or resumes its training from the last complete checkpoint.

    ``start`` is the checkpoint with the initial weights. ``out`` is the path of the trained model,
    in the folder ``artifact`` of the stage's work folder. ``log`` receives the losses and the speed
    of each step.
    """
    _set_environment(cfg)
    select_gpu()
    enable_patches_without_cuda()
    mend()  # patches faults of Megatron
    work = out.parent.parent  # also gets the training checkpoints
    start_model = _restore_for_training(cfg, start)
    model = KDModel(start_model, objective)
    with nemo.outside_slurm():  # else the trainer would expect one rank per task of a Slurm job
        trainer = _trainer(cfg)
    # Callbacks are added here, because NeMo would copy callbacks that its trainer's constructor
    # gets. The first two must run before the trainer's own callback saves a checkpoint:
    # ``StepLogger`` sends the losses to rank 0, which stores them in the checkpoint.
    trainer.callbacks = [CollectGarbage(cfg), StepLogger(cfg, log), *trainer.callbacks]
    save = partial(_save_trained, cfg, model, start_model, start)
    if isinstance(cfg, DistillConfig) and cfg.student_steps:
        # Also before the callback that saves checkpoints, so that no checkpoint lacks a student.
        trainer.callbacks.insert(1, SaveStudents(cfg.student_steps, work / nemo.STEPS, save))
    if isinstance(cfg, DistillConfig) and objective.teacher.runs_in_validation:
        trainer.num_sanity_val_steps = cfg.limit_val_batches  # a validation before the first step
        trainer.callbacks.append(StopAtRecovered(cfg, metrics_file(out.parent)))
    # After training, Lightning moves the weights from a GPU to the CPU, out of Megatron's buffers.
    # Shards of weights can be gathered only in these buffers, so this callback gathers them first.
    trainer.callbacks.append(LambdaCallback(on_train_end=lambda *_: gather_weights(model)))
    if deadline() is not None:
        trainer.callbacks.append(StopAtDeadline(cfg))
    if cfg.profile_steps:
        first, last = cfg.profile_steps
        trainer.callbacks.append(Profile((first, last), work.parent / "profile"))
    with compilation(bool(cfg.compile)), speed_patches(cfg.cpu_speed_patches):
        llm.train(
            model=model,
            data=TrainingData.of(cfg, data, start_model.tokenizer, objective.teacher.cache),
            trainer=trainer,
            optim=_optimizer(cfg),
            log=nl.NeMoLogger(
                log_dir=str(work / "nemo"),
                use_datetime_version=False,
                update_logger_directory=False,
                ckpt=_checkpointing(cfg, work / CHECKPOINTS),
            ),
            resume=_resume(work / CHECKPOINTS, start, cfg.keep_checkpoints),
            tokenizer=None,
        )
    save(out)
    if rank() == 0 and (work / nemo.STEPS).is_dir():
        # Students are linked, not moved: if a run is killed before the manifest is written, a
        # restart empties the artifact's folder, but not the work folder.
        shutil.copytree(work / nemo.STEPS, out.parent / nemo.STEPS, copy_function=link_or_copy)


def _restore_for_training(cfg: TrainingConfig, start: Path) -> Any:
    """Returns NeMo's model of a checkpoint, without weights, with a config for this training."""
    model = nemo.restore_model(start)
    model.config.seq_length = cfg.seq_length
    # Omits the loss that balances the load of experts. Megatron computes this loss per micro batch,
    # also on masked tokens, so results would depend on the size of micro batches.
    model.config.moe_aux_loss_coeff = 0.0
    _set_recompute(model.config, cfg.recompute_granularity)
    model.config.recompute_modules = cfg.recompute_modules
    return model


def _set_environment(cfg: TrainingConfig) -> None:
    """Sets the variables that PyTorch, NCCL, TransformerEngine and NeMo read when they start.

    Variables that are set already keep their values. ``CUDA_DEVICE_MAX_CONNECTIONS`` depends on
    the GPU, which is unknown before CUDA starts: the launcher sets it from the hardware profile.
    """
    defaults = {
        # With a normal priority, collectives would wait for kernels that they should overlap with.
        "TORCH_NCCL_HIGH_PRIORITY": "1",
        # TransformerEngine's norms leave this many multiprocessors to NCCL.
        "NVTE_FWD_LAYERNORM_SM_MARGIN": "16",
        "NVTE_BWD_LAYERNORM_SM_MARGIN": "16",
        # NeMo uses this variable as the timeout of collectives.
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(int(COLLECTIVE_TIMEOUT.total_seconds())),
    }
    if cfg.compile:
        defaults["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir() / "torchinductor")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _save_trained(
    cfg: TrainingConfig, model: KDModel, start_model: Any, start: Path, out: Path
) -> None:
    """Writes the trained model without the optimizer, with weights in ``cfg.dtype``.

    The caller must first gather the weights. ``model`` was built from ``start_model``. The
    tokenizer and the Hugging Face config are copied from the initial checkpoint ``start``.
    """
    saved_config = start_model.__io__.config  # NeMo's record of the config, which checkpoints store
    saved_config.params_dtype, saved_config.bf16 = cfg.dtype, cfg.dtype == torch.bfloat16
    saved_config.fp8, saved_config.first_last_layers_bf16 = None, False
    # The checkpoint has no parallel layout.
    saved_config.tensor_model_parallel_size = saved_config.pipeline_model_parallel_size = 1
    saved_config.context_parallel_size = saved_config.expert_model_parallel_size = 1
    saved_config.sequence_parallel = False
    _set_recompute(saved_config, "none")
    # The temporary folder is in the stage's work directory, where a restart removes it.
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary, model.without_loss_modules():
        staged = Path(temporary) / nemo.SIDE
        copy_side_files(nemo.side_folder(start), staged)
        config = read_json(staged / "config.json")
        config.pop("dtype", None)  # the name of torch_dtype in newer versions of transformers
        config["torch_dtype"] = str(cfg.dtype).removeprefix("torch.")
        write_json(staged / "config.json", config, indent=2)
        nemo.save_checkpoint(out, start_model, model.core_module, staged, rank())


def _set_recompute(config: Any, granularity: str) -> None:
    """Sets activation recomputation in a Megatron config, from ``recompute_granularity``."""
    config.recompute_granularity = None if granularity == "none" else granularity
    is_full = granularity == "full"
    config.recompute_method = "uniform" if is_full else None
    config.recompute_num_layers = 1 if is_full else None


class _Strategy(nl.MegatronStrategy):  # type: ignore[misc]
    """NeMo's strategy, except that initial weights are loaded in the checkpoint's precision."""

    def selective_restore(self) -> None:
        """Loads the initial weights into the model and the optimizer.

        The checkpoint lacks the parameters of the loss, such as ``HiddenLoss.projection``.
        """
        model, optimizer = self.lightning_module, self.optimizers[0].mcore_optimizer
        start = Path(self.restore_config.path)
        with model.without_loss_modules():
            nemo.load_weights(model.core_module, start)
            optimizer.reload_model_params()
            _load_main_weights(model.core_module, optimizer, start / nemo.WEIGHTS)


@torch.no_grad()
def _load_main_weights(core: Any, optimizer: Any, weights: Path) -> None:
    """Loads the optimizer's float32 main weights from a checkpoint more precise than bfloat16.

    Otherwise main weights would be copies of the model's bfloat16 weights, which are rounded.
    Megatron's ``reload_model_params(state)`` is not used: it matches names by substring, and
    would also find the teacher's weights.
    """
    stored = load_tensors_metadata(str(weights))
    to_read = {}  # the weights that the model has in lower precision than the checkpoint
    for name, item in core.sharded_state_dict(prefix="module.").items():
        if item.key in stored and stored[item.key].dtype.itemsize > item.data.itemsize:
            # The tensor to read into becomes float32.
            item.data = torch.empty_like(item.data, dtype=torch.float32, device="cpu")
            # The other type, ``ShardedTensorFactory``, has no dtype: it makes tensors of ``data``.
            if isinstance(item, ShardedTensor):
                item.dtype = torch.float32
            to_read[name] = item
    exact = read_sharded(to_read, weights) if to_read else {}
    names = {weight: f"module.{name}" for name, weight in core.named_parameters()}
    for opt in optimizer.chained_optimizers:  # one for dense weights, one for experts
        groups = zip(opt.model_float16_groups, opt.shard_fp32_from_float16_groups, strict=True)
        for group, main_group in groups:
            for weight, main_weight in zip(group, main_group, strict=True):
                if (exact_weight := exact.get(names.get(weight, ""))) is not None:
                    # ``shard`` is this rank's range of the flattened weight.
                    shard = opt._get_model_param_range_map(weight)["param"]
                    main_weight.copy_(exact_weight.flatten()[shard.start : shard.end])


def _trainer(cfg: TrainingConfig) -> Any:
    """Returns NeMo's trainer for the parallel layout and precision of the settings."""
    strategy = _Strategy(
        tensor_model_parallel_size=cfg.tensor_model_parallel_size,
        pipeline_model_parallel_size=cfg.pipeline_model_parallel_size,
        context_parallel_size=cfg.context_parallel_size,
        expert_model_parallel_size=cfg.expert_model_parallel_size,
        num_distributed_optimizer_instances=cfg.num_distributed_optimizer_instances,
        sequence_parallel=cfg.splits_sequence,
        pipeline_dtype=cfg.dtype,
        ddp=DistributedDataParallelConfig(
            grad_reduce_in_fp32=cfg.grad_reduce_in_fp32,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
        process_group_backend=collective_backend(),
        # NeMo's progress bar gathers on rank 0 only, so it hangs with several gloo ranks.
        replace_progress_bar=False,
        ckpt_async_save=True,
        ckpt_assume_constant_structure=True,
        ckpt_optim_fully_reshardable=True,  # a run may resume with another TP and PP
        gradient_as_bucket_view=True,
    )
    trainer = nl.Trainer(
        devices=int(world_size() // cfg.resources.nodes),
        num_nodes=cfg.resources.nodes,
        accelerator=device(),
        strategy=strategy,
        plugins=nl.MegatronMixedPrecision(
            precision=cfg.precision,
            params_dtype=cfg.dtype,
            pipeline_dtype=cfg.dtype,
            grad_reduce_in_fp32=cfg.grad_reduce_in_fp32,
            fp8=cfg.fp8,
            fp8_recipe=cfg.fp8_recipe,
            # With the recipe ``delayed``, all layers must have the same precision.
            first_last_layers_bf16=cfg.fp8 is not None and cfg.fp8_recipe != "delayed",
            num_layers_at_start_in_bf16=1,
            num_layers_at_end_in_bf16=1,
        ),
        max_steps=cfg.max_steps,
        val_check_interval=min(cfg.val_check_interval, cfg.max_steps),
        check_val_every_n_epoch=None,  # counts steps over all epochs, also after a restart
        limit_val_batches=cfg.limit_val_batches,
        limit_test_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    if world_size() == 1:  # the default store needs a port, which another run may be using
        trainer.strategy.store = torch.distributed.HashStore()
    return trainer


def _optimizer(cfg: TrainingConfig) -> Any:
    """Returns AdamW with NeMo's schedule: linear warm-up, then cosine decay."""
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
            use_distributed_optimizer=True,
            overlap_param_gather=True,
        ),
        lr_scheduler=nl.lr_scheduler.CosineAnnealingScheduler(
            max_steps=cfg.max_steps,
            warmup_steps=cfg.warmup_steps,
            constant_steps=0,
            min_lr=cfg.min_lr,
        ),
    )


def _checkpointing(cfg: TrainingConfig, directory: Path) -> Any:
    """Returns NeMo's callback that saves training checkpoints."""
    return nl.ModelCheckpoint(
        dirpath=str(directory),
        filename="{step}",
        monitor="step",  # keeps the newest checkpoints
        mode="max",
        save_top_k=cfg.keep_checkpoints,
        save_last=False,
        every_n_train_steps=cfg.checkpoint_interval,
        save_optim_on_train_end=True,
        save_context_on_train_end=False,
        always_save_context=False,
    )


def _resume(checkpoints: Path, start: Path, keep: int) -> Any:
    """Returns NeMo's settings: resume from the newest complete checkpoint, else load ``start``.

    Deletes incomplete checkpoints, because NeMo would fail if the newest checkpoint is incomplete.
    Also deletes all but the newest ``keep`` checkpoints, since ``keep`` may be lower than before.
    Rank 0 chooses for all ranks: on a network file system, nodes may list different checkpoints for
    some seconds.
    """
    store = shared_store()
    if store is not None and rank() != 0:
        newest = store.get(CHECKPOINTS).decode()  # waits until rank 0 has chosen
    else:
        complete = sorted(complete_checkpoints(checkpoints), key=steps_of_checkpoint)
        newest = str(complete[-1]) if complete else ""
        for old in complete[:-keep]:
            shutil.rmtree(old)
        for marker in checkpoints.glob(f"*{UNFINISHED}"):
            shutil.rmtree(checkpoints / marker.name.removesuffix(UNFINISHED), ignore_errors=True)
            marker.unlink()
        if store is not None:
            store.set(CHECKPOINTS, newest)
    restore = nl.RestoreConfig(path=str(start), load_artifacts=False)
    return nl.AutoResume(restore_config=restore, resume_from_path=newest or None)
