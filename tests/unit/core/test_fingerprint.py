from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from launch.planned import stage_names
from recipes.core import fingerprint, reachable_code
from recipes.core.files import REPO_ROOT
from recipes.core.fingerprint import (
    SMALL_FILE,
    code_fingerprint,
    digest,
    external_stamp,
    result_settings,
    stage_code,
    stage_fingerprint,
)
from recipes.core.stage import Resources
from recipes.distillation.settings import DistillConfig
from recipes.pruning.settings import PruneConfig
from recipes.report.settings import ReportConfig
from recipes.stages import report

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODULES = {
    "stage_a": "from recipes import shared\n\ndef check():\n    return 0\n\n"
    'def run():\n    """Runs."""\n    return shared.VALUE\n',
    "shared": "import os\nfrom nemo_convert.core import f\n\nVALUE = f(1)  # a comment\n"
    "RULE = 'words'\nseen = []\nseen.append(1)\n",
    "lazy": "def run():\n    from recipes.shared import VALUE\n    return VALUE\n",
    "unrelated": "VALUE = 1\n",
}


def forget() -> None:
    """Clears what was read from the source tree before."""
    fingerprint.code_fingerprint.cache_clear()
    reachable_code._read.cache_clear()


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
    return code_fingerprint(f"recipes.{module}:run")


def replace_in(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def reached(stage: str) -> dict[str, set[str]]:
    """Names of a real stage's code, by module."""
    found = reachable_code.reachable_code(REPO_ROOT, [f"recipes.stages.{stage}:run"])
    return {module: {one.split(" ")[0] for one in hashes} for module, hashes in found.items()}


def test_digest_does_not_depend_on_key_order() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"a": 1.5}, {"b": 1}, {"a": [1]}, {}])
def test_digest_depends_on_keys_and_values(other: dict[str, object]) -> None:
    assert digest({"a": 1}) != digest(other)


def test_digest_depends_on_the_order_of_lists() -> None:
    assert digest([1, 2]) != digest([2, 1])


def test_resources_are_no_result_settings() -> None:
    plain = DistillConfig(stage="distill")
    large = DistillConfig(stage="distill", resources=Resources(nodes=4, devices=8, env={"A": "b"}))
    assert "resources" not in result_settings(plain)
    assert result_settings(plain) == result_settings(large)


@pytest.mark.parametrize("field", ["lr", "max_steps", "seed", "precision", "temperature", "inputs"])
def test_result_fields_are_result_settings(field: str) -> None:
    plain = result_settings(DistillConfig(stage="distill"))
    value = {"a": "b"} if field == "inputs" else "3"
    other = result_settings(DistillConfig(stage="distill", **{field: value}))
    assert {key for key in plain if plain[key] != other[key]} == {field}


def test_stage_fingerprint_depends_on_each_part() -> None:
    settings = result_settings(PruneConfig(stage="prune"))
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
        ("recipes/{module}.py", "    return", "    print()\n    return"),
        ("recipes/shared.py", "append(1)", "append(2)"),
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
        ("recipes/shared.py", "words", "other words"),
        ("recipes/stage_a.py", "return 0", "return 1"),
        ("recipes/stage_a.py", "Runs.", "Runs it."),
        ("recipes/stage_a.py", "def run", "LIMIT = 1\ndef run"),
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
    (repo / "nemo_convert" / "core.py").write_text(
        "from recipes import stage_a\ndef f(x):\n    return stage_a.check()\n"
    )
    before = of("stage_a")
    replace_in(repo / "recipes" / "stage_a.py", "return 0", "return 1")
    assert of("stage_a") != before


@pytest.mark.parametrize("statement", ["from . import shared", "from .shared import VALUE"])
def test_relative_imports_are_refused(repo: Path, statement: str) -> None:
    """They would hide what a result depends on."""
    (repo / "recipes" / "relative.py").write_text(f"{statement}\ndef run(): pass\n")
    with pytest.raises(ValueError, match="relative imports"):
        of("relative")


def test_plain_imports_of_modules_are_refused(repo: Path) -> None:
    (repo / "recipes" / "plain.py").write_text("import recipes.shared\ndef run(): pass\n")
    with pytest.raises(ValueError, match="from … import"):
        of("plain")


