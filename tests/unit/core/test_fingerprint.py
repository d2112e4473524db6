from __future__ import annotations

import ast
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from recipes.core import fingerprint, versions
from recipes.core.files import REPO_ROOT
from recipes.core.fingerprint import (
    MAX_HASHED_BYTES,
    MODULES_FILE,
    code_fingerprint,
    digest,
    external_stamp,
    imported_code,
    result_settings,
    stage_fingerprint,
)
from recipes.core.snapshot import source_files
from recipes.core.stage import Resources
from recipes.core.versions import result_versions
from recipes.data.settings import PrepareDataConfig
from recipes.distillation.settings import DistillConfig
from recipes.pruning.settings import PruneConfig
from recipes.report.settings import ReportConfig
from recipes.stages import report

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

MODULES = {
    "recipes/stage.py": "from recipes import shared\n\n"
    'def run():\n    """Runs."""\n    return shared.VALUE\n',
    "recipes/lazy.py": "def run():\n    from recipes.shared import VALUE\n    return VALUE\n",
    "recipes/plain.py": "import recipes.shared\n",
    "recipes/shared.py": "import os\nfrom typing import TYPE_CHECKING\n"
    "from nemo_convert.core import f\nif TYPE_CHECKING:\n    from recipes.types import T\n"
    "VALUE = f(1)  # a comment\n",
    "recipes/types.py": "T = int\n",
    "recipes/unrelated.py": "VALUE = 1\n",
    "nemo_convert/core.py": "from recipes import stage\ndef f(x):\n    return x\n",
    "pyproject.toml": '[project]\ndependencies = ["torch==2"]\n[tool.x]\ny = 1\n',
}
"""Files of a small repository, by path.

The modules stage, lazy and plain import shared in three ways. shared imports nemo_convert.core,
which imports stage: a cycle. shared imports types only for type checkers.
"""


def clear_caches() -> None:
    """Clears the caches of source code in this process."""
    fingerprint.code_fingerprint.cache_clear()
    fingerprint._all_modules.cache_clear()
    source_files.cache_clear()


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small repository that replaces this repository."""
    for name, source in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(fingerprint, "REPO_ROOT", tmp_path)
    monkeypatch.setenv("NEMO_RECIPES_CACHE", str(tmp_path / "cache"))
    clear_caches()
    yield tmp_path
    clear_caches()


def fingerprint_of(module: str) -> str:
    """Returns the fingerprint of a module of ``repo`` with its current files."""
    clear_caches()
    return code_fingerprint(f"recipes.{module}")


def replace_in(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_digest_does_not_depend_on_key_order() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest([1, 2]) != digest([2, 1])


def test_resources_and_names_of_inputs_are_not_result_settings() -> None:
    plain = DistillConfig(stage="distill")
    large = DistillConfig(stage="distill", resources=Resources(nodes=4, devices=8, env={"A": "b"}))
    assert "resources" not in result_settings(plain)
    assert result_settings(plain) == result_settings(large)
    # A stage's fingerprint contains the inputs' fingerprints instead of their names.
    changed = result_settings(replace(plain, lr=1.0, inputs={"a": "b"}))
    changed_keys = {key for key, value in result_settings(plain).items() if value != changed[key]}
    assert changed_keys == {"lr"}


def test_stage_fingerprint_depends_on_each_argument_but_not_on_key_order() -> None:
    settings = result_settings(PruneConfig(stage="prune"))
    arguments = (settings, "code", {"torch": "2.9.0"}, {"x": "1"}, {"y": "2"})
    changes = ({**settings, "seq_length": 1}, "other", {"torch": "2.9.1"}, {"x": "2"}, {"y": "3"})
    base = stage_fingerprint(*arguments)
    fingerprints = {base}
    for index, change in enumerate(changes):
        changed_arguments: list[Any] = list(arguments)
        changed_arguments[index] = change
        fingerprints.add(stage_fingerprint(*changed_arguments))
    assert len(fingerprints) == 6  # each of the five changes has its own fingerprint
    assert base == stage_fingerprint(dict(reversed(settings.items())), *arguments[1:])


def test_fingerprints_use_installed_versions_or_else_locked_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = {"torch": "2.9.0a0+nv25.9", "transformers": "4.57.1"}
    monkeypatch.setattr(versions, "installed_version", installed.get)
    local = result_versions()
    assert (local["torch"], local["transformers"]) == ("2.9.0", "4.57.1")  # no build tag
    assert local.keys() == {*versions.RESULT_LIBRARIES, "tokenizers"}
    in_image = result_versions(in_image=True, libraries=["nncf"], programs=["sh"])
    locked = versions.locked_version
    assert "sh" not in in_image, "the launcher cannot see an image's programs"
    assert in_image["nncf"] == locked("nncf")
    # A login node does not have TransformerEngine, so its version must not count.
    installed["transformer-engine"] = "2.8.0"
    assert result_versions() == local
    assert result_versions(in_image=True, libraries=["nncf"], programs=["sh"]) == in_image
    # ``nemo_toolkit`` is not in ``installed``.
    assert local["nemo_toolkit"] == in_image["nemo_toolkit"] == locked("nemo_toolkit")
    assert in_image["torch"] == locked("torch") != "2.9.0"


@pytest.mark.parametrize("module", ["stage", "lazy", "plain"])
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("recipes/shared.py", "f(1)", "f(2)"),
        ("nemo_convert/core.py", "return x", "return -x"),
    ],
)
def test_a_change_of_imported_code_changes_the_fingerprint(
    repo: Path, module: str, file: str, old: str, new: str
) -> None:
    before = fingerprint_of(module)
    replace_in(repo / file, old, new)
    assert fingerprint_of(module) != before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("recipes/unrelated.py", "1", "2"),
        ("recipes/types.py", "int", "str"),
        ("recipes/shared.py", "# a comment", "# another one\n\n"),
        ("recipes/shared.py", "f(1)", "f(\n    1\n)"),
        ("recipes/stage.py", "Runs.", "Runs it."),
        ("pyproject.toml", "torch==2", "torch==3"),
    ],
)
def test_comments_format_types_and_unrelated_code_do_not_change_the_fingerprint(
    repo: Path, file: str, old: str, new: str
) -> None:
    before = fingerprint_of("stage")
    replace_in(repo / file, old, new)
    assert fingerprint_of("stage") == before


def test_empty_fields_of_newer_pythons_do_not_change_the_fingerprint(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.12 added the field ``type_params``, which is empty in code for Python 3.11."""
    before = fingerprint_of("stage")
    (repo / "cache" / MODULES_FILE).unlink()
    for node_class in (ast.FunctionDef, ast.Module):
        monkeypatch.setattr(node_class, "_fields", (*node_class._fields, "new"))
        monkeypatch.setattr(node_class, "new", [], raising=False)
    assert fingerprint_of("stage") == before


