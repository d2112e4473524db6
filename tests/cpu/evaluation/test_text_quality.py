"""Stage ``evaluate``: which predictions count, metrics by source, several ranks, and memory."""

from __future__ import annotations

import json
import pickle
import weakref
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_convert.hf import load_causal_lm
from recipes.core.errors import RecipeError
from recipes.core.stage import Input
from recipes.data.results import DatasetResult, SourceTokens
from recipes.data.settings import PrepareDataConfig
from recipes.data.token_sequences import read_loss_mask, read_tokens
from recipes.evaluation import predictions, text_quality
from recipes.evaluation.results import ROLES, EvaluationResult
from recipes.evaluation.settings import EvaluateConfig
from recipes.evaluation.text_quality import Scores
from recipes.stages import evaluate, prepare_data
from tests.support.logits import LogitsWatch
from tests.support.manifests import bare_manifest
from tests.support.ranks import run_ranks
from tests.support.runs import make_artifact_folder
from tests.support.text import write_chats

LENGTH = 32
"""Tokens of a sequence."""
VOCABULARY = 293  # of the fixture ``models``
CONFIG = EvaluateConfig(seq_length=LENGTH, num_sequences=9, prompt_tokens=8, new_tokens=2)


@pytest.fixture(scope="module")
def data(
    models: dict[str, Any], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Input:
    """Returns a dataset of two sources: prose and numbers."""
    folder = tmp_path_factory.mktemp("data")
    paragraphs = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    (folder / "prose.txt").write_text("\n\n".join(text[:80] for text in paragraphs[:400]))
    (folder / "numbers.txt").write_text("\n\n".join(f"{n} " * 12 for n in range(100, 500)))
    return prepare_text(models, folder, [str(folder / "prose.txt"), str(folder / "numbers.txt")])


def prepare_text(
    models: dict[str, Any], folder: Path, sources: list[str], **settings: Any
) -> Input:
    """Runs ``prepare_data`` with the teacher's tokenizer; returns its output as an input."""
    manifest = SimpleNamespace(tokenizer_sha256="t")
    teacher = SimpleNamespace(**vars(models["teacher"]), manifest=manifest)
    out = make_artifact_folder(folder, "data")
    cfg = PrepareDataConfig(sources=sources, seq_length=LENGTH, **settings)
    result = prepare_data.run(cfg, {"tokenizer": teacher}, out).result
    assert isinstance(result, DatasetResult)
    return Input(out.parent, bare_manifest("prepare_data", "dataset", result))


def evaluate_models(
    models: dict[str, Any], data: Input, out: Path, cfg: EvaluateConfig = CONFIG
) -> EvaluationResult:
    result = evaluate.run(
        cfg, {**models, "data": data}, make_artifact_folder(out, "evaluate")
    ).result
    assert isinstance(result, EvaluationResult)
    return result


@pytest.fixture(scope="module")
def quality(
    models: dict[str, Any], data: Input, tmp_path_factory: pytest.TempPathFactory
) -> EvaluationResult:
    return evaluate_models(models, data, tmp_path_factory.mktemp("evaluated"))


def test_quality_is_measured_by_source(
    quality: EvaluationResult, models: dict[str, Any], data: Input, tmp_path: Path
) -> None:
    dataset = data.manifest.result(DatasetResult)
    for split, sources in dataset.source_tokens.items():
        assert [entry.source for entry in sources] == ["prose", "numbers"]
        assert sum(entry.tokens for entry in sources) == dataset.tokens[split]
    assert quality.sequences == 10  # num_sequences=9, rounded up to 5 for each of two sources
    assert {name: source.sequences for name, source in quality.sources.items()} == {
        "prose": 5,
        "numbers": 5,
    }
    assert quality.predictions == sum(s.predictions for s in quality.sources.values())
    for role in ROLES:
        losses = [getattr(quality.sources[name], role).loss for name in ("prose", "numbers")]
        assert quality.models()[role].loss == pytest.approx(sum(losses) / 2)
        assert abs(losses[0] - losses[1]) > 0.1  # otherwise, swapped sources would not fail

    # A dataset of one source has no metrics by source.
    merged = {"heldout": [SourceTokens("all", dataset.tokens["heldout"])]}
    one_source = bare_manifest("prepare_data", "dataset", replace(dataset, source_tokens=merged))
    evaluated = evaluate_models(models, Input(data.directory, one_source), tmp_path)
    assert (evaluated.sequences, evaluated.sources) == (9, {})


RANK_SCRIPT = """
import pickle, sys
from pathlib import Path
from recipes.core.stage import rank
from tests.cpu.evaluation.test_text_quality import evaluate_models
folder = Path(sys.argv[1])
models, data = pickle.loads((folder / "inputs").read_bytes())
result = evaluate_models(models, data, folder / str(rank()))
(folder / f"result-{rank()}").write_bytes(pickle.dumps(result))
"""


def test_three_ranks_measure_the_same_quality_as_one(
    quality: EvaluationResult, models: dict[str, Any], data: Input, tmp_path: Path
) -> None:
    (tmp_path / "ranks.py").write_text(RANK_SCRIPT)
    (tmp_path / "inputs").write_bytes(pickle.dumps((models, data)))
    run_ranks(str(tmp_path / "ranks.py"), str(tmp_path), number=3)  # 3 does not divide 10 sequences
    result = pickle.loads((tmp_path / "result-0").read_bytes())
    assert result.recovered == pytest.approx(quality.recovered, rel=1e-4)
    # The metrics over all sequences, then those of each source.
    for measured, expected in [
        (result, quality),
        *zip(result.sources.values(), quality.sources.values()),
    ]:
        for role in ROLES:
            actual_model, expected_model = getattr(measured, role), getattr(expected, role)
            for name in ("loss", "kl_to_teacher", "top1_agreement", "loss_standard_error"):
                approximately = pytest.approx(getattr(expected_model, name), rel=1e-4, abs=1e-6)
                assert getattr(actual_model, name) == approximately
    [details] = tmp_path.rglob("results.json")  # only rank 0 writes the file
    assert len(json.loads(details.read_text())["generations"]) == 3  # default num_generations


def test_more_ranks_than_sequences_are_refused(
    models: dict[str, Any], data: Input, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "11")  # one more than the 10 sequences of CONFIG
    cfg = replace(CONFIG, stage="evaluate")
    with pytest.raises(RecipeError, match=r"10 sequences.* 11 ranks") as refused:
        evaluate_models(models, data, tmp_path, cfg)
    assert "stages.evaluate.resources.devices=10" in str(refused.value)


def test_predictions_across_documents_do_not_count(
    quality: EvaluationResult, models: dict[str, Any], data: Input
) -> None:
    """Compares with metrics from all logits, masked at the last token of each document."""
    dataset = data.manifest.result(DatasetResult)
    tokens = torch.from_numpy(read_tokens(data.artifact, "heldout").astype("int64"))
    end = tokens[-1]  # the token that ends each document
    # Evaluation uses the first 5 whole sequences of each source, and none that spans both sources.
    # So those of the second source start at (tokens of the first source) / LENGTH, rounded up.
    second = -(-dataset.source_tokens["heldout"][0].tokens // LENGTH)
    starts = [LENGTH * (first + n) for first in (0, second) for n in range(5)]
    sequences = torch.stack([tokens[start : start + LENGTH] for start in starts])
    counted = sequences[:, :-1] != end  # the token after ``end`` is not predicted
    assert counted.numel() == quality.tokens - quality.sequences  # no prediction at the last token
    assert quality.predictions == counted.sum() < counted.numel()
    for role, model in quality.models().items():
        metrics = [model.loss, model.kl_to_teacher, model.top1_agreement]
        assert metrics == pytest.approx(exact_metrics(models, sequences, counted, role), abs=1e-5)


def exact_metrics(
    models: dict[str, Any], sequences: torch.Tensor, counted: torch.Tensor, role: str
) -> list[float]:
    """Returns loss, KL and agreement as means over sequences, from logits of all positions.

    ``sequences`` has tokens [n, LENGTH]. ``counted`` says whether the prediction of the next token
    counts, bool [n, LENGTH - 1].
    """
    metrics = []
    with torch.no_grad():
        logits, teacher_logits = (
            load_causal_lm(models[name].hf)(sequences).logits[:, :-1] for name in (role, "teacher")
        )
    for number, mask in enumerate(counted):
        scores, teacher_scores = logits[number][mask], teacher_logits[number][mask]
        target = teacher_scores.log_softmax(-1)
        metrics.append(
            [
                cross_entropy(scores, sequences[number, 1:][mask]),
                kl_div(scores.log_softmax(-1), target, log_target=True, reduction="batchmean"),
                (scores.argmax(-1) == teacher_scores.argmax(-1)).float().mean(),
            ]
        )
    means: list[float] = torch.tensor(metrics).mean(dim=0).tolist()
    return means


def test_only_answers_of_conversations_count(
    models: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    """Also tests that no text is generated with ``num_generations=0``."""
    (tmp_path / "prose.txt").write_text("\n\n".join(f"a line, the {n}th" for n in range(99)))
    chats = write_chats(tmp_path / "chats.jsonl", text_file, length=6)
    data = prepare_text(models, tmp_path, [chats], heldout_sources=[str(tmp_path / "prose.txt")])
    dataset = data.manifest.result(DatasetResult)
    prose, conversations = dataset.source_tokens["heldout"]
    loss_mask = read_loss_mask(data.artifact, "heldout")
    assert loss_mask is not None
    tokens = torch.from_numpy(read_tokens(data.artifact, "heldout").astype("int64"))
    # Index of the first sequence that has only conversations (rounded up), and of the end.
    first = -(-prose.tokens // LENGTH)
    stop = (prose.tokens + conversations.tokens) // LENGTH
    sequences, in_answer = (
        values[first * LENGTH : stop * LENGTH].view(-1, LENGTH)[:4]
        for values in (tokens, torch.tensor(loss_mask))
    )
    counted = in_answer[:, 1:]  # whether the predicted token is in an answer
    cfg = replace(CONFIG, num_sequences=8, num_generations=0)  # 4 sequences of each source
    chats_quality = evaluate_models(models, data, tmp_path, cfg).sources["chats"]
    assert (chats_quality.sequences, chats_quality.predictions) == (4, counted.sum())
    assert 0.3 < counted.float().mean() < 0.9  # the sequences have both user and assistant turns
    for role in ROLES:
        model = getattr(chats_quality, role)
        metrics = [model.loss, model.kl_to_teacher, model.top1_agreement]
        assert metrics == pytest.approx(exact_metrics(models, sequences, counted, role), abs=1e-5)
    [details] = tmp_path.rglob("results.json")
    assert json.loads(details.read_text())["generations"] == []
    with pytest.raises(RecipeError, match=rf"seq_length=16.* {LENGTH}"):
        evaluate_models(models, data, tmp_path / "shorter", replace(CONFIG, seq_length=16))


def test_memory_holds_one_model_and_logits_of_few_positions(
    quality: EvaluationResult,
    models: dict[str, Any],
    data: Input,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[weakref.ref[Any]] = []
    load = text_quality.load_transformers

    def load_if_no_other_is_loaded(*arguments: Any) -> Any:
        # The weak reference to a freed model returns None.
        assert all(reference() is None for reference in loaded)
        model = load(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(text_quality, "load_transformers", load_if_no_other_is_loaded)
    # Allows float32 logits (4 bytes each) of 50 positions at once.
    monkeypatch.setattr(predictions, "LOGITS_BYTES", 4 * VOCABULARY * 50)
    with LogitsWatch(VOCABULARY) as watch:
        quality_in_chunks = evaluate_models(models, data, tmp_path)
    assert len(loaded) == len(ROLES)
    assert watch.max_positions == 50
    for role in ROLES:
        at_once, in_chunks = (asdict(q.models()[role]) for q in (quality, quality_in_chunks))
        assert in_chunks == pytest.approx(at_once, abs=1e-6, rel=1e-6)


def test_metrics_in_bfloat16_are_near_those_in_float32(
    quality: EvaluationResult, models: dict[str, Any], data: Input, tmp_path: Path
) -> None:
    in_bfloat16 = evaluate_models(models, data, tmp_path, replace(CONFIG, precision="bf16-mixed"))
    assert in_bfloat16.dtype_name == "bfloat16"
    assert in_bfloat16.predictions == quality.predictions
    assert in_bfloat16.teacher.kl_to_teacher == 0
    for role in ROLES:
        expected, actual = quality.models()[role], in_bfloat16.models()[role]
        assert 0 < abs(actual.loss - expected.loss) < 0.01  # 0 would mean float32
        assert actual.kl_to_teacher == pytest.approx(expected.kl_to_teacher, abs=0.01)
        assert actual.top1_agreement == pytest.approx(expected.top1_agreement, abs=0.03)


def test_recovered_is_the_fraction_of_the_added_loss_that_distillation_removed() -> None:
    """Pruning adds 1 to each loss. Distillation removes 0.75 of it."""
    losses = {"teacher": [3.0, 3.25, 2.75], "pruned": [4.0, 4.25, 3.75]}
    losses["distilled"] = [3.25, 3.5, 3.0]
    scores = {role: Scores(values) for role, values in losses.items()}
    assert text_quality._recovered(scores) == 0.75


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_tied_head_may_be_missing_from_the_weights(odd_llama: Path, tied: bool) -> None:
    config = LlamaConfig.from_pretrained(odd_llama, tie_word_embeddings=tied)
    weights = LlamaForCausalLM(config).state_dict()
    head = weights.pop("lm_head.weight")
    refusal = pytest.raises(ValueError, match=r"lm_head\.weight")
    with nullcontext() if tied else refusal:
        model = text_quality.with_weights(config, weights.items(), torch.float32)
        assert torch.equal(model.lm_head.weight.cpu(), head)
