"""Runs a search, from its ranking to the chosen recipe: real pruning, training and engines."""

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
from tests.support.pages import table
from tests.support.ranks import fork_command
from tests.support.rounding import NOISE_FACTOR, measure_ulp_noise
from tests.support.runs import make_artifact_folder, manifest_of

TARGETS: list[dict[str, Any]] = [
    {"num_layers": 3},
    {"hidden_size": 48, "ffn_hidden_size": 72},
    {"num_attention_heads": 2, "num_layers": 2},
    {"num_query_groups": 1, "hidden_size": 40},
]
"""Sizes that are smaller than those of the teacher, see ``EVEN``."""


def run_stage(module: Any, run_dir: Path, inputs: dict[str, str], **settings: Any) -> None:
    """Runs a stage of a run in this process; ``inputs`` maps input names to earlier stages."""
    name = module.__name__.rpartition(".")[2]
    config = module.STAGE.config(stage=name, inputs=inputs, **settings)
    run_here(config, run_dir / name, {key: run_dir / source for key, source in inputs.items()})


TEACHER_INPUTS = {"checkpoint": "import_hf", "importance": "score"}
"""Stages that make a search's inputs about the teacher, by input name."""
HALVING_INPUTS = {**TEACHER_INPUTS, "data": "prepare_data", "candidates": "rank_candidates"}
"""Stages that make the inputs of ``successive_halving``, by input name."""


def inputs_of(run_dir: Path, **stages: str) -> dict[str, Input]:
    """Returns complete stages of a run, given by input name, as inputs of another stage."""
    return {n: Input(run_dir / s, manifest_of(run_dir, s)) for n, s in stages.items()}


