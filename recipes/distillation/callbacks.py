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
"""Suffix of the path of a student while it is being saved."""
COLLECT_EVERY = 100
"""Steps between garbage collections."""


class StepLogger(Callback):
    """Logs every step, and skips updates with a non-finite gradient."""

    def __init__(self, cfg: TrainingConfig, log: MetricsLog) -> None:
        self._cfg, self._log = cfg, log
        self._last = time.monotonic()  # end of the last step or validation
        self._norm = self._lr = 0.0
        self._validation: list[tuple[float, dict[str, float]]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the timer, and wraps the optimizer's gradient norm and update."""
        self._last = time.monotonic()
        optimizer = trainer.optimizers[0].mcore_optimizer
        compute_norm, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads

        def get_grad_norm() -> float:
            self._norm = float(compute_norm())
            # The update sets the next step's learning rate, so this step's is read before.
            self._lr = trainer.optimizers[0].param_groups[0]["lr"]
            return self._norm

        optimizer.get_grad_norm = get_grad_norm
        optimizer.step_with_ready_grads = lambda: self._update_if_finite(update, trainer, pl_module)

    def _update_if_finite(self, update: Callable[[], bool], trainer: Any, model: KDModel) -> bool:
        """Updates the weights if the gradient norm, which is equal on all ranks, is finite.

        Raises:
            RecipeError: More than ``max_nonfinite_steps`` steps had a non-finite gradient.
        """
        if math.isfinite(self._norm):
            return update()
        model.skipped_steps += 1
        if model.skipped_steps > self._cfg.max_nonfinite_steps:
            finish_saving(trainer)  # the error below ends the process
            losses = ", ".join(f"{n} {value:.4g}" for n, value in model.share_losses().items())
            steps = model.skipped_steps  # also those before a resumption with a lower limit
            raise RecipeError(
                f"step {trainer.global_step + 1}: the gradient is not finite ({losses})"
                + (f", and {steps - 1} such step(s) were skipped before." if steps > 1 else ".")
                + " The weights were not updated; the last checkpoint is usable.",
                f"set stages.{self._cfg.name}.max_nonfinite_steps={steps} to resume from it "
                "and skip this step; if that does not help, train anew with a lower "
                f"stages.{self._cfg.name}.lr",
            )
        return False  # tells Megatron that the update was skipped

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
        """Stores the batch's number of tokens and losses."""
        self._validation.append(pl_module.validation_batch())

    def on_validation_end(self, trainer: Any, pl_module: object) -> None:
        """Logs the validation loss, and the KL to the teacher if it was measured.

        They are means over the tokens of all batches, whose numbers of tokens may differ.
        """
        tokens, losses = zip(*self._validation, strict=True)
        weights = tokens if any(tokens) else None  # without tokens, all losses are 0
        values = {
            f"val_{name}": fmean((batch[name] for batch in losses), weights)
            for name in ("loss", "kd")
            if name in losses[0]
        }
        self._validation.clear()
        self._log.progress(VALIDATE, trainer.global_step, self._cfg.max_steps, **values)
        self._last = time.monotonic()  # the next step's speed excludes the validation


def finish_saving(trainer: Any) -> None:
    """Waits on all ranks until asynchronous checkpoints are written."""
    trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)


def gather_weights(model: Any) -> None:
    """Gathers the weights on all ranks. Each data-parallel rank has updated its shard of them.

    Training itself gathers the shards only when the next step or a validation starts.

    Args:
        model: NeMo's model, whose ``module`` Megatron has wrapped for training.
    """
    model.module.start_param_sync(force_sync=True)


class SaveStudents(Callback):
    """Saves the student after the configured steps.

    This callback must run before the one that saves a checkpoint of the same step. A run that
    resumes from a checkpoint then has all students up to that step.
    """

    def __init__(self, steps: Sequence[int], folder: Path, save: Callable[[Path], None]) -> None:
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
            # A run that resumed from an earlier checkpoint saves this student once more.
            shutil.rmtree(student, ignore_errors=True)
            partial.rename(student)


