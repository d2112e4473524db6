"""Kills a tiny chain at random moments, repeats the command, and compares the results.

    python -m tests.chaos --kills 100 --seed 1

In a round, all stages of a tiny model run. They are killed a few times each, and then run to the
end. The round must leave the weights, metrics, records, report and files of an undisturbed run. No
process may remain, and no file may contain a secret of the environment. The first round with a
problem ends the campaign, whose folder is then kept.
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
from tests.support.runs import HEALING, manifest_of
from tests.support.text import write_text

SECRET = "planted-9f1c-secret"
SETTINGS = (
    "stages.prepare_data.processes=2",
    "+cluster.env.OMP_NUM_THREADS='1'",
    "hardware.precision='32'",  # the default depends on the processor
    "hardware.measure=false",  # measured speeds differ between runs
)


def run_campaign(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Runs rounds in an empty folder; returns the problems of the first round that has any."""
    base, run_dir, temporary = folder / "base", folder / "work" / "run", folder / "tmp"
    for new in (temporary, run_dir.parent):
        new.mkdir()
    text = write_text(folder / "text.jsonl")
    model = write_tiny_model(folder / "model", text, **ODD)
    words = [*overrides(model, text, run_dir, engine="null"), *SETTINGS]
    seconds: dict[str, float] = {}  # of each stage; set after the first run, for random moments
    variables = {"TMPDIR": str(temporary), "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET}
    command = RunCommand(words, run_dir, seconds, variables)
    exit_status, output = command.finish()
    if exit_status:
        return [f"the undisturbed run failed: {output}"]
    run_dir.rename(base)
    seconds |= {stage: manifest_of(base, stage).seconds for stage in HEALING}

    rng, kills, problems = random.Random(arguments.seed), Counter[str](), list[str]()
    while kills.total() < arguments.kills and not problems:
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.rmtree(temporary)
        temporary.mkdir()
        shutil.copytree(base, run_dir, ignore=shutil.ignore_patterns(".lock"))
        for stage in HEALING[HEALING.index(arguments.stages[0]) :]:
            shutil.rmtree(run_dir / stage)
        stages = [stage for stage in arguments.stages for _ in range(arguments.each)]
        for stage in stages[: arguments.kills - kills.total()]:
            if (killed := command.kill(Kill.draw(stage, rng))) is None:
                break  # the run ended before the kill
            kills[f"{killed.stage} {killed.victim}"] += 1
            problems += [f"{killed.stage}: {p}" for p in problems_of(killed, folder)]
        exit_status, output = command.finish()
        problems += differences(base, run_dir) if exit_status == 0 else [output[-2000:]]
        remaining = [path.name for path in temporary.iterdir() if not is_of_a_library(path)]
        problems += [f"{name} is left in TMPDIR" for name in remaining]
        print(f"{kills.total()} of {arguments.kills} kills", flush=True)
    for what, count in sorted(kills.items()):
        print(f"{count:4}  {what}")
    return problems


def problems_of(killed: Killed, folder: Path) -> Iterator[str]:
    """Yields the problems that are found after a kill."""
    if "Traceback" in killed.output:
        yield f"the launcher failed: {killed.output[-2000:]}"
    if killed.exit_status not in (0, 1, -signal.SIGKILL):
        yield f"exit status {killed.exit_status}"
    grep = ["grep", "-rl", SECRET, folder / "work", folder / "tmp"]
    if files := subprocess.run(grep, capture_output=True, text=True, check=False).stdout:
        yield f"a secret is in {files}"


def main() -> int:
    """Runs a campaign; its folder stays only if there are problems."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.chaos")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--each", type=int, default=2, help="kills of each stage in a round")
    parser.add_argument("--stages", nargs="*", choices=HEALING, default=HEALING)
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
