"""Tests that the examples of CONTRIBUTING.md work, and that files that documents name exist."""

from __future__ import annotations

import csv
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from recipes.core.files import REPO_ROOT
from recipes.core.manifest import ARTIFACT, read_manifest
from tests.support.contributing import TEXT, blocks, copy_with, run

DOCUMENTS = sorted(
    file.relative_to(REPO_ROOT).as_posix()
    for pattern in ("*.md", "benchmarks/*.md", "docs/*.md")
    for file in REPO_ROOT.glob(pattern)
)
EXAMPLES_WITH_FILES = ("A recipe", "A stage")  # headings of examples that add files
LAUNCHER = "launch/run.py"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the files of all examples."""
    return copy_with(tmp_path_factory.mktemp("copy"), *EXAMPLES_WITH_FILES)


def test_examples_pass_the_linter(copy: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        ruff = run(copy, "-m", "ruff", *command, "--no-cache", "recipes", "nemo_convert")
        assert ruff.returncode == 0, ruff.stdout


def test_a_recipe_is_listed_and_planned(copy: Path, tmp_path: Path) -> None:
    [block] = blocks("A recipe")
    name = Path(block.file).stem
    assert name in run(copy, LAUNCHER).stdout  # without arguments, it lists the recipes
    arguments = (f"recipe={name}", f"run_dir={tmp_path}/run", "skip_rules=[disk]")
    done = run(copy, LAUNCHER, *arguments, "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert f"recipe: {name}" in (tmp_path / "run" / "run.yaml").read_text()


@pytest.fixture(scope="module")
def run_dir(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that the command of the section "A stage" made with its new stage."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    [command] = [block.text for block in blocks("A stage") if block.language == "bash"]
    python, *arguments = shlex.split(command)
    assert python == "python"
    done = run(copy, *arguments, f"run_dir={directory}")
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_a_stage_runs_and_is_recorded(run_dir: Path) -> None:
    """The example's stage ``plan_csv`` writes the summary of ``plan`` to a CSV file."""
    table, plan = read_manifest(run_dir / "plan_csv"), read_manifest(run_dir / "plan")
    assert table is not None
    assert plan is not None
    assert table.kind == "plan_table"
    assert table.inputs == {"plan": plan.fingerprint}
    with (run_dir / "plan_csv" / ARTIFACT / "plan.csv").open() as file:
        rows = dict(csv.reader(file))
    assert rows == {name: str(value) for name, value in plan.metrics["summary"].items()}


def test_every_file_of_a_run_is_described(run_dir: Path) -> None:
    """CONTRIBUTING.md names the files of a run directory, and those of a stage as ``<stage>/``."""
    names = {path.name for path in run_dir.iterdir() if path.is_file()}
    names |= {f"<stage>/{path.name}" for path in (run_dir / "plan").iterdir()}
    assert len(names) > 6
    assert [name for name in names if not re.search(rf"`{re.escape(name)}/?`", TEXT)] == []


def test_settings_of_an_added_stage_are_checked(copy: Path, tmp_path: Path) -> None:
    [command] = [block.text for block in blocks("A stage") if block.language == "bash"]
    arguments = [*shlex.split(command)[1:], f"run_dir={tmp_path}/run"]
    done = run(copy, *arguments, "stages.plan_csv.resources.devices=2")
    assert "[one-rank]" in done.stderr
    done = run(copy, *arguments, "stages.plan_csv.delimeter=x")  # misspelled on purpose
    assert "delimiter" in done.stderr


def test_import_layers_in_the_text_are_those_that_import_linter_checks() -> None:
    """CONTRIBUTING.md and the docstring of ``recipes`` list a layer per line, the highest first."""
    with (REPO_ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    layers = [line.replace("recipes.", "").replace(" | ", ", ") for line in contracts[0]["layers"]]
    [diagram] = [block.text for block in blocks("Packages and layers") if block.language == "text"]
    # In the diagram, two spaces separate a layer from its description.
    assert [line.split("  ")[0] for line in diagram.splitlines()] == layers
    docstring = (REPO_ROOT / "recipes" / "__init__.py").read_text()
    assert [line.strip() for line in re.findall(r"^    (.+)$", docstring, re.M)] == layers


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_and_modules_in_documents_exist(document: str) -> None:
    text = (REPO_ROOT / document).read_text()
    paths = re.findall(r"\b(?:recipes|nemo_convert|launch|conf|benchmarks|tests)/[\w/.]*\w", text)
    modules = re.findall(r"-m ((?:recipes|nemo_convert|benchmarks)[.\w]*\w)", text)
    names = {*paths, *(module.replace(".", "/") for module in modules)}
    added_files = {block.file for heading in EXAMPLES_WITH_FILES for block in blocks(heading)}
    missing = [
        name
        for name in names - added_files
        if "NAME" not in name  # a placeholder
        and not any((REPO_ROOT / f"{name}{suffix}").exists() for suffix in ("", ".py"))
    ]
    assert names or document != "CONTRIBUTING.md"  # other documents may name no file
    assert missing == []


@pytest.mark.parametrize("target", re.findall(r"^(make [\w-]+)", TEXT, re.M))
def test_make_targets_exist(target: str) -> None:
    assert f"\n{target.split()[1]}:" in (REPO_ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    ("folder", "pattern"), re.findall(r"-m pytest .*?(tests/\w+)(?: -k (\w+))?", TEXT)
)
def test_pytest_commands_select_test_files(folder: str, pattern: str) -> None:
    """Searches file names for the pattern of ``-k``, empty without it.

    Collecting tests with pytest would be slow, because it imports all libraries.
    """
    assert any(pattern in file.stem for file in (REPO_ROOT / folder).rglob("test_*.py"))
