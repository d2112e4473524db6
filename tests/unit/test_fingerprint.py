from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from recipes import distill, fingerprint, prune, report
from recipes.fingerprint import (
    SMALL_FILE,
    code_fingerprint,
    digest,
    external_stamp,
    result_settings,
    stage_fingerprint,
)
from recipes.stage import Resources

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODULES = {
    "stage_a": "from recipes import shared\n\ndef run():\n    return shared.VALUE\n",
    "shared": "import os\nfrom nemo_convert.core import f\n\nVALUE = f(1)  # a comment\n",
    "lazy": "def run():\n    from recipes.shared import VALUE\n    return VALUE\n",
    "unrelated": "VALUE = 1\n",
}


def forget() -> None:
    """Clears what was read from the source tree before."""
    fingerprint.code_fingerprint.cache_clear()
    fingerprint._parsed.cache_clear()


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small repository in the place of ours."""
    for package in ("recipes", "nemo_convert"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    for name, source in MODULES.items():
        (tmp_path / "recipes" / f"{name}.py").write_text(source)
    (tmp_path / "nemo_convert" / "core.py").write_text("def f(x):\n    return x\n")
    pyproject = '[project]\ndependencies = ["torch==2"]\n[tool.x]\ny = 1\n'
    (tmp_path / "pyproject.toml").write_text(pyproject)
    monkeypatch.setattr(fingerprint, "REPO_ROOT", tmp_path)
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def real_repo() -> Iterator[None]:
    forget()
    yield
    forget()


def of(module: str) -> str:
    forget()
    return code_fingerprint(f"recipes.{module}")


def replace_in(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def reached(module: str) -> set[str]:
    """First-party files that a real module can reach, by the launcher's own rule."""
    seen: set[str] = set()
    queue = [module]
    while queue:
        path = fingerprint._source(queue.pop())
        if path is None or (name := path.relative_to(fingerprint.REPO_ROOT).as_posix()) in seen:
            continue
        seen.add(name)
        _, imported = fingerprint._parsed(path)
        queue += [i for i in imported if i.split(".")[0] in fingerprint.FIRST_PARTY]
    return seen


def test_digest_does_not_depend_on_key_order() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"a": 1.5}, {"b": 1}, {"a": [1]}, {}])
def test_digest_depends_on_keys_and_values(other: dict[str, object]) -> None:
    assert digest({"a": 1}) != digest(other)


def test_digest_depends_on_the_order_of_lists() -> None:
    assert digest([1, 2]) != digest([2, 1])


def test_resources_are_no_result_settings() -> None:
    plain = distill.Config(stage="distill")
    large = distill.Config(stage="distill", resources=Resources(nodes=4, devices=8, env={"A": "b"}))
    assert "resources" not in result_settings(plain)
    assert result_settings(plain) == result_settings(large)


@pytest.mark.parametrize("field", ["lr", "max_steps", "seed", "precision", "temperature", "inputs"])
def test_result_fields_are_result_settings(field: str) -> None:
    plain = result_settings(distill.Config(stage="distill"))
    value = {"a": "b"} if field == "inputs" else "3"
    other = result_settings(distill.Config(stage="distill", **{field: value}))
    assert {key for key in plain if plain[key] != other[key]} == {field}


def test_stage_fingerprint_depends_on_each_part() -> None:
    settings = result_settings(prune.Config(stage="prune"))
    base = stage_fingerprint(settings, "code", {"x": "1"}, {"y": "2"})
    others = {
        stage_fingerprint({**settings, "seq_length": 1}, "code", {"x": "1"}, {"y": "2"}),
        stage_fingerprint(settings, "other", {"x": "1"}, {"y": "2"}),
        stage_fingerprint(settings, "code", {"x": "2"}, {"y": "2"}),
        stage_fingerprint(settings, "code", {"x": "1"}, {"y": "3"}),
        base,
    }
    assert len(others) == 5
    assert base == stage_fingerprint(
        dict(reversed(settings.items())), "code", {"x": "1"}, {"y": "2"}
    )


