"""Quality on text: which predictions count, and what is said of each source."""

from __future__ import annotations

import json
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from nemo_convert.hf import load_causal_lm
from recipes.core.stage import Input
from recipes.data.results import DatasetResult
from recipes.data.settings import PrepareDataConfig
from recipes.data.token_windows import read_tokens
from recipes.evaluation import predictions, text_quality
from recipes.evaluation.results import ROLES, EvaluationResult
from recipes.evaluation.settings import EvaluateConfig
from recipes.evaluation.text_quality import Scores
from recipes.stages import evaluate, prepare_data
from tests.support.logits import LogitsWatch
from tests.support.manifests import bare_manifest
from tests.support.runs import stage_dir

LENGTH, VOCABULARY = 32, 293
CONFIG = EvaluateConfig(seq_length=LENGTH, num_windows=9, prompt_tokens=8, new_tokens=2)


@pytest.fixture(scope="module")
def data(
    models: dict[str, Any], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Input:
    """Prose and numbers, as ``prepare_data`` leaves them."""
    folder = tmp_path_factory.mktemp("data")
    paragraphs = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    (folder / "prose.txt").write_text("\n\n".join(text[:80] for text in paragraphs[:400]))
    (folder / "numbers.txt").write_text("\n\n".join(f"{n} " * 12 for n in range(100, 500)))
    sources = [str(folder / "prose.txt"), str(folder / "numbers.txt")]
    teacher = SimpleNamespace(**vars(models["teacher"]), manifest=SimpleNamespace())
    teacher.manifest.tokenizer_sha256 = "t"
    out = stage_dir(folder, "data")
    prepared = prepare_data.run(
        PrepareDataConfig(sources=sources, seq_length=LENGTH), {"tokenizer": teacher}, out
    ).result
    assert isinstance(prepared, DatasetResult)
    return Input(out.parent, bare_manifest("prepare_data", "dataset", prepared))


def evaluated(
    models: dict[str, Any], data: Input, out: Path, cfg: EvaluateConfig = CONFIG
) -> EvaluationResult:
    result = evaluate.run(cfg, {**models, "data": data}, stage_dir(out, "evaluate")).result
    assert isinstance(result, EvaluationResult)
    return result


@pytest.fixture(scope="module")
def found(
    models: dict[str, Any], data: Input, tmp_path_factory: pytest.TempPathFactory
) -> EvaluationResult:
    return evaluated(models, data, tmp_path_factory.mktemp("evaluated"))


def test_quality_is_measured_by_source(
    found: EvaluationResult, models: dict[str, Any], data: Input, tmp_path: Path
) -> None:
    prepared = data.manifest.result(DatasetResult)
    for part, lengths in prepared.source_tokens.items():
        assert [entry.source for entry in lengths] == ["prose", "numbers"]
        assert sum(entry.tokens for entry in lengths) == prepared.tokens[part]
    assert found.windows == 10
    assert {name: source.windows for name, source in found.sources.items()} == {
        "prose": 5,
        "numbers": 5,
    }
    assert found.predictions == sum(s.predictions or 0 for s in found.sources.values())
    for role in ROLES:
        losses = [getattr(found.sources[name], role).loss for name in ("prose", "numbers")]
        assert found.models()[role].loss == pytest.approx(sum(losses) / 2)
        assert abs(losses[0] - losses[1]) > 0.1

    # Without the second source there is nothing to tell apart.
    older = replace(prepared, source_tokens={})
    alone = Input(data.directory, bare_manifest("prepare_data", "dataset", older))
    one = evaluated(models, alone, tmp_path)
    assert (one.windows, one.sources) == (9, {})


def test_what_follows_a_document_is_not_measured(
    found: EvaluationResult, models: dict[str, Any], data: Input
) -> None:
    """Window by window and with whole logits, as training counts."""
    prepared = data.manifest.result(DatasetResult)
    tokens = torch.from_numpy(read_tokens(data.artifact, "heldout").astype("int64"))
    end = tokens[-1]
    second = -(-prepared.source_tokens["heldout"][0].tokens // LENGTH)
    starts = [LENGTH * (first + n) for first in (0, second) for n in range(5)]
    windows = torch.stack([tokens[start : start + LENGTH] for start in starts])
    counted = windows[:, :-1] != end
    assert found.predictions == counted.sum() < counted.numel() == found.tokens - found.windows
    with torch.no_grad():
        logits = {role: load_causal_lm(models[role].hf)(windows).logits[:, :-1] for role in ROLES}
    for role, quality in found.models().items():
        losses, divergences, agreements = [], [], []
        for number, counts in enumerate(counted):
            scores, teacher = logits[role][number][counts], logits["teacher"][number][counts]
            losses.append(cross_entropy(scores, windows[number, 1:][counts]))
            target = teacher.log_softmax(-1)
            divergences.append(
                kl_div(scores.log_softmax(-1), target, log_target=True, reduction="batchmean")
            )
            agreements.append((scores.argmax(-1) == teacher.argmax(-1)).float().mean())
        expected = [torch.stack(each).mean() for each in (losses, divergences, agreements)]
        figures = [quality.loss, quality.kl_to_teacher, quality.top1_agreement]
        assert figures == pytest.approx([x.item() for x in expected], abs=1e-5)


def test_one_model_is_in_memory_at_a_time_and_logits_of_few_positions(
    found: EvaluationResult,
    models: dict[str, Any],
    data: Input,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[weakref.ref[Any]] = []
    load = text_quality.load_transformers

    def load_alone(*arguments: Any) -> Any:
        assert [each() for each in loaded] == [None] * len(loaded)
        model = load(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(text_quality, "load_transformers", load_alone)
    monkeypatch.setattr(predictions, "CHUNK_BYTES", 4 * VOCABULARY * 50)
    with LogitsWatch(VOCABULARY) as watch:
        again = evaluated(models, data, tmp_path)
    assert (len(loaded), watch.positions) == (3, 50)
    for role in ROLES:
        whole, parts = (asdict(each.models()[role]) for each in (found, again))
        assert parts == pytest.approx(whole, abs=1e-6, rel=1e-6)


def test_bfloat16_changes_figures_little(
    found: EvaluationResult, models: dict[str, Any], data: Input, tmp_path: Path
) -> None:
    halved = evaluated(models, data, tmp_path, replace(CONFIG, precision="bf16-mixed"))
    assert (halved.number_type, halved.predictions) == ("bfloat16", found.predictions)
    assert halved.teacher.kl_to_teacher == 0
    for role in ROLES:
        exact, near = found.models()[role], halved.models()[role]
        assert 0 < abs(near.loss - exact.loss) < 0.01
        assert near.kl_to_teacher == pytest.approx(exact.kl_to_teacher, abs=0.01)
        assert near.top1_agreement == pytest.approx(exact.top1_agreement, abs=0.03)


def test_loss_is_recovered_only_where_pruning_cost_more_than_noise() -> None:
    losses = {"teacher": [3.0, 3.25, 2.75], "distilled": [3.25, 3.5, 3.0]}
    for pruned, share in (([4.0, 4.25, 3.75], 0.75), ([3.5, 3.125, 2.875], None)):
        scores = {role: Scores(each) for role, each in {**losses, "pruned": pruned}.items()}
        assert text_quality._recovered(scores) == share