@pytest.fixture(scope="module")
def ranked_run(even_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run that ended with ``rank_candidates``."""
    run, length = tmp_path_factory.mktemp("search"), {"seq_length": 64}
    # Every number of layers is allowed; hidden and feed-forward sizes are multiples of 8.
    space = Space(num_layers_divisor=1, hidden_size_divisor=8, ffn_hidden_size_divisor=8)
    model = {"hf_path": str(even_llama)}
    run_stage(import_hf, run, {}, **model)
    source = {"sources": [str(text_file)], "text_field": "text"}
    run_stage(prepare_data, run, {"tokenizer": "import_hf"}, **source, **length)
    budget = Budget(parameters=0.75)  # fraction of the teacher's
    run_stage(enumerate_shapes, run, {}, **model, space=space, budget=budget)
    inputs = {"checkpoint": "import_hf", "calibration": "prepare_data"}
    run_stage(score, run, inputs, num_calibration_samples=8, num_loss_samples=4, **length)
    inputs = {**TEACHER_INPUTS, "data": "prepare_data", "shapes": "enumerate_shapes"}
    settings = {"num_samples": 4, "num_healed": 2, "num_calibration_samples": 8}
    run_stage(rank_candidates, run, inputs, **settings, **length)
    return run


@pytest.mark.parametrize("targets", TARGETS)
def test_views_of_sorted_weights_have_the_logits_of_pruned_models(
    ranked_run: Path, targets: dict[str, Any]
) -> None:
    """``SortedModel`` slices sorted weights. It must equal a model with pruned copies of them."""
    teacher = nemo.find_checkpoint(ranked_run / "import_hf" / ARTIFACT)
    scores = Importance.load(ranked_run / "score" / ARTIFACT).widths
    teacher_shape = nemo.architecture_of(teacher)
    shape = pruned_shape(teacher_shape, PruneTargets(**targets))
    # Two sequences of 32 tokens, all below the vocabulary size of 294.
    tokens = torch.randint(280, (2, 32), generator=torch.Generator().manual_seed(0))
    layers = [1, 3, 4, 2][: shape.num_layers]  # which of the four layers are kept is arbitrary
    kept = select_indices(scores, teacher_shape, shape, sorted(layers))
    sorted_model = SortedModel(load_transformers(teacher), teacher_shape, scores)
    sorted_storages = storage_addresses(sorted_model)
    pruned_log_probs = predicted_log_probs(sorted_model.predictor(shape, kept.layers), tokens)
    if "num_attention_heads" not in targets:  # pruning heads within groups copies weights
        assert storage_addresses(sorted_model) <= sorted_storages
    pruned = as_transformers(
        teacher, shape, prune_weights(teacher, kept, teacher_shape.kv_channels)
    )
    # After pruning, the sorted model can take the teacher's shape again.
    all_layers = sorted_model.predictor(teacher_shape, [1, 2, 3, 4])
    teacher_log_probs = predicted_log_probs(all_layers, tokens)
    for log_probs, model in (
        (pruned_log_probs, pruned),
        (teacher_log_probs, load_transformers(teacher)),
    ):
        expected = reference_log_probs(model, tokens)
        noise = measure_ulp_noise(model, lambda model=model: reference_log_probs(model, tokens))
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=NOISE_FACTOR * noise)


def storage_addresses(model: SortedModel) -> set[int]:
    """Returns the addresses of the storages of a model's weights; a view has that of its base."""
    return {weight.untyped_storage().data_ptr() for weight in model._model.parameters()}


def predicted_log_probs(model: Predictor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns log-probabilities [b * (s - 1), v] of next tokens, by ``recipes.evaluation``."""
    return log_probabilities(compute_states(model, TextSequences.of(tokens), 1), slice(None))


@torch.no_grad()
def reference_log_probs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Returns log-probabilities [b * (s - 1), v] of next tokens, by transformers."""
    logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1).log_softmax(-1)


def as_transformers(teacher: Path, shape: Architecture, weights: dict[str, torch.Tensor]) -> Any:
    """Returns a transformers model of a shape, with Hugging Face weights, in float32."""
    config = AutoConfig.for_model(**with_shape(nemo.read_config(teacher), shape))
    model = AutoModelForCausalLM.from_config(config).float()
    model.load_state_dict(weights)
    return model.eval()


def test_candidates_are_ranked_and_counted(ranked_run: Path) -> None:
    result = manifest_of(ranked_run, "rank_candidates").result(SearchResult)
    candidates = result.candidates
    teacher = manifest_of(ranked_run, "import_hf").parameters
    assert teacher is not None
    assert result.budget == {"parameters": pytest.approx(0.75 * teacher)}
    enumerated = manifest_of(ranked_run, "enumerate_shapes").result(PlanResult)
    assert len(candidates) == enumerated.summary["shapes"]
    proxies = [c.proxy for c in candidates]
    # ``num_healed`` is 2. Healed candidates come first; each group is sorted by proxy.
    assert [c.healed for c in candidates] == [True] * 2 + [False] * (len(candidates) - 2)
    for group in (proxies[:2], proxies[2:]):
        assert group == sorted(group)
    assert all(c.proxy == c.kl_to_teacher > 0 for c in candidates)
    assert all(0.4 * teacher < c.parameters <= 0.75 * teacher for c in candidates)
    assert any(c.pareto for c in candidates)


@pytest.mark.parametrize(("healed", "fix"), [(True, "num_healed=0"), (False, "precision=32")])
def test_a_proxy_that_is_nan_is_refused(ranked_run: Path, healed: bool, fix: str) -> None:
    """The proxy is the setting's default metric, the KL to the teacher."""
    shape = nemo.architecture_of(nemo.find_checkpoint(ranked_run / "import_hf" / ARTIFACT))
    quality = TokenQuality(perplexity=9.0, kl_to_teacher=math.nan)
    with pytest.raises(RecipeError, match=f"not a number(?s:.*){fix}"):
        _candidate(RankCandidatesConfig(), shape, quality, healed)


@pytest.mark.parametrize("healed", [True, False])
def test_candidates_have_the_metrics_of_pruned_models(ranked_run: Path, healed: bool) -> None:
    """Prunes a candidate again, heals it if it was healed, and computes its metrics from logits."""
    candidates = manifest_of(ranked_run, "rank_candidates").result(SearchResult).candidates
    candidate = next(c for c in candidates if c.healed == healed)
    teacher = nemo.find_checkpoint(ranked_run / "import_hf" / ARTIFACT)
    importance = Importance.load(ranked_run / "score" / ARTIFACT)
    teacher_shape = nemo.architecture_of(teacher)
    layers = layers_to_keep(importance, "loss", candidate.shape.num_layers)
    kept = select_indices(importance.widths, teacher_shape, candidate.shape, layers)
    weights = prune_weights(teacher, kept, teacher_shape.kv_channels)
    if healed:
        # As in ``ranked_run``: 8 calibration sequences of 64 tokens, and below, 4 for validation.
        text = first_sequences(ranked_run / "prepare_data" / ARTIFACT, "calibration", 64, 8)
        heal_weights(teacher, candidate.shape, kept, weights, text.split(4), lambda *progress: None)
    tokens = first_sequences(ranked_run / "prepare_data" / ARTIFACT, "validation", 64, 4)
    document_end = manifest_of(ranked_run, "prepare_data").result(DatasetResult).document_end
    # The first token of a document cannot be predicted from the document before it.
    mask = (tokens[:, :-1] != document_end).flatten()  # True: the next token counts
    assert (~mask).sum() > 0
    expected = reference_log_probs(load_transformers(teacher), tokens)[mask]
    model = as_transformers(teacher, candidate.shape, weights)

    def kl_and_loss() -> torch.Tensor:
        """Returns the candidate's KL to the teacher and its LM loss, in nats."""
        actual = reference_log_probs(model, tokens)[mask]
        kl = kl_div(actual, expected, log_target=True, reduction="batchmean")
        return torch.stack([kl, nll_loss(actual, tokens[:, 1:].flatten()[mask])])

    metrics = torch.tensor([candidate.kl_to_teacher, math.log(candidate.perplexity)])
    exact, noise = kl_and_loss(), measure_ulp_noise(model, kl_and_loss)
    torch.testing.assert_close(metrics, exact, rtol=0, atol=NOISE_FACTOR * noise)


SPACE = Space(
    num_layers_divisor=1, hidden_size_divisor=8, ffn_hidden_size_divisor=8, max_depth_pruning=0.75
)
SERVICE = Service(precision="fp32", context_length=64)


@pytest.fixture(scope="module")
def timed_manifest(ranked_run: Path) -> Manifest:
    """Manifest of ``measure_latency``. Its times are those of the fastest repetitions.

    The stage uses the median. In tests, other processes disturb the median too much.
    """

    def fastest_step_ms(row: BenchmarkRow) -> float:
        milliseconds = 1e3 * row.batch_size / row.decode_tokens_per_second.high
        assert milliseconds <= step_ms(row)  # the fastest step takes at most the median time
        return milliseconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_latency, "step_ms", fastest_step_ms)
        run_stage(
            measure_latency, ranked_run, {"checkpoint": "import_hf"}, space=SPACE, service=SERVICE,
            repetitions=9,
        )  # fmt: skip
    return manifest_of(ranked_run, "measure_latency")


