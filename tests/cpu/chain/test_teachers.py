"""Distils from a live, a cached and a corrected teacher.

A live teacher runs in each step. A cached teacher ran before, and its largest logits are stored. A
corrected teacher was first fine-tuned on the text.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from recipes.core.files import sha256_of
from recipes.core.metrics import METRICS, steps_of
from recipes.data.results import DatasetResult
from recipes.distillation.results import DistillationResult
from tests.support.in_process import run_in_process, run_successfully
from tests.support.launcher import CommandResult
from tests.support.models import EVEN, write_tiny_model
from tests.support.runs import copy_without, manifest_of, settings, tiny
from tests.support.text import write_chats

STEPS, BATCH = 12, 4
CACHED_SEQUENCES = BATCH * (STEPS - 4)
"""Sequences in the teacher's cache: enough for all steps but the last four, which repeat some."""
TEACHER_CHAT = "teacher://chat#tokens=600"
"""Source of 600 tokens of conversations that the teacher generates."""


def run_distillation(model: Path, texts: str, run_dir: Path, *overrides: str) -> CommandResult:
    return run_in_process(
        "recipe=llama_depth_prune",
        *tiny(model, texts, run_dir),
        # With only 2 of 4 layers, losses are much larger than rounding errors.
        "stages.prune.target_num_layers=2",
        *settings("distill", precision=32, top_k="null", lr=1e-3),
        *settings("distill", max_steps=STEPS, warmup_steps=1, val_check_interval=STEPS),
        *overrides,
        cwd=run_dir.parent,
    )