@pytest.mark.parametrize("module", ["stage_a", "lazy"])
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("recipes/{module}.py", "def run", "LIMIT = 1\ndef run"),
        ("recipes/shared.py", "f(1)", "f(2)"),
        ("nemo_convert/core.py", "return x", "return -x"),
        ("pyproject.toml", "torch==2", "torch==3"),
    ],
)
def test_code_that_is_reached_counts(
    repo: Path, module: str, file: str, old: str, new: str
) -> None:
    before = of(module)
    replace_in(repo / file.format(module=module), old, new)
    assert of(module) != before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("recipes/unrelated.py", "1", "2"),
        ("recipes/lazy.py", "return VALUE", "return 0"),
        ("recipes/shared.py", "# a comment", "# another one\n\n"),
        ("recipes/shared.py", "f(1)", "f(\n    1\n)"),
        ("pyproject.toml", "y = 1", "y = 2"),
    ],
)
def test_comments_format_and_unrelated_code_do_not_count(
    repo: Path, file: str, old: str, new: str
) -> None:
    before = of("stage_a")
    replace_in(repo / file, old, new)
    assert of("stage_a") == before


def test_modules_may_import_each_other(repo: Path) -> None:
    (repo / "nemo_convert" / "core.py").write_text("import recipes.stage_a\nf = abs\n")
    before = of("stage_a")
    replace_in(repo / "recipes" / "stage_a.py", "VALUE", "VALUE + 1")
    assert of("stage_a") != before


@pytest.mark.parametrize("statement", ["from . import shared", "from .shared import VALUE"])
def test_relative_imports_are_refused(repo: Path, statement: str) -> None:
    """They would hide what a result depends on."""
    (repo / "recipes" / "relative.py").write_text(statement + "\n")
    with pytest.raises(ValueError, match="relative imports"):
        of("relative")


@pytest.mark.usefixtures("real_repo")
def test_training_code_does_not_reach_the_report() -> None:
    for stage in ("prune", "distill", "evaluate", "import_hf", "prepare_data"):
        names = reached(f"recipes.{stage}")
        assert not [n for n in names if "report" in n or "model_card" in n or "launch" in n], stage


@pytest.mark.usefixtures("real_repo")
@pytest.mark.parametrize(
    ("stage", "needed"),
    [
        ("score", {"recipes/scoring.py", "recipes/importance.py"}),
        (
            "prune",
            {
                "recipes/slicing.py",
                "recipes/minitron.py",
                "nemo_convert/nemo.py",
                "recipes/architecture.py",
            },
        ),
        ("distill", {"recipes/nemo_trainer.py", "recipes/kd_loss.py", "recipes/kd_model.py"}),
        ("evaluate", {"recipes/quality.py", "nemo_convert/nemo.py"}),
        ("import_hf", {"nemo_convert/convert.py", "nemo_convert/families.py"}),
        ("export_hf", {"recipes/model_card.py", "nemo_convert/convert.py"}),
        ("prepare_data", {"recipes/corpus.py", "recipes/indexed_dataset.py"}),
    ],
)
def test_stages_reach_the_code_that_makes_their_result(stage: str, needed: set[str]) -> None:
    assert needed <= reached(f"recipes.{stage}")


def test_the_reports_templates_count(root: Path) -> None:
    [folder] = report.external(report.Config()).values()
    assert folder == root / "recipes" / "report_templates"
    assert {"report.html.j2", "style.css"} <= external_stamp(folder).keys()


@pytest.mark.usefixtures("real_repo")
def test_stages_have_different_code() -> None:
    stages = ("prune", "distill", "evaluate", "import_hf", "export_hf", "report", "prepare_data")
    assert len({of(stage) for stage in stages}) == len(stages)


def test_external_stamp_of_a_small_file_is_its_content(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = external_stamp(file)
    os.utime(file, ns=(0, 0))
    assert external_stamp(file) == before
    file.write_text("two")
    assert external_stamp(file) != before


def test_external_stamp_of_a_large_file_is_size_and_time(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    with file.open("wb") as handle:
        handle.truncate(SMALL_FILE + 1)
    os.utime(file, ns=(0, 5))
    assert external_stamp(file) == {"weights": [SMALL_FILE + 1, 5]}


def test_external_stamp_of_a_folder_sees_every_file_and_not_where_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "vocab.txt").write_text("a")
    before = external_stamp(folder)
    assert list(before) == ["config.json", "sub/vocab.txt"]
    assert external_stamp(folder.rename(tmp_path / "moved")) == before
    (tmp_path / "moved" / "sub" / "vocab.txt").write_text("b")
    assert external_stamp(tmp_path / "moved") != before
