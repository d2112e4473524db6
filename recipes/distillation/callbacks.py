"""Trainer callbacks: logging, non-finite gradients, early stops, garbage collection, profiler."""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.core.processes import return_free_memory
from recipes.core.stage import StoppedByDeadlineError, rank, time_is_up
from recipes.distillation.model import KDModel
from recipes.distillation.settings import DistillConfig, TrainingConfig
from recipes.distillation.training import VALIDATE, stop_reason

PARTIAL = ".partial"
"""Suffix of a student's folder while it is being saved."""
COLLECT_EVERY = 100
"""Steps between runs of Python's garbage collector."""


class StepLogger(Callback):
    """Logs every step, and skips updates with a non-finite gradient."""

    def __init__(self, cfg: TrainingConfig, log: MetricsLog) -> None:
        self._cfg, self._log = cfg, log
        self._last = time.monotonic()  # end of the last step or validation
        self._norm = self._lr = 0.0  # gradient norm and learning rate of the last step
        # Number of tokens and mean losses of each batch of the current validation.
        self._validation: list[tuple[float, dict[str, float]]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the timer. Wraps the optimizer's methods that compute the norm and the update."""
        self._last = time.monotonic()
        optimizer = trainer.optimizers[0].mcore_optimizer
        compute_norm, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads

        def get_grad_norm() -> float:
            self._norm = float(compute_norm())
            # Stored now, because the update sets the learning rate of the next step.
            self._lr = trainer.optimizers[0].param_groups[0]["lr"]
            return self._norm

        optimizer.get_grad_norm = get_grad_norm
        optimizer.step_with_ready_grads = lambda: self._update_if_finite(update, trainer, pl_module)

    def _update_if_finite(self, update: Callable[[], bool], trainer: Any, model: KDModel) -> bool:
        """Updates the weights if the gradient norm, which is equal on all ranks, is finite.

        Returns:
            The result of ``update``; ``False`` tells Megatron that the update was skipped.

        Raises:
            RecipeError: More than ``max_nonfinite_steps`` steps had a non-finite gradient.
        """
        if math.isfinite(self._norm):
            return update()
        model.skipped_steps += 1
        # Exceeds the limit by more than 1 if the run was resumed with a lower limit.
        steps = model.skipped_steps
        if steps <= self._cfg.max_nonfinite_steps:
            return False
        finish_saving(trainer)  # the error below ends the process
        losses = ", ".join(f"{name} {value:.4g}" for name, value in model.share_losses().items())
        raise RecipeError(
            f"step {trainer.global_step + 1}: the gradient is not finite ({losses})"
            + (f", and {steps - 1} such step(s) were skipped before." if steps > 1 else ".")
            + " The weights were not updated; the last checkpoint is usable.",
            f"set stages.{self._cfg.name}.max_nonfinite_steps={steps} to resume from the last "
            "checkpoint and skip this step; if that does not help, start over with a lower "
            f"stages.{self._cfg.name}.lr",
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: object) -> None:
        """Logs the step's losses, gradient norm, learning rate and speed."""
        now = time.monotonic()
        tokens = self._cfg.global_batch_size * self._cfg.seq_length
        values = {**pl_module.share_losses(), "grad_norm": self._norm, "lr": self._lr}
        if not math.isfinite(self._norm):
            values["skipped"] = True
        values["tokens_per_second"] = round(tokens / (now - self._last), 1)
        self._last = now
        self._log.progress(self._cfg.stage, trainer.global_step, self._cfg.max_steps, **values)

    def on_validation_batch_end(self, trainer: object, pl_module: KDModel, *args: object) -> None:
        """Stores the number of tokens and the mean losses of the batch."""
        self._validation.append(pl_module.validation_batch())

    def on_validation_end(self, trainer: Any, pl_module: object) -> None:
        """Logs the validation loss, and the KL to the teacher if it was measured.

        Both are means over unmasked tokens: a batch's weight is its number of unmasked tokens.
        """
        tokens, losses = zip(*self._validation, strict=True)
        # If all tokens are masked, all losses are 0. ``fmean`` would then fail with weights of 0.
        weights = tokens if any(tokens) else None
        values = {
            f"val_{name}": fmean((batch[name] for batch in losses), weights)
            for name in ("loss", "kd")
            if name in losses[0]
        }
        self._validation.clear()
        self._log.progress(VALIDATE, trainer.global_step, self._cfg.max_steps, **values)
        self._last = time.monotonic()  # excludes the validation from the next step's speed


def finish_saving(trainer: Any) -> None:
    """Waits on all ranks until asynchronous checkpoints are written."""
    trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)


