"""Publishes a student on a fake hub, which is a server on this machine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import DatasetCardData, HfApi

from launch.publish import require_publishable
from launch.settings import Hub, RunSettings
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, MANIFEST, stamp_files
from recipes.core.run_state import content_of
from recipes.core.trackers import public_text
from recipes.planning import rules
from tests.support.hub import FakeHub, fake_hub, settings_for
from tests.support.manifests import edit_manifest
from tests.support.runs import manifest_of
from tests.unit.conftest import stage_named, write_last_plan

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import Complete, Launch, MakePlan

TOKEN = "hf_a_token_of_the_fake_hub"
NAME = "me/small"
"""The repository on the hub: owner and model."""
SECRET = "a password in a stage's environment"
RUN = ("recipe=llama_width_prune", "engine=null", "tasks=null")
NONCOMMERCIAL: dict[str, tuple[str, dict[str, object]]] = {
    "text": ("prepare_data", {"sources": ["a"], "origins": {"a": {"licence": "cc-by-nc-4.0"}}}),
    "teacher": ("import_hf", {"licence": "cc-by-nc-4.0"}),
}
"""By origin of the licence: a stage, and metrics of this stage with a noncommercial licence."""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub(TOKEN) as server:
        yield server


@pytest.fixture
def run(plan: MakePlan, complete: Complete, tmp_path: Path) -> Path:
    """A complete run whose export has weights, and whose settings hold a secret."""
    planned = plan()
    complete(planned)
    files = {
        "export_hf": {"model.safetensors": b"weights" * 1000, "README.md": b"# a card"},
        "report": {"report.html": b"<p>a page"},
    }
    for stage_name, stage_files in files.items():
        stage = stage_named(planned, stage_name)
        for name, content in stage_files.items():
            (stage.directory / ARTIFACT / name).write_bytes(content)
        config = {**stage.request().config, "resources": {"env": {"PROXY": SECRET}}}
        edit_manifest(
            stage.directory,
            config=config,
            files=stamp_files(stage.directory / ARTIFACT),
            input_content=content_of(stage.inputs),
        )
    return tmp_path / "run"


@pytest.fixture
def push(launch: Launch, run: Path, hub: FakeHub, tmp_path: Path) -> Launch:
    """Returns a function that repeats the command of the complete run with ``hub.push``."""

    def push_run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "hub").mkdir(exist_ok=True)
        settings = {**settings_for(hub, tmp_path / "hub"), "HF_TOKEN": TOKEN, **env}
        return launch(*RUN, f"run_dir={run}", f"hub.push={NAME}", *arguments, **settings)

    return push_run


def test_a_complete_run_is_published_private(push: Launch, run: Path, hub: FakeHub) -> None:
    process = push()
    assert process.returncode == 0, process.stdout + process.stderr
    # The fake hub reports this address for every commit.
    assert f"published: {hub.url}/{NAME}/commit/1" in process.stdout
    assert hub.private == {NAME: True}
    folder = run / "export_hf"
    assert hub.models[NAME] == {
        **{path.name: path.read_bytes() for path in (folder / ARTIFACT).iterdir()},
        MANIFEST: public_text(folder / MANIFEST).encode(),
        "report.html": (run / "report" / ARTIFACT / "report.html").read_bytes(),
    }
    assert SECRET.encode() not in hub.models[NAME][MANIFEST]
    assert len(hub.blobs) == 1, "the weights must be uploaded by LFS"
    files = [file for file in run.parent.rglob("*") if file.is_file()]
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]


def test_a_dry_run_lists_the_files(push: Launch, hub: FakeHub) -> None:
    process = push("dry_run=true", HF_TOKEN="")
    assert process.returncode == 0, process.stdout + process.stderr
    for name in ("model.safetensors", "README.md", "report.html", MANIFEST):
        assert name in process.stdout
    assert hub.models == {}


def test_model_files_of_an_earlier_push_are_deleted(push: Launch, hub: FakeHub) -> None:
    """The earlier student was sharded. Without the deletion, transformers might load its shards."""
    obsolete = {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "vocab.json"}
    # Their names resemble those of model files, but a push never writes them.
    user_files = {"notes.md", "tokenizer_notes.md", "onnx/model.safetensors", "tokenizer/notes.md"}
    earlier = obsolete | user_files
    hub.models[NAME], hub.private[NAME] = dict.fromkeys(earlier, b"earlier"), True
    listing = push("dry_run=true").stdout
    assert {name for name in earlier if re.search(rf"{name} +deleted", listing)} == obsolete
    process = push()
    assert process.returncode == 0, process.stdout + process.stderr
    names = hub.models[NAME].keys()
    assert not names & obsolete
    assert user_files <= names
    assert "model.safetensors" in names


def test_a_run_that_fails_its_gates_is_not_published(push: Launch, hub: FakeHub) -> None:
    process = push('gates=["perplexity < 0.5"]')
    assert process.returncode == 1
    assert "1 of 1 gates failed" in process.stderr
    assert hub.models == {}
    process = push('gates=["perplexity < 50"]')
    assert process.returncode == 0, process.stderr
    page = hub.models[NAME]["report.html"].decode()
    assert "perplexity &lt; 50" in page, "the report shows the gates of an earlier command"


def test_gates_must_pass_even_if_the_setting_only_excludes_their_stages(
    push: Launch, run: Path, hub: FakeHub
) -> None:
    only = "only=[export_hf]"  # excludes evaluate and measure_speed, whose metrics the gates read
    failed = push(only, 'gates=["perplexity < 0.5"]')
    assert "1 of 1 gates failed" in failed.stderr
    speed = ("engine=openvino", 'gates=["speedup.decode > 0.1"]')  # no stage has measured it
    for arguments in (speed, (*speed, "dry_run=true")):
        unmeasured = push(only, *arguments)
        assert unmeasured.returncode == 1
        assert "hub.push=me/small" in unmeasured.stderr
        assert "speedup.decode > 0.1" in unmeasured.stderr
    assert hub.models == {}
    assert push(only, 'gates=["perplexity < 50"]').returncode == 0
    assert NAME in hub.models


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ((), {"HF_TOKEN": ""}, "needs a token of the hub"),
        ((), {"HF_TOKEN": "hf_another"}, f"could not publish {NAME}"),
        # No server listens on this port.
        ((), {"HF_ENDPOINT": "http://127.0.0.1:9"}, f"could not publish {NAME}"),
        (("only=[prune]",), {}, "exports no student"),
        (
            ("cluster=slurm", "cluster.gpus=null", "cluster.account=a", "force=[report]"),
            {},
            "cluster.follow=true",
        ),
    ],
    ids=["no token", "unknown token", "no hub", "no export", "slurm"],
)
def test_runs_that_cannot_be_published_are_refused_before_they_start(
    push: Launch, hub: FakeHub, arguments: tuple[str, ...], env: dict[str, str], message: str
) -> None:
    process = push(*arguments, **env)
    assert process.returncode == 1
    assert message in process.stderr
    assert "fix:" in process.stderr
    assert "Traceback" not in process.stderr
    assert hub.models == {}


@pytest.mark.parametrize("origin", NONCOMMERCIAL)
def test_noncommercial_student_is_published_only_if_allowed(
    push: Launch, run: Path, hub: FakeHub, origin: str
) -> None:
    """The licence of the training text or of the teacher forbids commercial use."""
    stage, metrics = NONCOMMERCIAL[origin]
    edit_manifest(run / stage, metrics=manifest_of(run, stage).metrics | metrics)
    process = push()
    assert process.returncode == 1
    assert "forbids commercial use: cc-by-nc-4.0." in process.stderr
    assert hub.models == {}
    process = push("hub.allow_noncommercial=true")
    assert process.returncode == 0, process.stderr
    assert NAME in hub.models


@pytest.mark.parametrize("origin", NONCOMMERCIAL)
def test_licences_of_other_runs_count(
    push: Launch, run: Path, plan: MakePlan, complete: Complete, origin: str
) -> None:
    """The pushed run's ``distill`` has an input from another run.

    The input is the text of the run ``third``, or the pruned model of the run ``second``. That
    model's teacher is in ``third``, which has the noncommercial licence in both cases.
    """

    def complete_run(name: str, *overrides: str) -> Path:
        """Completes a run in the directory ``run``, then renames the directory."""
        # ``pack`` makes the fingerprints differ from those of the run that is pushed.
        planned = plan("stages.import_hf.pack=true", *overrides)
        complete(planned)
        write_last_plan(planned)
        return run.rename(run.with_name(name))

    run.rename(run.with_name("pushed"))  # until the two other runs are complete
    third = complete_run("third")
    second = complete_run("second", f"stages.prune.inputs.checkpoint={third}/import_hf")
    run.with_name("pushed").rename(run)
    stage, metrics = NONCOMMERCIAL[origin]
    inputs = {"text": f"data={third}/prepare_data", "teacher": f"student={second}/prune"}
    from_other_run = f"stages.distill.inputs.{inputs[origin]}"
    assert push("dry_run=true", from_other_run).returncode == 0
    edit_manifest(third / stage, metrics=manifest_of(third, stage).metrics | metrics)
    process = push("dry_run=true", from_other_run)
    assert process.returncode == 1
    assert "forbids commercial use: cc-by-nc-4.0." in process.stderr
    assert push("dry_run=true", from_other_run, "hub.allow_noncommercial=true").returncode == 0
    assert rules.LICENCE in [note.rule for note in plan(from_other_run).notes]


def test_a_licence_on_the_hub_is_refused_before_the_run(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(card_data=DatasetCardData(license="cc-by-nc-4.0"), sha="a" * 40)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: card)
    planned = plan("data.sources=['hf://org/noncommercial:train']", "skip_rules=[unknown-text]")
    settings = RunSettings(hub=Hub(push=NAME))
    with pytest.raises(RecipeError, match=r"forbids commercial use: cc-by-nc-4\.0"):
        require_publishable(planned, settings, waits_for_stages=True)


def test_push_to_a_public_model_needs_hub_private_false(push: Launch, hub: FakeHub) -> None:
    hub.models[NAME], hub.private[NAME] = {}, False
    process = push()
    assert process.returncode == 1
    assert f"{NAME} is public, but hub.private is true" in process.stderr
    assert hub.models[NAME] == {}
    process = push("hub.private=false")
    assert process.returncode == 0, process.stderr
    assert "model.safetensors" in hub.models[NAME]
