"""Kills a run of a tiny model at random moments, resumes it, and compares the result.

    python -m tests.chaos --kills 100 --seed 1

A campaign first makes an uninterrupted run. Each round then repeats the stages of this run. A round
starts the launcher and kills one of the run's processes, a few times in each stage. Then it lets
the run finish. The weights, metrics, records, report and files must be those of the uninterrupted
run. No process may remain, and no file may contain a secret of the environment. The campaign ends
after the first round with a problem. In this case its folder is kept.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.chain import differences, is_of_a_library, overrides
from tests.chaos.kills import Kill, Killed, RunCommand
from tests.support.models import ODD, write_tiny_model
from tests.support.runs import HEALING_STAGES, manifest_of
from tests.support.text import write_text

SECRET = "planted-9f1c-secret"
"""Value of environment variables with tokens. No file may contain it."""
SETTINGS = (
    "stages.prepare_data.processes=2",
    "+cluster.env.OMP_NUM_THREADS='1'",
    "hardware.precision='32'",  # the default depends on the processor
    "hardware.measure=false",  # measured speeds differ between runs
)


def run_campaign(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Runs the campaign; returns the problems of the first round that has any.

    Args:
        folder: An empty folder, for all files of the campaign.
        arguments: The command line; see ``main``.
    """
    expected_dir, run_dir = folder / "expected", folder / "work" / "run"
    temporary = folder / "tmp"
    temporary.mkdir()
    run_dir.parent.mkdir()
    text = write_text(folder / "text.jsonl")
    model = write_tiny_model(folder / "model", text, **ODD)
    run_overrides = [*overrides(model, text, run_dir, engine="null"), *SETTINGS]
    stage_seconds: dict[str, float] = {}  # filled below; only ``command.kill`` reads it
    variables = {"TMPDIR": str(temporary), "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET}
    command = RunCommand(run_overrides, run_dir, stage_seconds, variables)
    exit_status, output = command.finish()
    if exit_status:
        return [f"the uninterrupted run failed: {output}"]
    run_dir.rename(expected_dir)
    stage_seconds |= {stage: manifest_of(expected_dir, stage).seconds for stage in HEALING_STAGES}

    rng, kills, problems = random.Random(arguments.seed), Counter[str](), list[str]()
    while kills.total() < arguments.kills and not problems:
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.rmtree(temporary)
        temporary.mkdir()
        shutil.copytree(expected_dir, run_dir, ignore=shutil.ignore_patterns(".lock"))
        # Keeps only the stages before the earliest one of ``--stages``. All others run again.
        for stage in HEALING_STAGES[min(map(HEALING_STAGES.index, arguments.stages)) :]:
            shutil.rmtree(run_dir / stage)
        # The stage of each kill in this round. All rounds together have at most ``--kills`` kills.
        kill_stages = [stage for stage in arguments.stages for _ in range(arguments.each)]
        for stage in kill_stages[: arguments.kills - kills.total()]:
            if (killed := command.kill(Kill.draw(stage, rng))) is None:
                break  # the run ended before the kill
            kills[f"{killed.stage} {killed.victim}"] += 1
            problems += [f"{killed.stage}: {p}" for p in problems_of(killed, folder)]
        exit_status, output = command.finish()
        problems += differences(expected_dir, run_dir) if exit_status == 0 else [output[-2000:]]
        remaining = [path.name for path in temporary.iterdir() if not is_of_a_library(path)]
        problems += [f"{name} is left in TMPDIR" for name in remaining]
        print(f"{kills.total()} of {arguments.kills} kills", flush=True)
    for stage_and_victim, count in sorted(kills.items()):
        print(f"{count:4}  {stage_and_victim}")
    return problems


def problems_of(killed: Killed, folder: Path) -> Iterator[str]:
    """Yields problems after a kill, in the launcher's output and exit status and in files.

    Args:
        killed: The kill.
        folder: Folder of the campaign.
    """
    if "Traceback" in killed.output:
        yield f"the launcher failed: {killed.output[-2000:]}"
    # 0: the run was complete. 1: the launcher reported a killed stage. SIGKILL: it was killed.
    if killed.exit_status not in (0, 1, -signal.SIGKILL):
        yield f"exit status {killed.exit_status}"
    grep = ["grep", "-rl", SECRET, folder / "work", folder / "tmp"]
    if files := subprocess.run(grep, capture_output=True, text=True, check=False).stdout:
        yield f"a secret is in {files}"


def main() -> int:
    """Runs a campaign, and deletes its folder if there are no problems."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.chaos")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--each", type=int, default=2, help="kills per stage and round")
    parser.add_argument("--stages", nargs="+", choices=HEALING_STAGES, default=HEALING_STAGES)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    problems = run_campaign(folder, arguments)
    for problem in problems:
        print(f"WRONG: {problem}")
    if problems:
        print(f"all files are in {folder}")
    else:
        shutil.rmtree(folder)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