def test_measured_latency_changes_the_shapes_within_a_budget(
    ranked_run: Path, timed_manifest: Manifest
) -> None:
    latency = timed_manifest.result(LatencyResult)
    # The latency model is fitted to five shapes: the teacher, three shapes with one axis at its
    # minimum, and the shape with all axes at their minimum. The middle shape checks the fit.
    assert [shape.is_fitted for shape in latency.shapes] == [True] * 5 + [False]
    teacher, smallest = latency.shapes[0], latency.shapes[4]
    assert smallest.step_ms < teacher.step_ms
    assert teacher.fitted_ms == pytest.approx(teacher.step_ms, rel=0.5)
    budget = Budget(latency_ms=0.8)  # at most 1, so a fraction of the teacher's latency
    cfg = EnumerateShapesConfig(budget=budget, space=SPACE, service=SERVICE)
    inputs = {"latency": Input(ranked_run, timed_manifest)}
    shape = nemo.architecture_of(nemo.find_checkpoint(ranked_run / "import_hf" / ARTIFACT))
    measured_cfg = cfg.with_measured_latency(inputs)
    assert measured_cfg.service.measured is not None
    roofline_shapes = cfg.shapes(shape)
    assert roofline_shapes != []
    assert measured_cfg.shapes(shape) != roofline_shapes


def two_rank_search(also: list[str]) -> SuccessiveHalvingConfig:
    """Returns the settings of a search that trains two candidates, each on two ranks.

    ``also`` names candidates that are trained besides the two with the best ranks.
    """
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
    """Makes the deadline pass when a checkpoint is loaded; returns a list that gets each load."""
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
    inputs = inputs_of(ranked_run, **HALVING_INPUTS)
    out = make_artifact_folder(tmp_path, "successive_halving")
    started: list[str] = []  # modules of the started stages, and "killed" for the interruption
    start = stage_process.start_process

    def start_or_kill(command: list[str], log: IO[bytes], env: dict[str, str]) -> Any:
        """Starts a stage; raises ``KeyboardInterrupt`` once, before the fourth.

        The first stage runs in a new process, others in forks, which start faster.
        """
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
    assert {c.tokens for c in trained} == {2048}  # half of ``max_tokens``
    # Both trained candidates were healed for the ranking, but their training started from weights
    # that were only pruned. So their KL is compared with that of candidates that were not healed.
    pruned_kl = min(c.kl_to_teacher for c in ranked if not c.healed)
    for candidate, ranked_candidate in zip(trained, ranked, strict=False):  # only the first two
        assert candidate.kl_to_teacher < pruned_kl
        assert candidate.proxy == ranked_candidate.proxy
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
    """A diverging ``distill`` of a search must not be reported as ``stages.distill.lr``."""
    monkeypatch.setattr(
        stage_process, "start_process", lambda command, log, env: fork_command(command, env, log)
    )
    cfg = two_rank_search(also=[])
    cfg = replace(cfg, distill=replace(cfg.distill, lr=1e38))  # the first update overflows
    cfg.name = "second_search"
    out = make_artifact_folder(tmp_path, "second_search")
    with pytest.raises(RecipeError, match=r"stages\.second_search\.distill\.lr"):
        successive_halving.run(cfg, inputs_of(ranked_run, **HALVING_INPUTS), out)


def test_the_report_shows_timed_shapes(
    ranked_run: Path, timed_manifest: Manifest, tmp_path: Path
) -> None:
    """The report looks for the latency model among the inputs of earlier stages."""
    ranking = manifest_of(ranked_run, "rank_candidates")
    ranking = replace(ranking, inputs={**ranking.inputs, "latency": timed_manifest.fingerprint})
    inputs = inputs_of(ranked_run, teacher="import_hf")
    inputs["search"] = Input(ranked_run / "rank_candidates", ranking)
    out = make_artifact_folder(tmp_path, "report")
    report.run(ReportConfig(title="search"), inputs, out)
    text = (out / REPORT_FILE).read_text()
    shapes = table(text, "latency")
    for shape in timed_manifest.result(LatencyResult).shapes:
        assert f">{shape.name}</th>" in shapes
        assert f'value="{json.dumps(shape.step_ms)}"' in shapes
