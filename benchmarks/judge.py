"""Judges checkpoints against a teacher, on validation and on held-out text.

Started as ``python -m benchmarks.judge`` in a process of its own. The teacher reads the text once
for all; after every model its judgement is written beside its stage. Models read in what stages
read in here: bfloat16 where the processor has its products.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from benchmarks.contenders import manifest_of
from benchmarks.students import CHOOSING, PRECISION, REPORTING, conditions, judgement_file
from nemo_convert import nemo
from recipes.core.files import write_json
from recipes.core.precision import dtype_of
from recipes.core.stage import Input
from recipes.data.token_windows import TextWindows, read_windows
from recipes.evaluation.predictions import TEACHER, FinalStates, Predictor, compare, read
from recipes.evaluation.text_quality import Scores, load_transformers

MICRO_BATCH = 4


def readings_of(stage: Path, texts: Mapping[str, TextWindows]) -> dict[str, FinalStates]:
    """What a stage's model makes of every text."""
    checkpoint = nemo.find_checkpoint(stage / "artifact")
    model = Predictor.of(load_transformers(checkpoint, dtype_of(PRECISION)))
    return {part: read(model, text, MICRO_BATCH) for part, text in texts.items()}


def main() -> None:
    """Reads the text with every model, and writes what it comes to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, required=True, help="run with teacher and text")
    parser.add_argument("--windows", type=int, required=True, help="of held-out text")
    parser.add_argument("stages", type=Path, nargs="+")
    args = parser.parse_args()
    data = Input(args.base / "prepare_data", manifest_of(args.base / "prepare_data"))
    length = int(data.manifest.config["seq_length"])
    parts = {CHOOSING: args.windows // 2, REPORTING: args.windows}
    texts = {part: read_windows(data, part, length, count) for part, count in parts.items()}
    teacher = readings_of(args.base / "import_hf", texts)
    for stage in args.stages:
        found = {}
        is_teacher = stage == args.base / "import_hf"
        for part, reading in (teacher if is_teacher else readings_of(stage, texts)).items():
            text = texts[part]
            figures = compare({TEACHER: teacher[part], "student": reading}, text)["student"]
            scores, kinds = Scores.of(figures, text), text.sources or {"all": slice(0, len(text))}
            found[part] = {
                "sources": {kind: asdict(scores.quality(span)) for kind, span in kinds.items()}
            }
        of = conditions(stage, args.base, args.windows)
        write_json(judgement_file(stage), {"of": of, "found": found})


if __name__ == "__main__":
    main()
