"""Runs as the process of a stage: reads the request, runs the stage, and publishes the result.

The command is ``python -m recipes.core.worker MODULE STAGE_DIR/config.yaml``, or the same with
torchrun for several ranks. Each rank is a worker.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from recipes.core.errors import RecipeError
from recipes.core.files import storage_problem
from recipes.core.manifest import (
    ARTIFACT,
    WORK,
    Manifest,
    Outcome,
    check_artifact,
    read_manifest,
    stamp_files,
    write_manifest,
)
from recipes.core.processes import (
    die_with_parent,
    make_forks_die_with_parent,
    peak_memory_bytes,
    prepare_imports,
)
from recipes.core.run_state import (
    BEGUN,
    TRACKER,
    InputRef,
    Request,
    begin_work,
    complete_stage,
    content_of,
    read_request,
    record_failure,
)
from recipes.core.snapshot import require_snapshot
from recipes.core.stage import (
    NEEDS_GPU,
    Input,
    Inputs,
    StageConfig,
    StoppedByDeadlineError,
    rank,
    shared_store,
    world_size,
)
from recipes.core.versions import installed_versions, version_differences
from recipes.core.watchdog import watch_for_hangs

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_SECONDS = 0.05
"""Seconds between two checks of whether rank 0 has finished."""
TRACKER_MODULE = "recipes.core.trackers"
"""Module of the tracker's process. Not imported here, to keep it out of code fingerprints."""
STOP_SECONDS = 240
"""Maximum wait for other ranks at the deadline. By default a job's time limit is at least 300
seconds after the deadline."""
TRACKER_SECONDS = 60
"""Maximum wait for the tracker's process after the stage's end, for example without a network."""
Run = Callable[[Any, Inputs, Path], Outcome]
"""Function of a stage. Takes settings, inputs and the folder to which it writes its artifact."""


def main() -> None:
    """Runs the stage of a module. If it fails, records the reason and exits with status 1."""
    module, request_file = sys.argv[1:]
    stage_dir = Path(request_file).parent
    die_with_parent()
    prepare_imports()
    make_forks_die_with_parent()  # forks are, for example, the processes that write checkpoints
    tracker = _start_tracker(stage_dir)
    try:
        stage = importlib.import_module(module).STAGE
        run_stage(stage.run, stage.config, stage.kind, stage_dir)
        _leave_together()
        _finish_tracker(tracker, "FINISHED")
    except (KeyboardInterrupt, SystemExit):
        raise  # records no reason, so the stage counts as interrupted
    except BaseException as error:  # torch's CheckpointException is not an Exception
        is_explained = isinstance(error, RecipeError)
        message = str(error) if is_explained else traceback.format_exc()
        with contextlib.suppress(OSError):  # the log's disk may be full
            print(message, file=sys.stderr, flush=True)
        summary = message if is_explained else _summary(error, stage_dir)
        stopped = isinstance(error, StoppedByDeadlineError)
        with contextlib.suppress(OSError):  # if the disk is full, the launcher reports this
            # When a rank fails, the other ranks fail with connection errors. These are unexplained,
            # so they do not replace the error of the rank that failed first.
            record_failure(stage_dir, summary, stopped=stopped, overwrite=is_explained)
            if stopped:
                _wait_for_other_ranks()
                _leave_together()  # torchrun kills the other ranks when one rank exits with 1
        _finish_tracker(tracker, "KILLED" if stopped else "FAILED")
        # Skips the atexit handlers, which would wait in a collective for the other ranks.
        os._exit(1)


def _start_tracker(stage_dir: Path) -> subprocess.Popen[bytes] | None:
    """Starts the tracker's process on rank 0. Returns ``None`` if there is no such process."""
    if rank() != 0 or not (stage_dir.parent / TRACKER).exists():
        return None
    arguments = [str(stage_dir), str(int(time.time())), str(TRACKER_SECONDS)]
    command = [sys.executable, "-m", TRACKER_MODULE, *arguments]
    with contextlib.suppress(OSError):
        return subprocess.Popen(command, stdin=subprocess.PIPE)
    return None