@pytest.mark.parametrize("start", ["recipes.stage_a:walk", "recipes.nothing:run", "os:walk"])
def test_code_that_is_not_there_is_refused(repo: Path, start: str) -> None:
    forget()
    with pytest.raises(ValueError, match=f"there is no code {start}"):
        code_fingerprint(start)


def test_a_module_that_is_handed_on_counts_whole(repo: Path) -> None:
    """Its name may start it as a process."""
    source = "from recipes import shared\ndef run():\n    return shared.__name__\n"
    (repo / "recipes" / "starts.py").write_text(source)
    before = of("starts")
    replace_in(repo / "recipes" / "shared.py", "words", "other words")
    assert of("starts") != before


@pytest.mark.usefixtures("real_repo")
@pytest.mark.parametrize("stage", stage_names())
def test_no_check_and_no_rule_is_part_of_a_stages_code(stage: str) -> None:
    found = reached(stage)
    assert not {"recipes.planning.rules", "recipes.planning.problems"} & found.keys()
    assert not {"recipes.core.worker", "recipes.stages.contract"} & found.keys()
    assert "check" not in found[f"recipes.stages.{stage}"]
    if stage != "plan":
        assert not {"recipes.planning.estimate", "recipes.planning.budget"} & found.keys()
    if not stage.startswith("report"):
        rooms = {module.rpartition(".")[0] for module in found}
        assert "recipes.report" not in rooms or stage == "export_hf"


@pytest.mark.usefixtures("real_repo")
@pytest.mark.parametrize(
    ("stage", "needed"),
    [
        ("score", {"pruning.scoring": "LayerAblation", "pruning.importance": "Importance"}),
        ("prune", {"pruning.kept": "cut", "pruning.cut_checkpoint": "prune_checkpoint"}),
        ("prune", {"planning.targets": "pruned", "pruning.settings": "PruneConfig"}),
        ("heal", {"pruning.healing": "LeastSquares", "pruning.cut_checkpoint": "save_weights"}),
        ("heal", {"evaluation.text_quality": "measure_checkpoints"}),
        ("distill", {"distillation.trainer": "train", "distillation.losses": "_reverse_kl"}),
        ("distill", {"distillation.model": "KDModel", "distillation.data": "TrainingData"}),
        ("evaluate", {"evaluation.predictions": "compare"}),
        ("export_hf", {"report.model_card": "write_card"}),
        ("prepare_data", {"data.corpus": "part_of", "data.part_writer": "PartWriter"}),
        ("prepare_data", {"data.tokenizer": "_encode", "data.ledger": "Ledger"}),
        ("prepare_data", {"data.written": "write", "data.chat": "ChatTokenizer"}),
        ("measure_speed", {"engines.bench_worker": "serve", "engines.openvino": "Pipeline"}),
        ("build_engine", {"engines.trtllm_build_worker": "main", "engines.openvino": "build"}),
    ],
)
def test_stages_reach_the_code_that_makes_their_result(stage: str, needed: dict[str, str]) -> None:
    found = reached(stage)
    for module, name in needed.items():
        assert name in found[f"recipes.{module}"]


@pytest.mark.usefixtures("real_repo")
def test_stages_reach_the_conversion() -> None:
    assert "to_nemo" in reached("import_hf")["nemo_convert.convert"]
    assert "PATCHES" in reached("distill")["nemo_convert.cpu_backend"]
    assert "_CausalAttention" in reached("distill")["nemo_convert.cpu_layers"]


def test_the_reports_templates_count(root: Path) -> None:
    [folder] = report.STAGE.external(ReportConfig()).values()
    assert folder == root / "recipes" / "report" / "templates"
    assert {"report.html.j2", "style.css"} <= external_stamp(folder).keys()


@pytest.mark.usefixtures("real_repo")
def test_stages_have_different_code() -> None:
    stages = ("prune", "distill", "evaluate", "import_hf", "export_hf", "report", "prepare_data")
    assert len({stage_code([stage]) for stage in stages}) == len(stages)


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
