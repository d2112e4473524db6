"""Runs a search from its ranking to the chosen recipe: real pruning, training and engines."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.functional import kl_div, nll_loss
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_convert import nemo
from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import with_shape
from recipes.core import stage_process
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, Manifest
from recipes.core.stage import DEADLINE, Input, Resources, StoppedByDeadlineError
from recipes.data.results import DatasetResult
from recipes.data.token_sequences import TextSequences, first_sequences
from recipes.distillation.settings import DistillConfig
from recipes.engines.results import BenchmarkRow
from recipes.evaluation import text_quality
from recipes.evaluation.predictions import Predictor, compute_states, log_probabilities
from recipes.evaluation.results import TokenQuality
from recipes.evaluation.text_quality import load_transformers
from recipes.planning.results import PlanResult
from recipes.pruning.healing import heal_weights
from recipes.pruning.kept import Importance, layers_to_keep, select_indices
from recipes.pruning.pruned_checkpoint import prune_weights
from recipes.pruning.targets import PruneTargets, pruned_shape
from recipes.report.settings import REPORT_FILE, ReportConfig
from recipes.search.latency import step_ms
from recipes.search.measure import SortedModel, _candidate
from recipes.search.results import LatencyResult, SearchResult
from recipes.search.settings import (
    EnumerateShapesConfig,
    RankCandidatesConfig,
    SuccessiveHalvingConfig,
)
from recipes.search.space import Budget, Service, Space
from recipes.stages import (
    enumerate_shapes,
    import_hf,
    measure_latency,
    prepare_data,
    rank_candidates,
    report,
    score,
    successive_halving,
)
from tests.support.in_process import run_here
from tests.support.ranks import fork_command
from tests.support.rounding import ROUNDINGS, measure_ulp_noise
from tests.support.runs import make_artifact_folder, manifest_of

TARGETS: list[dict[str, Any]] = [
    {"num_layers": 3},
    {"hidden_size": 48, "ffn_hidden_size": 72},
    {"num_attention_heads": 2, "num_layers": 2},
    {"num_query_groups": 1, "hidden_size": 40},
]


def run_stage(module: Any, run_dir: Path, inputs: dict[str, str], **settings: Any) -> None:
    """Runs a stage of a run in this process, on the outputs of earlier stages."""
    name = module.__name__.rpartition(".")[2]
    config = module.STAGE.config(stage=name, inputs=inputs, **settings)
    run_here(config, run_dir / name, {key: run_dir / source for key, source in inputs.items()})


TEACHER_INPUTS = {"checkpoint": "import_hf", "importance": "score"}
RANK_SETTINGS = {"num_samples": 4, "num_healed": 2, "num_calibration_samples": 8}


@pytest.fixture(scope="module")
def ranked_run(even_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a search up to its ranking."""
    run, length = tmp_path_factory.mktemp("search"), {"seq_length": 64}
    # Every number of layers is allowed; hidden and feed-forward sizes are multiples of 8.
    model, space = {"hf_path": str(even_llama)}, Space(1, 8, 8)
    run_stage(import_hf, run, {}, **model)
    source = {"sources": [str(text_file)], "text_field": "text"}
    run_stage(prepare_data, run, {"tokenizer": "import_hf"}, **source, **length)
    budget = Budget(parameters=0.75)
    run_stage(enumerate_shapes, run, {}, **model, space=space, budget=budget)
    inputs = {"checkpoint": "import_hf", "calibration": "prepare_data"}
    run_stage(score, run, inputs, num_calibration_samples=8, num_loss_samples=4, **length)
    inputs = {**TEACHER_INPUTS, "data": "prepare_data", "shapes": "enumerate_shapes"}
    run_stage(rank_candidates, run, inputs, **RANK_SETTINGS, **length)
    return run


