"""Publishes the exported student on the Hugging Face hub, after the run has passed its gates.

``hub.push=ORG/NAME`` uploads the folder of ``export_hf`` with its model card, the report and the
export's manifest in one commit. The hub's client reads the token from ``HF_TOKEN`` or ``hf auth
login``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from launch.plan import Plan, metrics_of
from launch.planned import SKIP, PlannedStage
from launch.settings import Hub, RunSettings
from nemo_convert.hub import HUB_SECONDS, INDEX_FILE, WEIGHTS_FILE
from nemo_convert.licences import forbids_commercial_use, known_licence
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, MANIFEST, read_manifest
from recipes.core.screen import plain_table
from recipes.core.stage import Input
from recipes.core.trackers import public_text
from recipes.data.origins import known_licences
from recipes.data.settings import PrepareDataConfig
from recipes.report.settings import REPORT_FILE
from recipes.report.upstream import inputs_from_other_runs, recorded_licences

EXPORT_STAGE, REPORT_STAGE = "export_hf", "report"
"""Stage modules (``config.stage``) whose files are published."""
SHARDS = "model-*-of-*.safetensors"
MODEL_FILES = (
    *(WEIGHTS_FILE, SHARDS, INDEX_FILE, "generation_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
    "additional_chat_templates/*.jinja",
)
"""Names and patterns of files that transformers writes and loads. If an earlier push uploaded such
a file and the new export does not have it, the new push deletes it from the hub."""


def require_publishable(plan: Plan, settings: RunSettings, waits_for_stages: bool) -> None:
    """Refuses, before anything starts, a run that could not be published in the end.

    The launcher can publish only if ``waits_for_stages`` is true: if all stages are complete, or if
    it waits for them. A dry run does not check the access to the hub.
    """
    hub = settings.hub
    if hub.push is None:
        return
    if _export_stage(plan) is None:
        raise RecipeError(
            f"hub.push={hub.push}, but this run exports no student.",
            "choose a recipe with export_hf, add export_hf to only=, or omit hub.push",
        )
    if not waits_for_stages:
        raise RecipeError(
            f"hub.push={hub.push}, but the launcher exits once the jobs are submitted.",
            "add cluster.follow=true, or repeat the command with hub.push when all is complete",
        )
    _require_measured_gates(plan, hub, [s for s in plan.stages if s.action != SKIP])
    _require_licence(plan, hub)
    if not settings.dry_run:
        _require_access(hub.push, hub.private)


def show_files(plan: Plan, hub: Hub, console: Console) -> None:
    """Lists the files to upload, and the files to delete if the hub answers in ``HUB_SECONDS``."""
    export = _export_stage(plan)
    if hub.push is None or export is None:
        return
    from huggingface_hub import constants, get_token

    table = plain_table(f"hub.push={hub.push}", "file", "size")
    files = _files(plan, export)
    for name, path in files.items():
        table.add_row(escape(name), f"{path.stat().st_size / 1e6:.1f} MB")
    if not files:  # the export is incomplete, so its files are not known yet
        table.add_row(f"the result of {export.name}", "")
    elif get_token() and not constants.HF_HUB_OFFLINE:
        with suppress(RecipeError):
            for name in _obsolete_files(hub.push, files, timeout=HUB_SECONDS):
                table.add_row(escape(name), "deleted")
    console.print(table)


def publish(plan: Plan, hub: Hub, console: Console) -> None:
    """Uploads the student of a complete run; files that the hub already has are not sent again."""
    export = _export_stage(plan)
    if hub.push is None or export is None:
        return
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    _require_measured_gates(plan, hub)
    files = _files(plan, export)
    # Repeats two checks from before the run: results may add licences, and access may have ended.
    _require_licence(plan, hub)
    _require_access(hub.push, hub.private)
    with _explained_errors(hub.push):
        api = HfApi()
        api.create_repo(hub.push, private=hub.private, exist_ok=True)
        # ``public_text`` removes secrets from the settings in the manifest.
        operations = [
            CommitOperationAdd(name, public_text(path).encode() if name == MANIFEST else path)
            for name, path in files.items()
        ]
        deletions = map(CommitOperationDelete, _obsolete_files(hub.push, files))
        commit = api.create_commit(
            hub.push, [*operations, *deletions], commit_message=plan.run_dir.name
        )
    console.print(f"published: {commit.commit_url}", highlight=False, soft_wrap=True)


def public_file(stage: PlannedStage) -> Path | None:
    """Returns the file to upload besides the model: the export's manifest, or the report."""
    if _exports_student(stage):
        return stage.directory / MANIFEST
    if stage.config.stage == REPORT_STAGE:
        return stage.directory / ARTIFACT / REPORT_FILE
    return None


def _export_stage(plan: Plan) -> PlannedStage | None:
    """Returns the stage that exports the student; ``None`` if the plan has none."""
    return next(filter(_exports_student, plan.stages), None)