def _finish_tracker(tracker: subprocess.Popen[bytes] | None, status: str) -> None:
    """Sends the stage's status to the tracker's process, and waits up to ``TRACKER_SECONDS``."""
    if tracker is not None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            tracker.communicate(status.encode(), TRACKER_SECONDS)
        tracker.kill()


def _summary(error: BaseException, stage_dir: Path) -> str:
    """Returns a message about an unexpected error. Includes a cause and a fix if they are known."""
    what = f"{type(error).__name__}: {error}"
    if (problem := storage_problem(error, stage_dir)) is not None:
        return f"{problem}\n  {what}"
    if type(error).__name__ == "CheckpointException":
        checkpoint_error = RecipeError(
            "a checkpoint was not written: a process that writes it failed (see the log), or was "
            "killed, perhaps because memory ran out.",
            "run the same command again: it resumes from the last complete checkpoint",
        )
        return str(checkpoint_error)  # without ``what``, because the message is a traceback
    if world_size() > 1 and "by peer" in str(error):  # "Connection closed by peer" and the like
        connection_error = RecipeError(
            f"rank {rank()} lost its connection to a rank that was killed or whose node failed.",
            "read the log of that rank; the same command resumes",
        )
        return f"{connection_error}\n  {what}"
    return what


def _require_gpu() -> None:
    """Raises ``RecipeError`` if a rank on this node would run a stage for GPUs on the CPU."""
    if (profile := os.environ.get(NEEDS_GPU)) is None:
        return
    import torch

    if not torch.cuda.is_available():
        raise RecipeError(
            f"{platform.node()}: hardware={profile}, but PyTorch finds no GPU",
            "check nvidia-smi on this machine, the driver that the image needs, and cluster.gpus; "
            "or set hardware=cpu",
        )
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpus < ranks:
        raise RecipeError(
            f"{platform.node()}: {ranks} ranks, but PyTorch finds {gpus} GPU(s)",
            "lower the stage's resources.devices, or check CUDA_VISIBLE_DEVICES and cluster.gpus",
        )


def _settings_of(request: Request, config_class: type[StageConfig]) -> StageConfig:
    """Returns a request's settings. Refuses unknown settings, which pydantic would ignore."""
    if unknown := request.config.keys() - {setting.name for setting in fields(config_class)}:
        names = ", ".join(sorted(unknown))
        raise RecipeError(f"{request.name} has unknown settings: {names}.", "start a new run_dir")
    cfg: StageConfig = TypeAdapter(config_class).validate_python(request.config)
    cfg.name = request.name
    return cfg


def run_stage(run: Run, config_class: type[StageConfig], kind: str, stage_dir: Path) -> None:
    """Runs a stage, whose directory has its request, on this rank. Rank 0 publishes the result."""
    _require_gpu()
    started = time.monotonic()
    request = read_request(stage_dir)
    cfg = _settings_of(request, config_class)
    manifest = Manifest(
        stage=cfg.stage,
        kind=kind,
        fingerprint=request.fingerprint,
        config=dict(request.config),
        code=request.code,
        libraries=dict(request.libraries),
        kept=dict(request.kept),
        git_sha=request.git_sha,
        snapshot=request.snapshot,
        devices=request.devices,
        inputs={name: ref.fingerprint for name, ref in request.inputs.items()},
        started_at=datetime.now(UTC).isoformat(timespec="microseconds"),
    )
    out, store = stage_dir / WORK / ARTIFACT, shared_store()
    with _rank_0_first(store, "work and inputs"):
        if rank() == 0:
            require_snapshot(request.snapshot)
            content = content_of(request.inputs)
            manifest = replace(manifest, versions=installed_versions(), input_content=content)
            manifest = begin_work(stage_dir, manifest)
        already_hashed = manifest.input_content  # on rank 0: by earlier starts of this work
        inputs = {
            name: _checked_input(ref, rehash=name not in already_hashed)
            for name, ref in request.inputs.items()
        }
        content = {name: item.manifest.content_hash() for name, item in inputs.items()}
        manifest = replace(manifest, input_content=content)
        if rank() == 0:
            _warn_of_versions(inputs)
            write_manifest(out.parent, manifest, BEGUN)  # now with all inputs' hashes
    with watch_for_hangs(cfg.resources.hang_timeout, out.parent, rank()):
        outcome = run(cfg, inputs, out)
        peak_rss = _total_peak_memory()
    with _rank_0_first(store, "manifest"):
        if rank() == 0:
            complete = replace(
                manifest,
                files=stamp_files(out),
                metrics=asdict(outcome.result) if outcome.result else {},
                architecture=outcome.architecture,
                parameters=outcome.parameters,
                tokenizer_sha256=outcome.tokenizer_sha256,
                seconds=round(manifest.seconds + time.monotonic() - started, 3),
                peak_rss_bytes=peak_rss,
            )
            complete_stage(stage_dir, complete)