@pytest.mark.parametrize("targets", TARGETS)
def test_views_of_sorted_weights_have_the_logits_of_pruned_models(
    ranked_run: Path, targets: dict[str, Any]
) -> None:
    teacher = nemo.find_checkpoint(ranked_run / "import_hf" / ARTIFACT)
    scores = Importance.load(ranked_run / "score" / ARTIFACT).widths
    teacher_shape = nemo.architecture_of(teacher)
    shape = pruned_shape(teacher_shape, PruneTargets(**targets))
    tokens = torch.randint(280, (2, 32), generator=torch.Generator().manual_seed(0))
    layers = [1, 3, 4, 2][: shape.num_layers]  # any choice of the four
    kept = select_indices(scores, teacher_shape, shape, sorted(layers))
    sorted_model = SortedModel(load_transformers(teacher), teacher_shape, scores)
    memory = {p.untyped_storage().data_ptr() for p in sorted_model._model.parameters()}
    actual = predicted_log_probs(sorted_model.predictor(shape, kept.layers), tokens)
    if "num_attention_heads" not in targets:  # pruning heads within groups copies weights
        assert {p.untyped_storage().data_ptr() for p in sorted_model._model.parameters()} <= memory
    pruned = as_transformers(
        teacher, shape, prune_weights(teacher, kept, teacher_shape.kv_channels)
    )
    unpruned = predicted_log_probs(sorted_model.predictor(teacher_shape, [1, 2, 3, 4]), tokens)
    for log_probs, model in ((actual, pruned), (unpruned, load_transformers(teacher))):
        expected = reference_log_probs(model, tokens)
        noise = measure_ulp_noise(model, lambda model=model: reference_log_probs(model, tokens))
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=ROUNDINGS * noise)


def predicted_log_probs(model: Predictor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities of every next token, computed by ``recipes.evaluation``."""
    return log_probabilities(compute_states(model, TextSequences.of(tokens), 1), slice(None))


@torch.no_grad()
def reference_log_probs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities of every next token, computed by transformers."""
    logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1).log_softmax(-1)


def as_transformers(teacher: Path, shape: Architecture, weights: dict[str, torch.Tensor]) -> Any:
    config = AutoConfig.for_model(**with_shape(nemo.read_config(teacher), shape))
    model = AutoModelForCausalLM.from_config(config).float()
    model.load_state_dict(weights)
    return model.eval()


def test_candidates_are_ranked_and_counted(ranked_run: Path) -> None:
    result = manifest_of(ranked_run, "rank_candidates").result(SearchResult)
    candidates = result.candidates
    teacher = manifest_of(ranked_run, "import_hf").parameters
    assert teacher is not None
    assert result.budget == {"parameters": 0.75}
    enumerated = manifest_of(ranked_run, "enumerate_shapes").result(PlanResult)
    assert len(candidates) == enumerated.summary["shapes"]
    proxies = [c.proxy for c in candidates]
    assert [c.healed for c in candidates] == [True] * 2 + [False] * (len(candidates) - 2)
    for group in (proxies[:2], proxies[2:]):  # healed candidates come first
        assert group == sorted(group)
    assert all(c.proxy == c.kl_to_teacher > 0 for c in candidates)
    assert all(0.4 * teacher < c.parameters <= 0.75 * teacher for c in candidates)
    assert any(c.pareto for c in candidates)


@pytest.mark.parametrize(("healed", "fix"), [(True, "num_healed=0"), (False, "precision=32")])
def test_a_proxy_that_is_nan_is_refused(ranked_run: Path, healed: bool, fix: str) -> None:
    shape = nemo.architecture_of(nemo.find_checkpoint(ranked_run / "import_hf" / ARTIFACT))
    with pytest.raises(RecipeError, match=f"not a number(?s:.*){fix}"):
        _candidate(RankCandidatesConfig(), shape, TokenQuality(9.0, math.nan), healed)


@pytest.mark.parametrize("healed", [True, False])
def test_candidates_have_the_metrics_of_pruned_models(ranked_run: Path, healed: bool) -> None:
    """Prunes and heals a candidate again, and computes its metrics from all logits."""
    candidates = manifest_of(ranked_run, "rank_candidates").result(SearchResult).candidates
    candidate = next(c for c in candidates if c.healed == healed)
    teacher = nemo.find_checkpoint(ranked_run / "import_hf" / ARTIFACT)
    importance = Importance.load(ranked_run / "score" / ARTIFACT)
    teacher_shape = nemo.architecture_of(teacher)
    layers = layers_to_keep(importance, "loss", candidate.shape.num_layers)
    kept = select_indices(importance.widths, teacher_shape, candidate.shape, layers)
    weights = prune_weights(teacher, kept, teacher_shape.kv_channels)
    if healed:
        text = first_sequences(ranked_run / "prepare_data" / ARTIFACT, "calibration", 64, 8)
        heal_weights(teacher, candidate.shape, kept, weights, text.split(4), lambda *done: None)
    tokens = first_sequences(ranked_run / "prepare_data" / ARTIFACT, "validation", 64, 4)
    document_end = manifest_of(ranked_run, "prepare_data").result(DatasetResult).document_end
    # The first token of a document cannot be predicted from the document before it.
    mask = (tokens[:, :-1] != document_end).flatten()
    assert (~mask).sum() > 0
    expected = reference_log_probs(load_transformers(teacher), tokens)[mask]
    model = as_transformers(teacher, candidate.shape, weights)

    def kl_and_loss() -> torch.Tensor:
        actual = reference_log_probs(model, tokens)[mask]
        kl = kl_div(actual, expected, log_target=True, reduction="batchmean")
        return torch.stack([kl, nll_loss(actual, tokens[:, 1:].flatten()[mask])])

    metrics = torch.tensor([candidate.kl_to_teacher, math.log(candidate.perplexity)])
    exact, noise = kl_and_loss(), measure_ulp_noise(model, kl_and_loss)
    torch.testing.assert_close(metrics, exact, rtol=0, atol=ROUNDINGS * noise)


