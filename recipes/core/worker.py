"""A stage's own process: reads its request, runs it, and publishes what it made."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import OmegaConf

from recipes.core.deadline import StoppedByClockError
from recipes.core.errors import RecipeError
from recipes.core.files import storage_problem
from recipes.core.manifest import ARTIFACT, WORK, Manifest, Outcome, check_artifact, stamp_files
from recipes.core.processes import (
    children_die_with_this,
    die_with_parent,
    expect_no_gpu,
    leave_out_trackers,
    peak_memory_bytes,
)
from recipes.core.run_state import (
    InputRef,
    begin_work,
    complete_stage,
    read_request,
    record_failure,
)
from recipes.core.stage import Input, Inputs, StageConfig, rank, world_size
from recipes.core.versions import git_sha, installed_versions
from recipes.core.watchdog import watch_for_hangs

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_SECONDS = 0.05
ConfigT = TypeVar("ConfigT", bound=StageConfig)
Run = Callable[[Any, Inputs, Path], Outcome]


def stage_main(run: Run, config_class: type[ConfigT], kind: str) -> None:
    """Entry point of a stage's worker process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    request_file: Path = parser.parse_args().config
    stage_dir = request_file.parent
    die_with_parent()
    leave_out_trackers()
    expect_no_gpu()
    children_die_with_this()  # what writes a checkpoint beside training
    try:
        _run_stage(run, config_class, kind, request_file)
        _leave_together()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
        message = str(error) if isinstance(error, RecipeError) else traceback.format_exc()
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr, flush=True)
        summary = message if isinstance(error, RecipeError) else _summary(error, stage_dir)
        with contextlib.suppress(OSError):  # on a full disk the launcher finds it in the log
            # When one rank fails, the others lose their connection, which is not the reason.
            certain, stopped = (
                isinstance(error, RecipeError),
                isinstance(error, StoppedByClockError),
            )
            record_failure(stage_dir, summary, stopped=stopped, certain=certain)
            if stopped:
                _leave_together()  # the first rank to leave would end the others
        # A failing rank must not wait in a collective for ranks that will never come.
        os._exit(1)


def _summary(error: BaseException, stage_dir: Path) -> str:
    what = f"{type(error).__name__}: {error}"
    if (problem := storage_problem(error, stage_dir)) is not None:
        return f"{problem}\n  {what}"
    if type(error).__name__ == "CheckpointException":
        unwritten = RecipeError(
            "a checkpoint was not written: a process that writes it failed, see the log, or was "
            "killed, perhaps for memory.",
            "the same command resumes from the last whole checkpoint",
        )
        return str(unwritten)  # the error's own words are a traceback
    if world_size() > 1 and "by peer" in str(error):
        lost = RecipeError(
            f"rank {rank()} lost its connection to another, which was killed or whose node failed.",
            "its end is in the log, if it had time to say so; the same command resumes",
        )
        return f"{lost}\n  {what}"
    return what


def _run_stage(run: Run, config_class: type[ConfigT], kind: str, request_file: Path) -> None:
    started, stage_dir = time.monotonic(), request_file.parent
    request = read_request(stage_dir)
    merged = OmegaConf.merge(OmegaConf.structured(config_class), request.config)
    cfg: ConfigT = OmegaConf.to_object(merged)  # type: ignore[assignment]
    begun = Manifest(
        stage=cfg.stage,
        kind=kind,
        fingerprint=request.fingerprint,
        config=dict(request.config),
        code=request.code,
        libraries=dict(request.libraries),
        inputs={name: ref.fingerprint for name, ref in request.inputs.items()},
        started_at=datetime.now(UTC).isoformat(timespec="microseconds"),
    )
    out, store = stage_dir / WORK / ARTIFACT, _shared_store()
    with _rank_0_first(store, "work and inputs"):
        if rank() == 0:
            begun = replace(begun, versions=installed_versions(), git_sha=git_sha())
            begin_work(stage_dir, begun)
        inputs = {name: _checked(ref) for name, ref in request.inputs.items()}
    with watch_for_hangs(cfg.resources.max_silence, out.parent, rank()):
        outcome = run(cfg, inputs, out)
        peak_rss = _finish_ranks()
    with _rank_0_first(store, "manifest"):
        if rank() == 0:
            manifest = replace(
                begun,
                files=stamp_files(out),
                metrics=asdict(outcome.result) if outcome.result else {},
                architecture=outcome.architecture,
                parameters=outcome.parameters,
                tokenizer_sha256=outcome.tokenizer_sha256,
                seconds=round(time.monotonic() - started, 3),
                peak_rss_bytes=peak_rss,
                input_content={name: item.manifest.content() for name, item in inputs.items()},
            )
            complete_stage(stage_dir, manifest)


def _checked(ref: InputRef) -> Input:
    """An input that is as it was planned with. One rank reads every byte; the others must not."""
    manifest = check_artifact(ref.directory, ref.kind, rehash=rank() == 0)
    if manifest.fingerprint != ref.fingerprint:
        raise RecipeError(f"{ref.directory} changed after this stage was planned.", "run again")
    return Input(ref.directory, manifest)


def _shared_store() -> Store | None:
    """What torchrun's ranks share beside their process group; ``None`` for one rank."""
    if world_size() == 1:
        return None
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous("env://"))[0]
    return store


@contextlib.contextmanager
def _rank_0_first(store: Store | None, what: str) -> Iterator[None]:
    """The other ranks wait until rank 0 is through, however long it takes.

    Not in a collective, whose timeout would count: a terabyte is hashed in many minutes. Should
    rank 0 fail, torchrun ends them.
    """
    key = f"rank 0: {what}"
    while store is not None and rank() != 0 and not store.check([key]):
        time.sleep(POLL_SECONDS)
    yield
    if store is not None and rank() == 0:
        store.set(key, "done")


def _finish_ranks() -> int:
    """Waits for all ranks and returns their peak resident memory in bytes, summed."""
    own = peak_memory_bytes()
    torch = sys.modules.get("torch")
    if world_size() == 1 or torch is None or not torch.distributed.is_initialized():
        return own
    every: list[int] = [0] * world_size()
    torch.distributed.all_gather_object(every, own)
    return sum(every)


def _leave_together() -> None:
    """Ends all ranks at once, after rank 0 has written the manifest.

    A rank that leaves early with gloo's threads still running may abort, and torchrun would then
    kill rank 0 in the middle of its last work.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        if world_size() > 1:
            torch.distributed.barrier()
        # Groups that outlive their process group abort the interpreter at its exit with gloo.
        if megatron := sys.modules.get("megatron.core.parallel_state"):
            megatron.destroy_model_parallel()
        torch.distributed.destroy_process_group()