def gather_weights(model: KDModel) -> None:
    """Gathers the weights on all ranks: each data-parallel rank has updated only its own shard.

    Training itself gathers the shards only when the next step or a validation starts.
    """
    model.module.start_param_sync(force_sync=True)


class SaveStudents(Callback):
    """Saves the student after the configured steps, as ``folder/STEP.nemo``.

    This callback must run before the callback that saves a checkpoint of the same step. So a run
    that resumes from a checkpoint has all students up to the step of the checkpoint.
    """

    def __init__(self, steps: Sequence[int], folder: Path, save: Callable[[Path], None]) -> None:
        """Stores ``save``, which all ranks call with the path of the student."""
        self._steps, self._folder, self._save = steps, folder, save

    def on_train_start(self, trainer: object, pl_module: object) -> None:
        """Creates the folder, and deletes students that a killed run saved only partly."""
        self._folder.mkdir(exist_ok=True)
        if rank() == 0:
            for path in self._folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(path)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: object) -> None:
        """Saves the student if this is one of the configured steps."""
        step = trainer.global_step
        if step not in self._steps:
            return
        finish_saving(trainer)
        gather_weights(pl_module)
        student = self._folder / f"{step}.nemo"
        partial = student.with_name(student.name + PARTIAL)
        self._save(partial)
        if rank() == 0:
            # A run that resumed from an earlier checkpoint saves the student again.
            shutil.rmtree(student, ignore_errors=True)
            partial.rename(student)


class StopAtRecovered(Callback):
    """Stops once training has recovered ``stop_at_recovered`` of the KL added by pruning.

    ``stop_reason`` decides from the metrics file alone. So if a run stops early and is killed while
    it saves its result, the restarted run stops again without another step.
    """

    def __init__(self, cfg: DistillConfig, metrics: Path) -> None:
        self._cfg, self._metrics = cfg, metrics

    def on_train_start(self, trainer: Any, pl_module: object) -> None:
        """Stops a restarted run before any step if the fraction was reached before the restart."""
        self._stop_if_reached(trainer)

    def on_validation_end(self, trainer: Any, pl_module: object) -> None:
        """Stops all ranks in the same step, if the fraction is reached."""
        # A "sanity check" is the validation before the first step, when nothing can be recovered.
        if not trainer.sanity_checking:
            self._stop_if_reached(trainer)

    def _stop_if_reached(self, trainer: Any) -> None:
        # Only rank 0 has the metrics file. With ``all=False``, one rank suffices to stop all.
        reached = rank() == 0 and stop_reason(self._cfg, self._metrics, trainer.global_step) != ""
        trainer.should_stop |= trainer.strategy.reduce_boolean_decision(reached, all=False)