SPACE = Space(1, 8, 8, max_depth_pruning=0.75)
SERVICE = Service(precision="fp32", context_length=64)


@pytest.fixture(scope="module")
def timed_manifest(ranked_run: Path) -> Manifest:
    """Times engines by their fastest repetition, because other processes disturb the median."""

    def fastest(row: BenchmarkRow) -> float:
        milliseconds = 1e3 * row.batch_size / row.decode_tokens_per_second.high
        assert milliseconds <= step_ms(row)
        return milliseconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_latency, "step_ms", fastest)
        run_stage(
            measure_latency, ranked_run, {"checkpoint": "import_hf"}, space=SPACE, service=SERVICE,
            repetitions=9,
        )  # fmt: skip
    return manifest_of(ranked_run, "measure_latency")


def test_measured_latency_changes_the_shapes_within_a_budget(
    ranked_run: Path, timed_manifest: Manifest
) -> None:
    latency = timed_manifest.result(LatencyResult)
    # The teacher, shapes with one of three axes at the minimum, and with all; the middle shape.
    assert [shape.is_fitted for shape in latency.shapes] == [True] * 5 + [False]
    teacher, smallest = latency.shapes[0], latency.shapes[4]
    assert smallest.step_ms < teacher.step_ms
    assert teacher.fitted_ms == pytest.approx(teacher.step_ms, rel=0.5)
    cfg = EnumerateShapesConfig(budget=Budget(latency_ms=0.8), space=SPACE, service=SERVICE)
    inputs = {"latency": Input(ranked_run, timed_manifest)}
    shape = nemo.architecture_of(nemo.find_checkpoint(ranked_run / "import_hf" / ARTIFACT))
    measured = cfg.with_measured_latency(inputs)
    assert measured.service.measured is not None
    assert measured.shapes(shape) != cfg.shapes(shape) != []


def two_rank_search(also: list[str]) -> SuccessiveHalvingConfig:
    """Returns a search that trains two candidates, each on two ranks."""
    training = DistillConfig(
        seq_length=64, limit_val_batches=1, lr=1e-3, tensor_model_parallel_size=2,
        resources=Resources(devices=2),
    )  # fmt: skip
    return SuccessiveHalvingConfig(
        num_candidates=2,
        also=also,
        num_samples=4,
        max_tokens=4096,
        distill=training,
        stage="successive_halving",
    )


def pass_deadline_during_load(patch: pytest.MonkeyPatch) -> list[Path]:
    """Lets the deadline pass when a checkpoint is loaded; returns a list of the loaded ones."""
    loaded: list[Path] = []

    def load_slowly(checkpoint: Path, *arguments: Any) -> Any:
        loaded.append(checkpoint)
        patch.setenv(DEADLINE, "1")  # seconds since 1970, so the deadline has passed
        return load_transformers(checkpoint, *arguments)

    patch.setattr(text_quality, "load_transformers", load_slowly)
    return loaded


