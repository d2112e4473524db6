"""Kills a tiny chain at random moments, runs the same command again, and compares what it makes.

    python -m tests.chaos --kills 100 --seed 1
    python -m tests.chaos --faults

A round is a chain that is killed a few times in every stage and then left to its end. Everything
that it leaves must be what an undisturbed run leaves: weights, figures, records, report, files;
nothing may still run, and nothing that was planted as a secret may be in any file. With
``--faults`` there are other faults instead, each on a chain of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.chaos.chain import differences, is_of_a_library, overrides
from tests.chaos.faults import FAULTS
from tests.chaos.kills import Disturbed, Hit, Kill, draw
from tests.support.models import ODD, write_tiny_model
from tests.support.runs import HEALING, manifest_of
from tests.support.text import write_text

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
SECRET = "planted-9f1c-secret"
RESUMES = "interrupted; the same command resumes"


@dataclass(frozen=True)
class Place:
    """Where a campaign works: a folder to itself."""

    folder: Path

    def command(self, words: Sequence[str]) -> list[str]:
        """The chain's command line, whose own words these replace; the run is always there."""
        model, text = self.folder / "model", self.folder / "text.jsonl"
        chain = overrides(model, text, self.run, engine="null")
        chain += [
            "stages.prepare_data.processes=2",
            "+cluster.env.OMP_NUM_THREADS='1'",
            "hardware.precision='32'",  # whatever the processor is best at, and how fast it is
            "hardware.measure=false",
        ]
        given = {word.partition("=")[0] for word in words}
        return [*(word for word in chain if word.partition("=")[0] not in given), *words]

    @property
    def run(self) -> Path:
        return self.folder / "work" / "run"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    def environment(self) -> dict[str, str]:
        return {"TMPDIR": str(self.temporary), "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET}


def prepare(place: Place, words: Sequence[str]) -> dict[str, float]:
    """Makes model and text, and runs the chain undisturbed; returns the seconds of its stages."""
    place.temporary.mkdir(parents=True, exist_ok=True)
    if not place.base.exists():
        write_text(place.folder / "text.jsonl")
        write_tiny_model(place.folder / "model", place.folder / "text.jsonl", **ODD)
        shutil.rmtree(place.run.parent, ignore_errors=True)
        place.run.parent.mkdir()
        code, output = disturbed(place, words, {}).finish()
        if code:
            sys.exit(output)
        place.run.rename(place.base)
    return {stage: manifest_of(place.base, stage).seconds for stage in HEALING}


def disturbed(
    place: Place, words: Sequence[str], seconds: dict[str, float], **environment: str
) -> Disturbed:
    variables = place.environment() | environment
    return Disturbed(place.command(words), place.run, place.run.parent, seconds, variables)


def one_round(
    place: Place, command: Disturbed, stages: Sequence[str], kills: Iterator[Kill]
) -> Iterator[tuple[Kill, Hit]]:
    """Starts over with the first of the stages, and kills as told until the chain is done."""
    shutil.rmtree(place.run, ignore_errors=True)
    shutil.copytree(place.base, place.run, ignore=shutil.ignore_patterns(".lock"))
    for stage in HEALING[HEALING.index(stages[0]) :]:
        shutil.rmtree(place.run / stage)
    for kill in kills:
        hit = command.kill(kill)
        if hit is None:
            return
        yield kill, hit


def wrong_with(place: Place, kill: Kill, hit: Hit) -> Iterator[str]:
    """What a kill did that it should not."""
    if "Traceback" in hit.output:
        yield f"the launcher broke: {hit.output[-2000:]}"
    asked = hit.victim == "launcher" and kill.number != signal.SIGKILL
    if asked and (hit.code != 130 or RESUMES not in hit.output):
        yield f"signal {kill.number}: exit status {hit.code}, {hit.output[-500:]!r}"
    if hit.victim not in ("launcher", "none") and hit.code not in (0, 1, -signal.SIGKILL):
        yield f"exit status {hit.code}"
    if found := secrets_in(place):
        yield f"a secret is in {found}"


def secrets_in(place: Place) -> list[str]:
    done = subprocess.run(
        ["grep", "-rl", SECRET, place.run, place.temporary],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split()


def ending_wrong(place: Place, command: Disturbed) -> Iterator[str]:
    """What is wrong once the command has been left to its end."""
    code, output = command.finish()
    if code:
        yield f"did not end well: {output[-2000:]}"
        return
    yield from differences(place.base, place.run)
    if left := sorted(path.name for path in place.temporary.iterdir() if not is_of_a_library(path)):
        yield f"left in TMPDIR: {left[:5]} of {len(left)}"


def every_fault(place: Place, arguments: argparse.Namespace, seconds: dict[str, float]) -> bool:
    def command(*words: str, **environment: str) -> Disturbed:
        return disturbed(place, (*arguments.words, *words), seconds, **environment)

    problems = 0
    for name in arguments.faults or FAULTS:
        began = time.monotonic()
        shutil.rmtree(place.run, ignore_errors=True)
        found = report(list(FAULTS[name](place.base, place.run, command)))
        print(f"{name}: {found} problems, {time.monotonic() - began:.0f} s", flush=True)
        problems += found
    return problems > 0


def campaign(arguments: argparse.Namespace) -> bool:
    """Whether it found a problem; only then does a folder that was not asked for stay."""
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos"))
    found = True
    try:
        found = disturb(Place(folder), arguments)
    finally:
        if found or arguments.folder:
            print(f"all of it is in {folder}")
        else:
            shutil.rmtree(folder)
    return found


def disturb(place: Place, arguments: argparse.Namespace) -> bool:
    seconds = prepare(place, arguments.words)
    if arguments.faults is not None:
        return every_fault(place, arguments, seconds)
    rng = random.Random(arguments.seed)
    stages = arguments.stages or HEALING
    command = disturbed(place, arguments.words, seconds)
    log = (place.folder / "campaign.jsonl").open("a", buffering=1)
    done, number, problems = Counter[str](), SIGNALS[arguments.signal], 0
    while sum(done.values()) < arguments.kills:
        shutil.rmtree(place.temporary)
        place.temporary.mkdir()
        left = arguments.kills - sum(done.values())
        planned = [s for s in stages for _ in range(arguments.each)][:left]
        began = time.monotonic()
        for kill, hit in one_round(place, command, stages, (draw(s, number, rng) for s in planned)):
            done[f"{hit.stage} {hit.victim}"] += 1
            wrong = list(wrong_with(place, kill, hit))
            record = {
                "kill": asdict(kill),
                "hit": hit.stage,
                "victim": hit.victim,
                "code": hit.code,
            }
            said = re.findall(r"(?:error: |interrupted).*", hit.output)[-1:]
            print(json.dumps({**record, "said": said, "wrong": wrong}), file=log)
            problems += report(wrong)
        wrong = list(ending_wrong(place, command))
        print(json.dumps({"round": time.monotonic() - began, "wrong": wrong}), file=log)
        problems += report(wrong)
        if wrong:  # kept to be looked at, beside those of earlier campaigns
            kept = tempfile.mkdtemp(prefix="wrong-", dir=place.folder)
            shutil.copytree(place.run, kept, symlinks=True, dirs_exist_ok=True)
        print(f"{sum(done.values())} of {arguments.kills}, {problems} problems", flush=True)
    for what, count in sorted(done.items()):
        print(f"{count:4}  {what}")
    print(f"{sum(done.values())} kills, {problems} problems")
    return problems > 0


def report(wrong: list[str]) -> int:
    for one in wrong:
        print(f"WRONG: {one}", flush=True)
    return len(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.chaos")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--each", type=int, default=2, help="kills of each stage in a round")
    parser.add_argument("--stages", nargs="*", choices=HEALING, help="by default all")
    parser.add_argument("--signal", choices=SIGNALS, default="kill")
    parser.add_argument("--faults", nargs="*", choices=FAULTS, help="not kills, but these, or all")
    parser.add_argument("--folder", type=Path, help="to work in; an undisturbed run there is used")
    parser.add_argument("words", nargs="*", help="more of the launcher's command line")
    return campaign(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
