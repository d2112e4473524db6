"""Publishes a student on a fake hub, which is a server on this machine."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import DatasetCardData, HfApi

from launch.publish import require_publishable
from launch.settings import Hub, RunSettings
from launch.sweep import require_separate_results
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, MANIFEST, stamp_files
from recipes.core.run_state import content_of
from recipes.core.trackers import public_text
from recipes.planning import rules
from tests.support.hub import FakeHub, fake_hub, settings_for
from tests.support.manifests import edit_manifest
from tests.support.runs import manifest_of
from tests.unit.conftest import write_last_plan

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import Complete, Compose, Launch, MakePlan

TOKEN = "hf_a_token_of_the_fake_hub"
NAME = "me/small"
SECRET = "a password in a stage's environment"
RUN = ("recipe=llama_width_prune", "engine=null", "tasks=null")
NONCOMMERCIAL: dict[str, tuple[str, dict[str, object]]] = {
    "text": ("prepare_data", {"sources": ["a"], "origins": {"a": {"licence": "cc-by-nc-4.0"}}}),
    "teacher": ("import_hf", {"licence": "cc-by-nc-4.0"}),
}
"""A stage, and metrics that make it noncommercial."""


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
    for stage in (stage for stage in planned.stages if stage.name in files):
        for name, content in files[stage.name].items():
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
    done = push()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"published: {hub.url}/{NAME}/commit/1" in done.stdout
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
    done = push("dry_run=true", HF_TOKEN="")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("model.safetensors", "README.md", "report.html", MANIFEST):
        assert name in done.stdout
    assert hub.models == {}


def test_model_files_of_an_earlier_push_are_deleted(push: Launch, hub: FakeHub) -> None:
    """The earlier student was sharded. Without the deletion, transformers might load its shards."""
    old = {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "vocab.json"}
    # Files of the user.
    kept = {"notes.md", "tokenizer_notes.md", "onnx/model.safetensors", "tokenizer/notes.md"}
    hub.models[NAME], hub.private[NAME] = dict.fromkeys(old | kept, b"earlier"), True
    dry = push("dry_run=true")
    assert {name for name in old | kept if re.search(rf"{name} +deleted", dry.stdout)} == old
    done = push()
    assert done.returncode == 0, done.stdout + done.stderr
    names = hub.models[NAME].keys()
    assert (names & old, names & kept) == (set(), kept)
    assert "model.safetensors" in names


def test_a_run_that_fails_its_gates_is_not_published(push: Launch, hub: FakeHub) -> None:
    done = push('gates=["perplexity < 0.5"]')
    assert done.returncode == 1
    assert "1 of 1 gates failed" in done.stderr
    assert hub.models == {}
    done = push('gates=["perplexity < 50"]')
    assert done.returncode == 0, done.stderr
    page = hub.models[NAME]["report.html"].decode()
    assert "perplexity &lt; 50" in page, "the report shows the gates of an earlier command"


def test_gates_of_stages_that_only_excludes_must_pass(
    push: Launch, run: Path, hub: FakeHub
) -> None:
    excluding = ("only=[export_hf]", 'gates=["perplexity < 50"]')
    failed = push(excluding[0], 'gates=["perplexity < 0.5"]')
    assert "1 of 1 gates failed" in failed.stderr
    speed = ("engine=openvino", 'gates=["speedup.decode > 0.1"]')  # no stage has measured it
    for arguments in (speed, (*speed, "dry_run=true")):
        unmeasured = push(excluding[0], *arguments)
        assert unmeasured.returncode == 1
        assert "hub.push=me/small" in unmeasured.stderr
        assert "speedup.decode > 0.1" in unmeasured.stderr
    assert hub.models == {}
    assert push(*excluding).returncode == 0
    assert NAME in hub.models


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ((), {"HF_TOKEN": ""}, "needs a token of the hub"),
        ((), {"HF_TOKEN": "hf_another"}, f"could not publish {NAME}"),
        ((), {"HF_ENDPOINT": "http://127.0.0.1:9"}, f"could not publish {NAME}"),  # no server
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
    done = push(*arguments, **env)
    assert done.returncode == 1
    assert message in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.models == {}


@pytest.mark.parametrize("where", NONCOMMERCIAL)
def test_noncommercial_student_is_published_only_if_allowed(
    push: Launch, run: Path, hub: FakeHub, where: str
) -> None:
    """The licence of the training text or of the teacher forbids commercial use."""
    stage, metrics = NONCOMMERCIAL[where]
    edit_manifest(run / stage, metrics=manifest_of(run, stage).metrics | metrics)
    done = push()
    assert done.returncode == 1
    assert "forbids commercial use: cc-by-nc-4.0." in done.stderr
    assert hub.models == {}
    done = push("hub.allow_noncommercial=true")
    assert done.returncode == 0, done.stderr
    assert NAME in hub.models


@pytest.mark.parametrize("where", NONCOMMERCIAL)
def test_licences_of_other_runs_count(
    push: Launch, run: Path, plan: MakePlan, complete: Complete, where: str
) -> None:
    """``distill`` has an input of another run: text, or a model whose teacher is in a third run."""

    def complete_run(name: str, *overrides: str) -> Path:
        # Fingerprints must differ from those of the run that is pushed.
        planned = plan("stages.import_hf.pack=true", *overrides)
        complete(planned)
        write_last_plan(planned)
        return run.rename(run.with_name(name))

    run.rename(run.with_name("pushed"))
    third = complete_run("third")
    second = complete_run("second", f"stages.prune.inputs.checkpoint={third}/import_hf")
    run.with_name("pushed").rename(run)
    stage, metrics = NONCOMMERCIAL[where]
    inputs = {"text": f"data={third}/prepare_data", "teacher": f"student={second}/prune"}
    from_other_run = f"stages.distill.inputs.{inputs[where]}"
    assert push("dry_run=true", from_other_run).returncode == 0
    edit_manifest(third / stage, metrics=manifest_of(third, stage).metrics | metrics)
    done = push("dry_run=true", from_other_run)
    assert done.returncode == 1
    assert "forbids commercial use: cc-by-nc-4.0." in done.stderr
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


def test_runs_of_a_sweep_are_not_pushed_to_one_repository(launch: Launch, tmp_path: Path) -> None:
    swept = (*RUN, "dry_run=true", "-m", "stages.prune.target_hidden_size=448,512")
    done = launch(*swept, f"hub.push={NAME}")
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: several runs of this sweep would have hub.push={NAME}.\n"
    )
    assert not list(tmp_path.rglob("plan")), "something was planned"
    done = launch(*swept, f"hub.push={NAME}-${{stages.prune.target_hidden_size}}")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"hub.push=(\S+)", done.stdout) == [f"{NAME}-448", f"{NAME}-512"]


@pytest.mark.parametrize(
    ("arg", "separate"),
    [
        ("run_dir=both", False),
        ("run_dir=runs/${hydra:job.num}", True),
        ("run_dir=one,two", True),
        ("run_dir=one,two,one", False),
        ("run_dir=one,two stages.distill.lr=1e-4,2e-4", False),
        ("run_dir=one-${stages.distill.lr},two-${stages.distill.lr} stages.distill.lr=1,2", True),
        ("run_dir=one,two only=[plan,prune]", True),
        (f"hub.push={NAME}-1,{NAME}-2", True),
    ],
)
def test_runs_of_a_sweep_need_separate_results(compose: Compose, arg: str, separate: bool) -> None:
    cfg = compose(RUN[0], arg.partition(",")[0])  # of the first run
    refusal = pytest.raises(RecipeError, match="several runs of")
    with contextlib.nullcontext() if separate else refusal:
        require_separate_results(cfg, ["-m", *RUN, *arg.split()])


def test_a_public_model_is_refused_unless_it_may_be_public(push: Launch, hub: FakeHub) -> None:
    hub.models[NAME], hub.private[NAME] = {}, False
    done = push()
    assert done.returncode == 1
    assert f"{NAME} is public, but hub.private is true" in done.stderr
    assert hub.models[NAME] == {}
    done = push("hub.private=false")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.models[NAME]