def test_hashes_of_unchanged_code_are_read_from_the_cache(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, cached = fingerprint_of("stage"), repo / "cache" / MODULES_FILE
    content = cached.read_text()
    monkeypatch.setattr(fingerprint, "_read_module", lambda root, path: ("unused", []))
    assert fingerprint_of("stage") == expected
    for other in (content[:-9], "[]", "{}", content.replace(sys.version.split()[0], "3.0")):
        cached.write_text(other)
        assert fingerprint_of("stage") != expected, "all modules are read again"


def test_fingerprints_do_not_need_the_cache(repo: Path) -> None:
    (repo / "cache").write_text("a file, so no folder can be made here")
    assert fingerprint_of("stage") == fingerprint_of("stage")


@pytest.mark.parametrize("statement", ["from . import shared", "from .shared import VALUE"])
def test_relative_imports_are_refused(repo: Path, statement: str) -> None:
    """Fingerprints do not follow relative imports, so the imported code would be missing."""
    (repo / "recipes" / "relative.py").write_text(f"{statement}\ndef run(): pass\n")
    with pytest.raises(ValueError, match="relative imports"):
        fingerprint_of("relative")


@pytest.mark.parametrize("module", ["recipes.nothing", "os"])
def test_a_module_outside_the_repository_is_refused(repo: Path, module: str) -> None:
    with pytest.raises(ValueError, match=f"there is no module {module}"):
        code_fingerprint(module)


@pytest.mark.parametrize(
    ("stage", "module"),
    [
        ("import_hf", "nemo_convert.convert"),
        ("prepare_data", "recipes.data.split_writer"),
        ("prune", "recipes.pruning.pruned_checkpoint"),
        ("heal", "recipes.pruning.healing"),
        ("distill", "recipes.distillation.losses"),
        ("distill", "recipes.backend.training_layers"),
        ("evaluate", "recipes.evaluation.predictions"),
        ("measure_speed", "recipes.engines.bench_worker"),
        ("build_engine", "recipes.engines.trtllm_build_worker"),
    ],
)
def test_a_stages_code_includes_direct_and_indirect_imports(stage: str, module: str) -> None:
    assert module in imported_code(REPO_ROOT, [f"recipes.stages.{stage}"])


def test_the_reports_fingerprint_includes_its_templates(root: Path) -> None:
    [folder] = report.STAGE.external(ReportConfig()).values()
    assert folder == root / "recipes" / "report" / "templates"
    assert {"report.html.j2", "style.css"} <= external_stamp(folder).keys()


def test_external_stamp_covers_every_file_but_not_the_folders_path(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "vocab.txt").write_text("a")
    with (folder / "weights").open("wb") as file:
        file.truncate(MAX_HASHED_BYTES + 1)  # so the stamp is size and modification time
    os.utime(folder / "weights", ns=(0, 5))  # access time, modification time
    before = external_stamp(folder)
    assert list(before) == ["config.json", "sub/vocab.txt", "weights"]
    assert before["weights"] == [MAX_HASHED_BYTES + 1, 5]
    os.utime(folder / "config.json", ns=(0, 0))  # the stamp of a small file is its hash
    assert external_stamp(folder.rename(tmp_path / "moved")) == before
    (tmp_path / "moved" / "sub" / "vocab.txt").write_text("b")
    assert external_stamp(tmp_path / "moved") != before
    assert list(external_stamp(tmp_path / "moved", ["*.json", "sub/*.md"])) == ["config.json"]


def test_a_path_and_its_absolute_path_are_the_same_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second source is a pattern. The third is not a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}")
    names = ["a.jsonl#text=body", "*.jsonl", "hf://org/text:train"]
    paths = [f"{tmp_path}/{name}" for name in names[:2]] + names[2:]
    relative, absolute = (
        result_settings(PrepareDataConfig(sources=sources)) for sources in (names, paths)
    )
    assert relative["sources"] == absolute["sources"] == paths