def test_a_killed_search_resumes_and_writes_the_winner_as_a_recipe(
    ranked_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = manifest_of(ranked_run, "rank_candidates").result(SearchResult).candidates
    cfg = two_rank_search(also=[ranked[1].name])  # already among the best-ranked two
    names = {**TEACHER_INPUTS, "data": "prepare_data", "candidates": "rank_candidates"}
    inputs = {n: Input(ranked_run / s, manifest_of(ranked_run, s)) for n, s in names.items()}
    out = tmp_path / "successive_halving" / "work" / ARTIFACT
    out.mkdir(parents=True)
    started: list[str] = []  # modules of stages, and "killed"
    start = stage_process.start_process

    def start_or_kill(command: list[str], log: IO[bytes], env: dict[str, str]) -> Any:
        """Starts the first stage in a process, forks other stages, interrupts before the fourth."""
        if len(started) == 3 and "killed" not in started:
            started.append("killed")
            raise KeyboardInterrupt
        started.append(command[-2])
        return start(command, log, env) if len(started) == 1 else fork_command(command, env, log)

    monkeypatch.setattr(stage_process, "start_process", start_or_kill)
    with pytest.raises(RecipeError, match="also=l9-h9"):
        successive_halving.run(replace(cfg, also=["l9-h9"]), inputs, out)
    with pytest.raises(KeyboardInterrupt):
        successive_halving.run(cfg, inputs, out)
    with monkeypatch.context() as patch:
        patch.setenv(DEADLINE, "1")
        with pytest.raises(StoppedByDeadlineError, match="before round-0 of"):
            successive_halving.run(cfg, inputs, out)
    with monkeypatch.context() as patch:
        loaded = pass_deadline_during_load(patch)
        with pytest.raises(StoppedByDeadlineError, match="before measuring"):
            successive_halving.run(cfg, inputs, out)
        assert len(loaded) == 1  # the teacher
    result = successive_halving.run(cfg, inputs, out).result
    assert isinstance(result, SearchResult)
    prune, train = "recipes.stages.prune", "recipes.stages.distill"
    assert started == [prune, train, prune, "killed", train]

    trained = [c for c in result.candidates if c.tokens]
    assert [c.name for c in trained] == [c.name for c in ranked[:2]]
    assert {c.tokens for c in trained} == {2048}
    # Both trained candidates were healed before the ranking, but trained without healing. So they
    # are compared with candidates that were only pruned.
    pruned_kl = min(c.kl_to_teacher for c in ranked if not c.healed)
    for candidate, untrained in zip(trained, ranked, strict=False):
        assert candidate.kl_to_teacher < pruned_kl
        assert candidate.proxy == untrained.proxy
    [winner] = [c for c in result.candidates if c.chosen]
    assert winner.kl_to_teacher == min(c.kl_to_teacher for c in trained)
    recipe = OmegaConf.load(out / "recipe.yaml")
    settings = recipe.stages.prune.items()
    sizes = {n.removeprefix("target_"): size for n, size in settings if n.startswith("target_")}
    teacher = nemo.architecture_of(nemo.find_checkpoint(ranked_run / "import_hf" / ARTIFACT))
    assert pruned_shape(teacher, PruneTargets(**sizes)) == winner.shape


def test_a_diverging_training_names_settings_of_the_search(
    ranked_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(command: list[str], log: IO[bytes], env: dict[str, str]) -> Any:
        return fork_command(command, env, log)

    monkeypatch.setattr(stage_process, "start_process", start)
    names = {**TEACHER_INPUTS, "data": "prepare_data", "candidates": "rank_candidates"}
    inputs = {n: Input(ranked_run / s, manifest_of(ranked_run, s)) for n, s in names.items()}
    cfg = two_rank_search(also=[])
    cfg = replace(cfg, distill=replace(cfg.distill, lr=1e38))
    cfg.name = "second_search"
    out = tmp_path / "work" / ARTIFACT
    out.mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"stages\.second_search\.distill\.lr"):
        successive_halving.run(cfg, inputs, out)


def test_the_report_shows_timed_shapes(
    ranked_run: Path, timed_manifest: Manifest, tmp_path: Path
) -> None:
    ranked = manifest_of(ranked_run, "rank_candidates")
    search = replace(ranked, inputs={**ranked.inputs, "latency": timed_manifest.fingerprint})
    inputs = {
        "teacher": Input(ranked_run / "import_hf", manifest_of(ranked_run, "import_hf")),
        "search": Input(ranked_run / "rank_candidates", search),
    }
    out = make_artifact_folder(tmp_path, "report")
    report.run(ReportConfig(title="search"), inputs, out)
    text = (out / REPORT_FILE).read_text()
    table = text[text.index('id="table-latency"') :].partition("</table>")[0]
    for shape in timed_manifest.result(LatencyResult).shapes:
        assert f">{shape.name}</th>" in table
        assert f'value="{json.dumps(shape.step_ms)}"' in table
