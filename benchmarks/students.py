"""Students that are trained alike and judged on the same text, which they have in common here.

Validation text is what a setting is chosen on; held-out text reports, and chooses nothing.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import TypeAdapter
from rich.console import Console

from benchmarks.contenders import LAUNCHER, RECIPE, execute, launch, manifest_of
from nemo_convert import nemo
from recipes.core.files import read_json, write_json
from recipes.core.statistics import mean
from recipes.distillation.results import TrainingResult
from recipes.evaluation.results import TextQuality
from recipes.planning.hardware import cpu_profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHOOSING, REPORTING = "validation", "heldout"
JUDGED = "judged.json"
PRECISION: str = cpu_profile("precision")
"""What models are judged in: what stages read in on this processor."""


@dataclass(frozen=True)
class Quality:
    """A model on text of several kinds; every kind counts the same."""

    sources: dict[str, TextQuality]

    @property
    def loss(self) -> float:
        """Mean over the kinds, in nats."""
        return mean([one.loss for one in self.sources.values()])

    @property
    def perplexity(self) -> float:
        """Geometric mean over the kinds."""
        return math.exp(self.loss)

    @property
    def kl(self) -> float:
        """Mean divergence from the teacher over the kinds, in nats."""
        return mean([one.kl_to_teacher for one in self.sources.values()])

    @property
    def agreement(self) -> float:
        """Mean share of positions where the likeliest token is the teacher's."""
        return mean([one.top1_agreement for one in self.sources.values()])


@dataclass(frozen=True)
class Judgement:
    """A model on validation and on held-out text."""

    validation: Quality
    heldout: Quality


@dataclass(frozen=True, kw_only=True)
class Student:
    """What a student came to."""

    seed: int
    tokens: int
    """That it was trained on."""
    pruned: Judgement
    distilled: Judgement


StudentT = TypeVar("StudentT", bound=Student)


def schedule(steps: int, seed: int = 1234) -> dict[str, object]:
    """Settings of a training that is validated and saved only at its end."""
    return {
        "distill.max_steps": steps,
        "distill.warmup_steps": steps // 10,
        "distill.checkpoint_interval": steps,
        "distill.val_check_interval": steps,
        "distill.seed": seed,
    }


def prune(base: Path, scores: Path, out: Path, settings: Mapping[str, object]) -> Path:
    """Prunes the model of ``base`` in a run directory, unless that is complete.

    What the settings do not name stays whole, whatever the recipe says, and layers go by their
    change of the loss.
    """
    launch(
        base,
        out,
        ("prune",),
        {
            "prune.inputs.checkpoint": base / "import_hf",
            "prune.inputs.importance": scores,
            "prune.target_num_layers": "null",
            "prune.layer_importance": "loss",
            **{f"prune.{name}": value for name, value in settings.items()},
        },
    )
    return out / "prune"


def heal(base: Path, pruned: Path, out: Path) -> Path:
    """Heals what the model of ``base`` was cut to, unless that is complete."""
    launch(
        base,
        out,
        ("heal",),
        {
            "heal.inputs.checkpoint": pruned,
            "heal.inputs.teacher": base / "import_hf",
            "heal.inputs.data": base / "prepare_data",
        },
        "heal=least_squares",
    )
    return out / "heal"


def distill(
    base: Path, pruned: Path, out: Path, settings: Mapping[str, object], *overrides: str
) -> Path:
    """Distils the model of ``base`` into a pruned one, unless that is complete."""
    launch(
        base,
        out,
        ("distill",),
        {
            "distill.inputs.teacher": base / "import_hf",
            "distill.inputs.student": pruned,
            "distill.inputs.data": base / "prepare_data",
            **settings,
        },
        *overrides,
    )
    return out / "distill"


def import_student(train: Callable[[], PreTrainedModel], like: Path, out: Path) -> Path:
    """A student that no stage trained, as a stage; trained and imported once.

    Args:
        train: Trains and gives it.
        like: NeMo checkpoint with the tokenizer that it is to have.
        out: What is made for it.
    """
    if not (folder := out / "hf").is_dir():
        student = train()
        shutil.copytree(nemo.side_files(like), made := out / "hf.tmp", dirs_exist_ok=True)
        student.save_pretrained(made)
        made.rename(folder)
    settings = (f"model.hf_path='{folder}'", "stages.only=[import_hf]")
    execute([*LAUNCHER, f"recipe={RECIPE}", f"run_dir={out / 'run'}", *settings])
    return out / "run" / "import_hf"