class StopAtDeadline(Callback):
    """Saves a checkpoint and raises ``StoppedByDeadlineError`` when the deadline is reached.

    NeMo's own timer ends training normally, so the stage would count as complete. A signal instead
    of a deadline would have to reach every rank inside its container.
    """

    def __init__(self, cfg: TrainingConfig) -> None:
        self._cfg = cfg

    def on_train_batch_end(self, trainer: Any, pl_module: object, *args: object) -> None:
        """Stops at the deadline. If a validation follows the step, stops after the validation."""
        validation_follows = trainer.global_step % self._cfg.val_check_interval == 0
        if not validation_follows:
            self._stop_at_deadline(trainer)

    def on_validation_end(self, trainer: Any, pl_module: object) -> None:
        """Stops at the deadline. A resumed run does not repeat this validation."""
        if not trainer.sanity_checking:
            self._stop_at_deadline(trainer)

    def _stop_at_deadline(self, trainer: Any) -> None:
        """Stops all ranks if the deadline has passed on the clock of any rank."""
        step = trainer.global_step
        if step >= self._cfg.max_steps:
            return  # training ends after this step anyway
        if not trainer.strategy.reduce_boolean_decision(time_is_up(), all=False):
            return
        # Saves a checkpoint now, as Lightning does at its regular interval.
        checkpoint = trainer.checkpoint_callback
        checkpoint._save_topk_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
        finish_saving(trainer)
        raise StoppedByDeadlineError(
            f"stopped at the deadline; step {step} of {self._cfg.max_steps} is saved.",
            "run the same command to resume",
        )


class CollectGarbage(Callback):
    """Runs Python's garbage collector on all ranks in the same step.

    Otherwise, each rank would collect in different steps, while all other ranks wait for this rank.
    Also returns free memory to the system before validations and checkpoints. They allocate blocks
    of other sizes than training steps, so they could not use the free blocks.
    """

    def __init__(self, cfg: TrainingConfig) -> None:
        self._cfg = cfg

    def on_train_start(self, trainer: object, pl_module: object) -> None:
        """Disables Python's automatic garbage collection."""
        gc.collect()
        gc.disable()

    def on_train_batch_end(self, trainer: Any, pl_module: object, *args: object) -> None:
        """Collects every ``COLLECT_EVERY`` steps; returns memory before each checkpoint."""
        if trainer.global_step % COLLECT_EVERY == 0:
            gc.collect()
        if trainer.global_step % self._cfg.checkpoint_interval == 0:
            return_free_memory()

    def on_validation_start(self, trainer: object, pl_module: object) -> None:
        """Returns free memory."""
        return_free_memory()

    def on_train_end(self, trainer: object, pl_module: object) -> None:
        """Returns free memory before the last checkpoint and the trained model are saved."""
        return_free_memory()

    def teardown(self, trainer: object, pl_module: object, stage: str) -> None:
        """Enables automatic collection again."""
        gc.enable()

    def on_exception(self, *args: object) -> None:
        """Enables automatic collection again."""
        gc.enable()


class Profile(Callback):
    """Writes a profiler trace, for https://ui.perfetto.dev, of the steps from first to last.

    Both steps are included, and counted from 1.
    """

    def __init__(self, steps: tuple[int, int], folder: Path) -> None:
        (self._first, self._last), self._folder = steps, folder
        self._profiler = torch.profiler.profile(record_shapes=True)
        self._running = False

    def on_train_batch_start(self, trainer: Any, *args: object) -> None:
        """Starts the profiler at the first step, or later if the run resumes within the range."""
        step = trainer.global_step + 1  # ``global_step`` counts the finished steps
        if not self._running and self._first <= step <= self._last:
            self._profiler.start()
            self._running = True

    def on_train_batch_end(self, trainer: Any, *args: object) -> None:
        """Writes the trace after the last step of the range."""
        if trainer.global_step == self._last:
            self._write_trace()

    def on_train_end(self, *args: object) -> None:
        """Writes the trace of a training that stops within the range."""
        self._write_trace()

    def _write_trace(self) -> None:
        if self._running:
            self._profiler.stop()
            self._running = False
            self._folder.mkdir(exist_ok=True)
            trace = self._folder / f"steps-{self._first}-{self._last}-rank-{rank()}.json.gz"
            self._profiler.export_chrome_trace(str(trace))
