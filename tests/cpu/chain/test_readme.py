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
from recipes.core.manifest import read_manifest
from recipes.data.sources import source_names
from tests.support.folders import write_folder
from tests.support.in_process import run_in_process

FENCED = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PATTERNS = ("README.md", "benchmarks/*.md", "docs/*.md")
BLOCKS = [
    block
    for pattern in PATTERNS
    for file in sorted(REPO_ROOT.glob(pattern))
    for block in FENCED.findall(file.read_text())
]
CONTRIBUTING = FENCED.findall((REPO_ROOT / "CONTRIBUTING.md").read_text())
"""Blocks of CONTRIBUTING.md. Its Python blocks are files, which test_contributing.py tests."""
COMMANDS = list(
    dict.fromkeys(
        command
        for language, block in [*BLOCKS, *CONTRIBUTING]
        if language == "bash"
        for line in block.splitlines()
        if (command := re.split(r"(?:^|\s)#", line)[0].strip())
    )
)
ADDED_RECIPE = "recipe=llama_third_prune"
"""Recipe of an example in CONTRIBUTING.md, which test_contributing.py tests."""
NEEDS_RUN = {
    "only=[distill]": "its result is needed",
    "accept=[distill]": "has no complete result",
}
"""Arguments that need complete stages, and their error message in a new run directory."""
pytestmark = pytest.mark.timeout(1800)  # the demo builds engines of the real model

MY_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
SHORT_DEMO = (
    "data.seq_length=128 stages.distill.max_steps=4 stages.distill.warmup_steps=1 "
    "stages.distill.val_check_interval=4 stages.distill.limit_val_batches=1 "
    "stages.score.num_calibration_samples=8 stages.score.num_loss_samples=1 "
    "stages.evaluate.num_sequences=8 stages.evaluate.new_tokens=8 stages.evaluate_tasks.limit=2 "
    "stages.build_engine.num_sequences=2 stages.build_teacher_engine.num_sequences=2 "
    "stages.measure_speed.batch_sizes=[1] stages.measure_speed.prompt_tokens=[32] "
    "stages.measure_speed.repetitions=1 stages.measure_speed.new_tokens=8"
)


def commands(start: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(start)]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``make demo`` on the real included model and text, with a short distillation."""
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    assert commands("make demo")
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
    assert "13 stages ran" in done.stdout
    return run_dir


def test_demo_recovers_something_on_the_real_model(demo_run: Path) -> None:
    evaluation = read_manifest(demo_run / "evaluate")
    teacher = read_manifest(demo_run / "import_hf")
    assert evaluation is not None
    assert teacher is not None
    assert teacher.parameters == 134_515_008
    assert teacher.metrics["licence"] == "apache-2.0"
    assert teacher.metrics["parity_max_logit_difference"] < 1e-3
    metrics = evaluation.metrics
    text = OmegaConf.load(REPO_ROOT / "conf/data/eight_kinds.yaml")
    assert set(metrics["sources"]) == {*source_names([*text.heldout_sources, *text.sources])}
    assert metrics["sources"]["wikipedia"]["teacher"]["perplexity"] < 30
    assert metrics["teacher"]["perplexity"] < 60
    assert metrics["pruned"]["loss"] > metrics["teacher"]["loss"] + 0.3
    assert metrics["recovered"] > 0.1


@pytest.mark.parametrize(
    "command", [c for c in commands("python launch/run.py") if ADDED_RECIPE not in c]
)
def test_launcher_commands_plan(command: str, tmp_path: Path) -> None:
    """Commands are only planned: other tests run all stages, and a distillation takes minutes."""
    arguments = shlex.split(command)[2:]  # without ``python launch/run.py``
    has_recipe = any(argument.startswith("recipe=") for argument in arguments)
    extra = ["dry_run=true"] if has_recipe and "--help" not in arguments else []
    for model in ("my_model", "runs/llama_depth_prune/export_hf/artifact"):
        if model in command:
            (tmp_path / model).parent.mkdir(parents=True, exist_ok=True)
            write_folder(tmp_path / model, MY_MODEL)
    (tmp_path / "my.jsonl").write_text('{"text": "one document of a few words"}\n' * 200_000)
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So it is."}]
    (tmp_path / "my_chats.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 20_000)
    result = run_in_process(*extra, *arguments, cwd=tmp_path)
    if error := next((NEEDS_RUN[a] for a in arguments if a in NEEDS_RUN), None):
        assert error in result.output
    else:  # without arguments the launcher lists the recipes and exits with status 1
        assert result.code == (0 if arguments else 1), result.output


def test_conversion_commands_run(demo_run: Path, tmp_path: Path) -> None:
    """Runs each command in a new process, which has no patches that an earlier command applied."""
    # "check" comes last. The other commands depend on each other and keep their order.
    conversions = sorted(commands("python -m nemo_convert"), key=lambda command: "check" in command)
    assert len(conversions) == 4
    for command in conversions:
        arguments = shlex.split(command.replace("runs/llama_depth_prune", str(demo_run)))[1:]
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


def test_code_runs(demo_run: Path, tmp_path: Path) -> None:
    [code] = [block for language, block in BLOCKS if language == "python"]
    done = subprocess.run(
        [sys.executable, "-c", code.replace("runs/llama_depth_prune", str(demo_run))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) > 3


def test_the_command_of_the_report_serves_the_engine(demo_run: Path) -> None:
    report = (demo_run / "report" / "artifact" / "report.html").read_text()
    [arguments] = re.findall(r"<code>python (-c .*?)</code>", report)
    command = [sys.executable, *shlex.split(html.unescape(arguments))]
    done = subprocess.run(
        command, cwd=demo_run, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) > 3


def test_every_command_is_tested() -> None:
    known = (
        "make demo",
        "make test",
        "make lint",
        "source .venv/bin/activate",
        "python launch/run.py",
        "python -m nemo_convert",
        "python -m benchmarks.",  # test_benchmarks.py
        "python -m tests.chaos",  # test_chaos
        "make docs",  # test_docs.py makes the site
        "make lock",  # test_requirements.py, also for the next two
        "make sbom",
        ".venv/bin/pip-licenses",
        "./install.sh && source .venv/bin/activate",  # test_install.py
        ".venv/bin/python -m tests.chaos",
        ".venv/bin/python -m pytest",  # test_contributing.py
    )
    assert [command for command in COMMANDS if not command.startswith(known)] == []