def _checked_input(ref: InputRef, *, rehash: bool) -> Input:
    """Checks an input's fingerprint and returns the input. Rank 0 also checks the input's files."""
    if rank() == 0:
        manifest: Manifest | None = check_artifact(ref.directory, ref.kind, rehash=rehash)
    else:
        manifest = read_manifest(ref.directory)
    if manifest is None or manifest.fingerprint != ref.fingerprint:
        raise RecipeError(f"{ref.directory} changed after this stage was planned.", "run again")
    return Input(ref.directory, manifest)


def _warn_of_versions(inputs: Inputs) -> None:
    """Prints a warning for each input that was computed with other versions of libraries.

    A plan does not notice other versions in an image: fingerprints then have the locked versions.
    """
    for name, item in inputs.items():
        if differences := version_differences(item.manifest.versions):
            what = f"input {name} was computed with other versions ({', '.join(differences)})"
            print(f"warning: {what}", flush=True)


@contextlib.contextmanager
def _rank_0_first(store: Store | None, step: str) -> Iterator[None]:
    """Runs the block on rank 0, and then on the other ranks. ``step`` is the block's unique name.

    Uses a ``shared_store`` instead of a collective: rank 0 may hash a terabyte, which takes longer
    than the timeout of collectives. If rank 0 fails, torchrun ends the other ranks.
    """
    key = f"rank 0: {step}"
    while store is not None and rank() != 0 and not store.check([key]):
        time.sleep(POLL_SECONDS)
    yield
    if store is not None and rank() == 0:
        store.set(key, "done")


def _total_peak_memory() -> int:
    """Returns the bytes of all ranks' peak memory; without process groups, those of this rank."""
    peak = peak_memory_bytes()
    torch = sys.modules.get("torch")
    if world_size() == 1 or torch is None or not torch.distributed.is_initialized():
        return peak
    peaks: list[int] = [0] * world_size()
    torch.distributed.all_gather_object(peaks, peak)
    return sum(peaks)


def _wait_for_other_ranks() -> None:
    """Waits, at most ``STOP_SECONDS``, until all ranks of a stage without process groups stop.

    Such a stage is a search. Its ranks run trainings that stop at the same deadline, but take
    different times to save their checkpoints. When one rank exits, torchrun kills the others.
    """
    torch = sys.modules.get("torch")
    has_groups = torch is not None and torch.distributed.is_initialized()
    if has_groups or (store := shared_store()) is None:
        return
    end = time.monotonic() + STOP_SECONDS
    store.add("stopped", 1)
    while store.add("stopped", 0) < world_size() and time.monotonic() < end:  # adds 0 to read
        time.sleep(1)


def _leave_together() -> None:
    """Waits until all ranks call this function, then destroys the process groups.

    A rank that exits while its gloo threads still run may abort. torchrun then kills all other
    ranks, even if rank 0 is still publishing the result.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        if world_size() > 1:
            torch.distributed.barrier()
        # With gloo, the interpreter aborts at exit if Megatron still refers to process groups that
        # PyTorch has destroyed.
        if megatron := sys.modules.get("megatron.core.parallel_state"):
            megatron.destroy_model_parallel()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