@pytest.fixture(scope="module")
def teacher(even_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that gives the end of a turn the same logit as a space, so its answers are short."""
    folder = tmp_path_factory.mktemp("teacher") / "even"
    shutil.copytree(even_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [space] = tokenizer(" ")["input_ids"]
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][tokenizer.eos_token_id] = weights["lm_head.weight"][space]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def texts(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns three weighted sources: prose, conversations, and the teacher's conversations."""
    chats = write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", text_file)
    return f"'{text_file}#weight=2','{chats}#weight=1','{TEACHER_CHAT}&weight=1'"


@pytest.fixture(scope="module")
def live(teacher: Path, texts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run with a live teacher."""
    run_dir = tmp_path_factory.mktemp("live") / "run"
    only = "only=[import_hf,prepare_data,score,prune,distill]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMO_RECIPES_CACHE", str(run_dir.parent / "cache"))
        result = run_distillation(teacher, texts, run_dir, only)
    assert result.code == 0, result.output
    return run_dir


def test_the_teacher_generated_one_of_the_sources(live: Path) -> None:
    dataset = manifest_of(live, "prepare_data").result(DatasetResult)
    train_tokens = {entry.source: entry.tokens for entry in dataset.source_tokens["train"]}
    assert list(train_tokens) == ["topics", "chats", "teacher-chat"]
    # The teacher generates batches of 32 conversations of at most 64 tokens, until it has 600
    # tokens. So it generates less than one batch too much. Most conversations are for training.
    assert 300 < train_tokens["teacher-chat"] < 600 + 32 * 64
    origin = dataset.origins[TEACHER_CHAT]
    [file] = (live.parent / "cache" / "teacher_chats").glob("*/chats.jsonl")
    # "even" is the name of the teacher's folder, which states no licence.
    assert origin.licence == "written by even; its licence applies: unknown"
    assert origin.sha256 == sha256_of(file)


def test_weights_set_the_tokens_of_each_source(live: Path) -> None:
    result = manifest_of(live, "distill").result(DistillationResult)
    tokens = {source.source: source.tokens for source in result.sources}
    assert tokens == {  # the weights are 2, 1 and 1
        "topics": result.tokens / 2,
        "chats": result.tokens / 4,
        "teacher-chat": result.tokens / 4,
    }
    assert all(source.epochs > 0 for source in result.sources)


def test_a_cached_teacher_gives_the_losses_of_a_live_teacher(
    live: Path, teacher: Path, texts: str, tmp_path: Path
) -> None:
    """The cache has the largest 250 of 294 logits, so the losses differ only a little."""
    result = run_distillation(
        teacher,
        texts,
        copy_without(live, tmp_path / "run", "distill"),
        "teacher=cached",
        "only=[cache_logits,distill]",
        "stages.cache_logits.top_k=250",
        "stages.cache_logits.precision=32",
        f"stages.cache_logits.num_sequences={CACHED_SEQUENCES}",
    )
    assert result.code == 0, result.output
    live_steps = steps_of(live / "distill" / METRICS, "distill")
    cached_steps = steps_of(tmp_path / "run" / "distill" / METRICS, "distill")
    assert len(cached_steps) == STEPS
    assert "teacher_loss" not in cached_steps[0]
    # Both runs use the same sequences, until the cache is used up.
    same_steps = CACHED_SEQUENCES // BATCH
    for expected, step in zip(live_steps[:same_steps], cached_steps[:same_steps], strict=True):
        assert step["kd"] == pytest.approx(expected["kd"], rel=1e-2), step["done"]
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2), step["done"]
    sources = manifest_of(tmp_path / "run", "distill").result(DistillationResult).sources
    # An epoch of a source is one pass over its tokens in the cache, not over its whole text.
    cached_tokens = sum(source.tokens / source.epochs for source in sources)
    assert cached_tokens == pytest.approx(CACHED_SEQUENCES * 64)  # 64 tokens per sequence


def test_a_corrected_teacher_predicts_the_text_better(
    live: Path, teacher: Path, texts: str, tmp_path: Path
) -> None:
    result = run_distillation(
        teacher,
        texts,
        copy_without(live, tmp_path / "run", "distill"),
        "teacher=corrected",
        "only=[correct_teacher,distill]",
        "stages.correct_teacher.max_steps=20",
        "stages.correct_teacher.val_check_interval=10",
        "stages.correct_teacher.lr=1e-3",
    )
    assert result.code == 0, result.output
    steps = steps_of(tmp_path / "run" / "correct_teacher" / METRICS, "correct_teacher")
    validations = steps_of(tmp_path / "run" / "correct_teacher" / METRICS, "validate")
    assert [validation["done"] for validation in validations] == [10, 20]
    assert validations[1]["val_loss"] < validations[0]["val_loss"]
    assert {"loss", "lm"} <= steps[0].keys()
    assert "kd" not in steps[0]
    # The teacher's loss on the first batch of distillation, which is the same in both runs.
    original, corrected = (
        steps_of(run / "distill" / METRICS, "distill")[0]["teacher_loss"]
        for run in (live, tmp_path / "run")
    )
    assert corrected < original
    manifest = manifest_of(tmp_path / "run", "correct_teacher")
    assert manifest.parameters == manifest_of(live, "import_hf").parameters


def test_an_moe_student_that_equals_its_teacher_has_no_gradient(
    text_file: Path, tmp_path: Path
) -> None:
    """The KD loss is at its minimum. A load-balancing loss of the experts would add a gradient.

    With its tiny weight, the LM loss appears in the metrics but adds almost no gradient.
    """
    model = write_tiny_model(tmp_path / "moe", text_file, "qwen3_moe", **EVEN)
    chats = write_chats(tmp_path / "chats.jsonl", text_file)
    run_dir = tmp_path / "run"
    run_successfully(
        "recipe=llama_depth_prune",
        *tiny(model, f"'{chats}'", run_dir),
        "only=[import_hf,prepare_data,distill]",
        "stages.distill.inputs.student=import_hf",
        *settings("distill", precision=32, top_k="null", lm_weight=1e-9, micro_batch_size=BATCH),
        *settings("distill", max_steps=1, warmup_steps=0, val_check_interval=1),
        cwd=tmp_path,
    )
    [step] = steps_of(run_dir / "distill" / METRICS, "distill")
    assert step["kd"] == pytest.approx(0, abs=1e-6)
    assert step["grad_norm"] < 1e-5
    # Two equal models have equal losses if both losses leave out the masked tokens.
    assert step["teacher_loss"] == pytest.approx(step["lm"], rel=1e-5)