def judge(base: Path, stages: Iterable[Path], windows: int) -> dict[Path, Judgement]:
    """Measures the checkpoints of stages, those that were measured before excepted.

    Args:
        base: Run with the teacher and the text.
        stages: Complete ones, each with a checkpoint.
        windows: Of held-out text, as many of each kind; a half of that of validation text.
    """
    every = [base / "import_hf", *stages]
    new = [stage for stage in every if read_judgement(stage, base, windows) is None]
    if new:
        options = ["--base", str(base), "--windows", str(windows)]
        execute([sys.executable, "-m", "benchmarks.judge", *options, *map(str, new)])
    found = {stage: read_judgement(stage, base, windows) for stage in every}
    return {stage: one for stage, one in found.items() if one is not None}


def conditions(stage: Path, base: Path, windows: int) -> dict[str, object]:
    """What a judgement is of: it is void when one of these changes."""
    return {
        "model": manifest_of(stage).content(),
        "teacher": manifest_of(base / "import_hf").content(),
        "text": manifest_of(base / "prepare_data").content(),
        "windows": windows,
        "precision": PRECISION,
    }


def judgement_file(stage: Path) -> Path:
    """Where a stage's judgement is: beside it, since only the stage itself writes into it."""
    return stage.parent / f"{stage.name}-{JUDGED}"


def read_judgement(stage: Path, base: Path, windows: int) -> Judgement | None:
    """What an earlier call found, unless it was of something else."""
    file = judgement_file(stage)
    if not file.is_file():
        return None
    written = read_json(file)
    if written["of"] != conditions(stage, base, windows):
        return None
    return TypeAdapter(Judgement).validate_python(written["found"])


class Trained(Protocol):
    """A run in which a pruned student was trained."""

    @property
    def seed(self) -> int:
        """Of the training."""

    @property
    def pruned(self) -> Path:
        """The stage that it was cut in."""

    @property
    def out(self) -> Path:
        """Its run directory."""


def students_of(base: Path, runs: Sequence[Trained], windows: int) -> Iterator[dict[str, Any]]:
    """Fields of a ``Student`` for every run; all are judged at once, after one reading teacher."""
    stages = [stage for run in runs for stage in (run.pruned, run.out / "distill")]
    found = judge(base, dict.fromkeys(stages), windows)
    for run in runs:
        stage = run.out / "distill"
        yield {
            "seed": run.seed,
            "tokens": manifest_of(stage).result(TrainingResult).tokens,
            "pruned": found[run.pruned],
            "distilled": found[stage],
        }


def summary(seeds: Sequence[Student]) -> list[str]:
    """Cells of a table: as cut, then over the seeds what chooses and what is reported."""
    return [
        f"{seeds[0].pruned.heldout.perplexity:.2f}",
        varied([s.distilled.validation.kl for s in seeds], ".3f"),
        varied([s.distilled.heldout.perplexity for s in seeds]),
        varied([s.distilled.heldout.kl for s in seeds], ".3f"),
    ]


SUMMARY = ("pruned", "validation KL", "held-out", "KL")
"""Heads of these cells."""


def collect(students: Iterable[StudentT], file: Path, console: Console) -> list[StudentT]:
    """Writes all, and says where."""
    found = list(students)
    write_json(file, [asdict(student) for student in found])
    console.print(f"figures: {file}")
    return found


def grouped(found: Iterable[StudentT], way: Callable[[StudentT], Hashable]) -> list[list[StudentT]]:
    """The seeds of every way, the way that validation text chooses first."""
    groups: dict[Hashable, list[StudentT]] = {}
    for one in found:
        groups.setdefault(way(one), []).append(one)
    return sorted(groups.values(), key=lambda g: mean([one.distilled.validation.kl for one in g]))


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 of one."""
    return stdev(values) if len(values) > 1 else 0.0


def varied(values: Sequence[float], style: str = ".2f") -> str:
    """A mean and its spread over seeds; nothing where nothing could be said."""
    if not values:
        return ""
    text = format(mean(values), style)
    return f"{text} ± {format(spread(values), style.lstrip('+'))}" if len(values) > 1 else text
