"""Runs the commands of the documents, with fewer steps and in temporary directories."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipes.core.files import REPO_ROOT
from recipes.data.sources import source_names
from tests.support.folders import write_folder
from tests.support.in_process import run_in_process
from tests.support.runs import manifest_of
from tests.unit.conftest import LLAMA_CONFIG

FENCED = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
"""Matches a block of code in Markdown; its groups are the language and the code."""
PATTERNS = ("README.md", "benchmarks/*.md", "docs/*.md")
BLOCKS = [
    block
    for pattern in PATTERNS
    for file in sorted(REPO_ROOT.glob(pattern))
    for block in FENCED.findall(file.read_text())
]
CONTRIBUTING_BLOCKS = FENCED.findall((REPO_ROOT / "CONTRIBUTING.md").read_text())
"""Only its commands are tested here. test_contributing.py tests its Python blocks."""
COMMANDS = list(
    dict.fromkeys(
        command
        for language, block in [*BLOCKS, *CONTRIBUTING_BLOCKS]
        if language == "bash"
        for line in block.splitlines()
        if (command := re.split(r"(?:^|\s)#", line)[0].strip())
    )
)
"""Each line of every bash block, without its comment. Repeated and empty lines are left out."""
ADDED_RECIPE = "recipe=llama_third_prune"
"""Argument that names a recipe from an example in CONTRIBUTING.md; see test_contributing.py."""
NEEDS_RUN = {
    "only=[distill]": "its result is needed",
    "accept=[distill]": "has no complete result",
}
"""Arguments that need complete stages, with part of their error message in a new run directory."""
pytestmark = pytest.mark.timeout(1800)  # the demo builds engines of the real model

MODEL_CONFIG = {**LLAMA_CONFIG, "num_hidden_layers": 32}
"""``config.json`` of the models that commands name as a folder, such as ``my_model``."""
MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So it is."}]
TEXTS = {  # many copies, because the plan refuses text that cannot fill a batch
    "my.jsonl": '{"text": "one document of a few words"}\n' * 200_000,
    "my_chats.jsonl": f"{json.dumps({'messages': MESSAGES})}\n" * 20_000,
}
"""Text files that commands name."""
SHORT_DEMO = (
    "data.seq_length=128 data.max_tokens=200000 stages.score.seq_length=32 "
    "stages.distill.max_steps=4 stages.distill.warmup_steps=1 "
    "stages.distill.val_check_interval=4 stages.distill.limit_val_batches=1 "
    "stages.score.num_calibration_samples=8 stages.score.num_loss_samples=1 "
    "stages.evaluate.num_sequences=8 stages.evaluate.num_generations=1 "
    "stages.evaluate.new_tokens=8 stages.evaluate_tasks.limit=2 "
    "stages.build_engine.num_sequences=2 stages.build_teacher_engine.num_sequences=2 "
    "stages.measure_speed.batch_sizes=[1] stages.measure_speed.prompt_tokens=[32] "
    "stages.measure_speed.repetitions=1 stages.measure_speed.new_tokens=8"
)
"""Overrides that shorten every stage of ``make demo``."""


def commands_with_prefix(start: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(start)]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``make demo`` on the real included model and text, with a short distillation."""
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    assert commands_with_prefix("make demo")
    done = subprocess.run(
        ["make", "demo", f"VENV={sys.prefix}", f"ARGS=run_dir={run_dir} {SHORT_DEMO}"],
        cwd=REPO_ROOT,
        env={**os.environ, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "13 stages ran" in done.stdout  # all stages of the default recipe
    return run_dir


def test_demo_recovers_a_tenth_of_the_pruning_loss_of_the_real_model(demo_run: Path) -> None:
    teacher = manifest_of(demo_run, "import_hf")
    assert teacher.parameters == 134_515_008  # SmolLM2-135M
    assert teacher.metrics["licence"] == "apache-2.0"
    assert teacher.metrics["parity_max_logit_difference"] < 1e-3
    metrics = manifest_of(demo_run, "evaluate").metrics
    data = OmegaConf.load(REPO_ROOT / "conf/data/eight_kinds.yaml")
    assert set(metrics["sources"]) == {*source_names([*data.heldout_sources, *data.sources])}
    # A correctly converted teacher has perplexities below these limits.
    assert metrics["sources"]["wikipedia"]["teacher"]["perplexity"] < 30
    assert metrics["teacher"]["perplexity"] < 60
    assert metrics["pruned"]["loss"] > metrics["teacher"]["loss"] + 0.3
    assert metrics["recovered"] > 0.1


@pytest.mark.parametrize(
    "command",
    [
        command
        for command in commands_with_prefix("python launch/run.py")
        if ADDED_RECIPE not in command
    ],
)
def test_launcher_commands_can_be_planned(command: str, tmp_path: Path) -> None:
    """Only plans the commands. Other tests run all stages, and a distillation takes minutes."""
    arguments = shlex.split(command)[2:]  # without ``python launch/run.py``
    has_recipe = any(argument.startswith("recipe=") for argument in arguments)
    extra = ["dry_run=true"] if has_recipe and "--help" not in arguments else []
    for model in ("my_model", "runs/llama_depth_prune/export_hf/artifact"):
        if model in command:
            (tmp_path / model).parent.mkdir(parents=True, exist_ok=True)
            write_folder(tmp_path / model, MODEL_CONFIG)
    for name, text in TEXTS.items():
        if name in command:
            (tmp_path / name).write_text(text)
    result = run_in_process(*extra, *arguments, cwd=tmp_path)
    expected_errors = [NEEDS_RUN[argument] for argument in arguments if argument in NEEDS_RUN]
    if expected_errors:
        assert expected_errors[0] in result.output
    else:  # without arguments the launcher lists the recipes and exits with status 1
        assert result.code == (0 if arguments else 1), result.output


def test_conversion_commands_run(odd_llama: Path, tmp_path: Path) -> None:
    """Runs each command in a new interpreter, as a user does."""
    conversions = commands_with_prefix("python -m nemo_convert")
    assert len(conversions) == 4
    for command in conversions:
        folder = "runs/llama_depth_prune/export_hf/artifact"
        arguments = shlex.split(command.replace(folder, str(odd_llama)))[1:]
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"


def test_python_examples_generate_text_with_the_engine(
    demo_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One example is in the documents, the other in the report."""
    [example] = [block for language, block in BLOCKS if language == "python"]
    report = (demo_run / "report" / "artifact" / "report.html").read_text()
    [argument] = re.findall(r"<code>python -c (.*?)</code>", report)
    [report_example] = shlex.split(html.unescape(argument))
    monkeypatch.chdir(demo_run)
    for code in (example.replace("runs/llama_depth_prune", str(demo_run)), report_example):
        exec(code, {})
        assert len(capsys.readouterr().out.split()) > 3  # words that the engine generated


def test_every_command_starts_with_a_tested_prefix() -> None:
    tested_prefixes = (
        "make demo",
        "make test",
        "make lint",
        "source .venv/bin/activate",
        "python launch/run.py",
        "python -m nemo_convert",
        "python -m benchmarks.",  # test_benchmarks.py
        "python -m tests.chaos",  # test_chaos.py
        "make docs",  # test_docs.py makes the site
        "make lock",  # test_requirements.py
        "make sbom",  # test_requirements.py
        ".venv/bin/pip-licenses",  # test_requirements.py
        "./install.sh && source .venv/bin/activate",  # test_install.py
        ".venv/bin/python -m tests.chaos",
        ".venv/bin/python -m pytest",  # test_contributing.py
    )
    assert [command for command in COMMANDS if not command.startswith(tested_prefixes)] == []