def _exports_student(stage: PlannedStage) -> bool:
    """Returns whether a stage exports the student.

    A run may also export its teacher, but only the student's export has an evaluation as input.
    """
    return stage.config.stage == EXPORT_STAGE and "evaluation" in stage.inputs


def _files(plan: Plan, export: PlannedStage) -> dict[str, Path]:
    """Returns the files to upload, by their names on the hub; none if the export is incomplete."""
    if export.result is None:
        return {}
    folder = export.directory / ARTIFACT
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    public_files = (public_file(stage) for stage in plan.stages if stage.result is not None)
    return files | {file.name: file for file in public_files if file is not None}


def _obsolete_files(
    repository: str, files: Collection[str], timeout: float | None = None
) -> list[str]:
    """Returns the ``MODEL_FILES`` of a repository that are not in ``files``.

    For example, transformers would load an old ``model.safetensors`` instead of new shards.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _explained_errors(repository):
        try:
            siblings = HfApi().model_info(repository, timeout=timeout).siblings or ()
        except RepositoryNotFoundError:
            return []

    def is_model_file(name: str) -> bool:
        # The * of fnmatch also matches slashes. So a pattern must have as many as the name.
        patterns = [p for p in MODEL_FILES if p.count("/") == name.count("/")]
        return any(fnmatch(name, pattern) for pattern in patterns)

    old_files = {sibling.rfilename for sibling in siblings} - set(files)
    return sorted(filter(is_model_file, old_files))


def _require_measured_gates(plan: Plan, hub: Hub, pending: Iterable[PlannedStage] = ()) -> None:
    """Refuses to publish if a gate has no result yet, and no ``pending`` stage will measure it."""
    _, unjudged = plan.judge_gates()
    to_be_measured = metrics_of(stage.config for stage in pending)
    if unmeasured := [str(gate) for gate in unjudged if gate.name not in to_be_measured]:
        raise RecipeError(
            f"hub.push={hub.push}, but no current result shows whether these gates pass: "
            f"{', '.join(unmeasured)}.",
            "add the stages that measure them to only=, or leave only= out",
        )


def _require_licence(plan: Plan, hub: Hub) -> None:
    """Refuses licences that forbid commercial use, unless ``hub.allow_noncommercial`` is set."""
    restricted = sorted({text for text in _licences(plan) if forbids_commercial_use(text)})
    if restricted and not hub.allow_noncommercial:
        raise RecipeError(
            f"hub.push={hub.push}, but the licence of the training text or teacher forbids "
            f"commercial use: {', '.join(restricted)}.",
            "hub.allow_noncommercial=true publishes it anyway; the model card names the licence",
        )


def _licences(plan: Plan) -> Iterator[str]:
    """Yields the licences of the texts and models that the student depends on.

    Reads the licences from the teacher's folder, from the settings of ``prepare_data``, and from
    results: those of this run, and those of other runs that are inputs of this run.
    """
    results = {stage.name: stage.result for stage in plan.stages}
    yield known_licence(plan.chain.hf_path)
    inputs = inputs_from_other_runs(plan.chain.stages)
    for name, config in plan.chain.stages.items():
        if isinstance(config, PrepareDataConfig):
            yield from filter(None, known_licences(tuple(config.texts()), HUB_SECONDS).values())
        directory = plan.run_dir / name
        # Stages that ``only`` excludes are not in ``plan.stages``, but may have results.
        result = results[name] if name in results else read_manifest(directory)
        if result is not None:
            inputs[name] = Input(directory, result)
    yield from recorded_licences(inputs)


def _require_access(repository: str, private: bool) -> None:
    """Refuses a missing or invalid token, and a public model if ``private`` is set."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise RecipeError(f"hub.push={repository}, but HF_HUB_OFFLINE is set.", "unset it")
    if get_token() is None:
        raise RecipeError(
            f"hub.push={repository} needs a token of the hub.",
            "set HF_TOKEN to a token with write access, or run hf auth login",
        )
    with _explained_errors(repository):
        api = HfApi()
        api.whoami()
        try:
            model = api.model_info(repository)
        except RepositoryNotFoundError:
            return
    if private and not model.private:
        raise RecipeError(
            f"{repository} is public, but hub.private is true.",
            "set hub.private=false if everybody may see it, or push to another name",
        )


@contextmanager
def _explained_errors(repository: str) -> Iterator[None]:
    """Turns errors of the hub and the network into one message."""
    from huggingface_hub.errors import HfHubHTTPError
    from requests import RequestException

    try:
        yield
    except (HfHubHTTPError, RequestException, OSError, ValueError) as error:
        # The hub's errors start with the HTTP status and end with the reason.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RecipeError(
            f"could not publish {repository}: {lines[-1]}",
            "check HF_TOKEN, the name and the network, then repeat the command: complete stages do "
            "not run again",
        ) from error