class StopAtRecovered(Callback):
    """Stops once training has recovered ``stop_at_recovered`` of the KL added by pruning.

    The decision depends only on the metrics file. A run may stop early and be killed while it saves
    its result. When it restarts, it then stops again without another step.
    """

    def __init__(self, cfg: DistillConfig, metrics: Path) -> None:
        self._cfg, self._metrics = cfg, metrics

    def on_train_start(self, trainer: Any, pl_module: object) -> None:
        """Stops before the first step of a restarted run, if the fraction was already reached."""
        self._stop_if_reached(trainer)

    def on_validation_end(self, trainer: Any, pl_module: object) -> None:
        """Stops all ranks in the same step, if the fraction is reached."""
        if not trainer.sanity_checking:
            self._stop_if_reached(trainer)

    def _stop_if_reached(self, trainer: Any) -> None:
        # Only rank 0 has the metrics file.
        reached = rank() == 0 and stop_reason(self._cfg, self._metrics, trainer.global_step) != ""
        trainer.should_stop |= trainer.strategy.reduce_boolean_decision(reached, all=False)


class StopAtDeadline(Callback):
    """Saves a checkpoint and raises ``StoppedByDeadlineError`` when the deadline is reached.

    NeMo's own timer ends training normally. The stage would then count as complete, and later
    stages would use a half-trained model. Signals are not used either, because they would have to
    reach every rank inside its container.
    """

    def __init__(self, cfg: TrainingConfig) -> None:
        self._cfg = cfg

    def on_train_batch_end(self, trainer: Any, pl_module: object, *args: object) -> None:
        """Stops at the deadline. If a validation follows the step, stops after the validation."""
        if trainer.global_step % self._cfg.val_check_interval:
            self._stop_at_deadline(trainer)

    def on_validation_end(self, trainer: Any, pl_module: object) -> None:
        """Stops at the deadline; a later start would not repeat this validation."""
        if not trainer.sanity_checking:
            self._stop_at_deadline(trainer)

    def _stop_at_deadline(self, trainer: Any) -> None:
        """Stops all ranks if the deadline has passed on the clock of any rank."""
        step = trainer.global_step
        if step >= self._cfg.max_steps:
            return  # training ends after this step anyway
        if not trainer.strategy.reduce_boolean_decision(time_is_up(), all=False):
            return
        checkpoint = trainer.checkpoint_callback
        checkpoint._save_topk_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
        finish_saving(trainer)
        raise StoppedByDeadlineError(
            f"stopped at the deadline; step {step} of {self._cfg.max_steps} is saved.",
            "run the same command to resume",
        )


class CollectGarbage(Callback):
    """Collects garbage on all ranks in the same step: a rank that collects alone delays all others.

    Also returns free memory to the system before validations and checkpoints. These allocate blocks
    of other sizes than training steps do, so they could not reuse the free blocks.
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
        """Returns free memory before the last checkpoint and the result."""
        return_free_memory()

    def teardown(self, trainer: object, pl_module: object, stage: str) -> None:
        """Enables automatic collection again."""
        gc.enable()

    def on_exception(self, *args: object) -> None:
        """Enables automatic collection again."""
        gc.enable()


class Profile(Callback):
    """Writes a profiler trace of a range of steps, for https://ui.perfetto.dev."""

    def __init__(self, steps: tuple[int, int], folder: Path) -> None:
        (self._first, self._last), self._folder = steps, folder
        self._profiler = torch.profiler.profile(record_shapes=True)
        self._running = False

    def on_train_batch_start(self, trainer: Any, *args: object) -> None:
        """Starts the profiler at the range's first step that is trained in this process."""
        if not self._running and self._first <= trainer.global_step + 1 <= self._last:
            self._profiler.start()
            self._running = True

    def on_train_batch_end(self, trainer: Any, *args: object) -> None:
        """Writes the trace after the last step of the range."""
        if self._running and trainer.global_step == self._last:
            self._profiler.stop()
            self._running = False
            self._folder.mkdir(exist_ok=True)
            trace = self._folder / f"steps-{self._first}-{self._last}-rank-{rank()}.json.gz"
            self._profiler.export_chrome_trace(str(trace))
