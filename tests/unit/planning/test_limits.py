"""Tests a plan's limits: epochs, disk space, sources' weights, FP8, cached logits, memory."""

from __future__ import annotations

import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from recipes.core.errors import RecipeError
from recipes.core.manifest import write_manifest
from recipes.data.results import SourceTokens
from recipes.data.settings import BYTES_PER_TOKEN
from recipes.distillation.results import CacheResult
from recipes.distillation.settings import CacheLogitsConfig
from recipes.planning.layouts import workloads_on_all_layouts
from tests.support.manifests import bare_manifest, edit_manifest
from tests.support.results import RESULTS
from tests.unit.conftest import notes_of, stage_named

if TYPE_CHECKING:
    from recipes.planning.rules import Problem
    from tests.unit.conftest import Complete, MakePlan

D, H = "stages.distill.", "stages.successive_halving."
"""Prefixes of settings."""
SMALL, LARGE = "recipe=llama_width_prune", "recipe=qwen3_8b_depth_2.5b"
CHATS = "data.sources=['teacher://chat#tokens=1000']"
"""Text of 1,000 tokens: conversations that the teacher writes."""
MAX, DOCUMENTS = "stages.prepare_data.max_tokens", "stages.prepare_data.max_documents"


@pytest.mark.parametrize(
    # ``epochs`` is a part of the warning; ``None`` for no warning. ``TEXT`` is replaced by the path
    # of the fixture ``text``, about 85,000 tokens. 90% of all text is for training. A step of SMALL
    # trains on 4 · 256 tokens. LARGE trains on 795 steps of 768 · 4,096 tokens.
    ("recipe", "overrides", "epochs"),
    [
        (SMALL, f"data.sources=[TEXT] {D}max_steps=200", None),
        (SMALL, f"data.sources=[TEXT] {D}max_steps=400", "5.4 epochs"),
        (SMALL, f"data.sources=[TEXT] {D}max_steps=200 {MAX}=40000", "5.7 epochs"),
        (SMALL, f"data.sources=['TEXT#tokens=40000'] {D}max_steps=200", "5.7 epochs"),
        # The tokens of nine documents are not known.
        (SMALL, f"data.sources=[TEXT] {D}max_steps=400 {DOCUMENTS}=9", "does not know"),
        (SMALL, f"data.sources=['TEXT#weight=1'] {DOCUMENTS}=9", "does not know"),
        (SMALL, f"{CHATS} {D}max_steps=12 {D}warmup_steps=1", "13.7 epochs"),
        (LARGE, f"{MAX}=20000000 skip_rules=[tokens]", "138.9 epochs"),
        (LARGE, f"{MAX}=1000000000", None),
    ],
)
def test_warns_of_more_than_four_epochs(
    plan: MakePlan, text: Path, recipe: str, overrides: str, epochs: str | None
) -> None:
    planned = plan(*overrides.replace("TEXT", str(text)).split(), recipe=recipe)
    notes = notes_of(planned, "epochs")
    assert len(notes) == (epochs is not None)
    assert all(str(epochs) in note.what for note in notes)


def test_tokens_of_limited_documents_are_estimated_by_the_mean_length_in_tokenized_text(
    plan: MakePlan, tmp_path: Path
) -> None:
    """The recipe trains on 102,400 tokens. The text has 100 documents of 1,000 tokens.

    90% of the text is for training. So all documents last for 1.1 epochs, and 20 documents for 5.7.
    """
    # Megatron's index: magic, version, data type (8: uint16), number of sequences and of document
    # boundaries; then the lengths of the sequences, their offsets in bytes, and the boundaries.
    index = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, 100, 101)
    index += struct.pack("<100i100q101q", *[1000] * 100, *range(0, 200_000, 2000), *range(101))
    (tmp_path / "corpus.idx").write_bytes(index)
    (tmp_path / "corpus.bin").write_bytes(bytes(200_000))
    text = ("data.sources=[]", f"data.prefix='{tmp_path}/corpus#licence=CC-BY-4.0'")
    assert not notes_of(plan(*text), "epochs")
    [note] = notes_of(plan(*text, f"{DOCUMENTS}=20"), "epochs")
    assert "5.7 epochs" in note.what


@pytest.mark.parametrize(
    ("recipe", "stage", "overrides", "gigabytes"),
    [
        # 100 billion tokens of 4 bytes.
        ("recipe=qwen3_8b_depth", "prepare_data", "", 400),
        # Text of unknown size is not counted.
        ("recipe=qwen3_8b_depth", "prepare_data", "stages.prepare_data.max_documents=9", 0),
        ("recipe=qwen3_8b_depth", "prepare_data", f"{MAX}=null", 0),
        # 1,000 tokens of conversations, each of 4 bytes and a byte for the loss mask.
        ("recipe=qwen3_8b_depth", "prepare_data", f"data.heldout_sources=[] {CHATS}", 5e-6),
        # Models of 6 B parameters, each of 4 bytes: four pruned candidates, four trained in the
        # first round and two in the second. One checkpoint has 14 bytes per parameter.
        ("recipe=qwen3_8b_search", "successive_halving", "", 6 * (4 * 10 + 14)),
        ("recipe=qwen3_8b_search", "successive_halving", f"{H}num_candidates=1", 0),
    ],
)
def test_disk_space_includes_text_and_candidates(
    plan: MakePlan, recipe: str, stage: str, overrides: str, gigabytes: float
) -> None:
    planned = stage_named(plan(*overrides.split(), recipe=recipe), stage)
    disk_bytes = planned.definition.disk_bytes(planned.config, planned.chain)
    assert disk_bytes / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_epochs_of_prepared_text_use_its_measured_tokens(
    plan: MakePlan, complete: Complete, text: Path
) -> None:
    """The run needs 409,600 training tokens: 5.4 epochs of the estimate, 0.5 of the result."""
    overrides = (f"data.sources=[{text}]", f"{D}max_steps=400")
    first = plan(*overrides)
    assert notes_of(first, "epochs")
    complete(first)  # with a result of 812,345 training tokens
    assert not notes_of(plan(*overrides), "epochs")


def weighted_sources(text: Path, tmp_path: Path, small: str, large: str) -> str:
    """Writes a second source, and returns an override with two weighted sources.

    Args:
        text: The large source.
        tmp_path: Folder of the small source, which has a tenth of the large source's text.
        small: Weight of the small source.
        large: Weight of the large source.
    """
    (tmp_path / "small.txt").write_text(text.read_text()[: text.stat().st_size // 10])
    return f"data.sources=['{tmp_path}/small.txt#weight={small}','{text}#weight={large}']"


def test_warns_of_sources_that_weights_repeat_too_often(
    plan: MakePlan, text: Path, tmp_path: Path
) -> None:
    # The run trains on as many tokens as the large source has. A step trains on 4 × 256 tokens.
    tokens = text.stat().st_size / BYTES_PER_TOKEN
    steps = f"{D}max_steps={round(tokens / 1024)}"
    [note] = notes_of(plan(weighted_sources(text, tmp_path, "6", "4"), steps), "epochs")
    assert note.what.startswith("distill trains on ")
    assert "tokens of 'small'" in note.what
    # The small source has 0.1 of these tokens, of which 90% are for training: 0.6 / (0.1 × 0.9).
    assert "it sees each 6.7 times" in note.what
    # With weight 0.3 instead of 0.6, each token is seen 3.3 times, which is not too often.
    balanced = weighted_sources(text, tmp_path, "3", "7")
    assert not notes_of(plan(balanced, steps), "epochs")
    # The sources have enough text, but the teacher's cache has only 10 sequences of it.
    few_sequences = ("teacher=cached", "stages.cache_logits.num_sequences=10", steps)
    [note] = notes_of(plan(balanced, *few_sequences), "epochs")
    assert "the teacher's cache" in note.what


def test_changed_weights_rerun_only_training(
    plan: MakePlan, complete: Complete, text: Path, tmp_path: Path
) -> None:
    first = plan(weighted_sources(text, tmp_path, "0.1", "0.9"))
    assert vars(first.chain.stages["distill"])["weights"] == {"small": 0.1, text.stem: 0.9}
    complete(first)
    todo = {stage.name for stage in plan(weighted_sources(text, tmp_path, "0.2", "0.8")).todo()}
    assert "distill" in todo
    assert not {"prepare_data", "score", "prune"} & todo


def test_a_cached_teacher_has_the_weights_of_distill(
    plan: MakePlan, text: Path, tmp_path: Path
) -> None:
    """The setting ``weights`` of ``distill`` takes precedence over the sources' weights."""
    distill_weights = f"+{D}weights={{small:1,{text.stem}:3}}"
    for small, overrides in (("1", []), ("2", [distill_weights])):
        cached = plan("teacher=cached", weighted_sources(text, tmp_path, small, "3"), *overrides)
        assert vars(cached.chain.stages["cache_logits"])["weights"] == {"small": 1, text.stem: 3}


def test_text_of_another_run_needs_its_weights_again(
    plan: MakePlan, complete: Complete, text: Path, tmp_path: Path
) -> None:
    """Prepared text does not depend on the weights, so its manifest does not have them.

    The note's fix is an override, in quotes, that sets the weights.
    """
    complete(plan(weighted_sources(text, tmp_path, "1", "3")), "prepare_data")
    # The text of the other run, outside the directory of this run.
    data = (tmp_path / "run" / "prepare_data").rename(tmp_path / "text")
    sources = {"train": [SourceTokens("small", 10**5), SourceTokens("large", 10**6)]}
    result = replace(RESULTS["prepare_data"], source_tokens=sources)
    edit_manifest(data, metrics=asdict(result))

    def fixes(recipe: str, *overrides: str) -> list[str]:
        planned = plan(*overrides, "skip_rules=[tokens]", recipe=f"recipe={recipe}")
        return [note.fix for note in notes_of(planned, "source-weights")]

    for recipe, stage, *overrides in (
        ("llama_width_prune", "distill"),
        ("llama_search", "successive_halving"),
        ("llama3_1_8b_depth", "distill_long", "long_context=32k"),
    ):
        overrides.append(f"stages.{stage}.inputs.data={data}")
        [fix] = fixes(recipe, *overrides)
        weights_override = fix.split("'")[1]  # the quoted part
        assert weights_override.startswith(f"+stages.{stage}.")
        assert fixes(recipe, *overrides, weights_override) == []


@pytest.mark.parametrize(
    ("recipe", "stage", "weights"),
    [
        ("recipe=llama_width_prune", "distill", "{wikipedia: 1, speech: 2}"),
        ("recipe=llama3_1_8b_depth", "cache_logits", "{novels: 1}"),
        ("recipe=llama_search", "successive_halving.distill", "{novels: 1}"),
    ],
)
def test_weights_need_the_name_of_a_training_source(
    plan: MakePlan, recipe: str, stage: str, weights: str
) -> None:
    """The source ``novels`` is only for evaluation, and ``speech`` should be ``speeches``."""
    cached = ["teacher=cached", "skip_rules=[tokens]"] if stage == "cache_logits" else []
    plan(*cached, f"+stages.{stage}.weights={{}}", recipe=recipe)  # is accepted
    with pytest.raises(RecipeError, match=r"weights has '(speech|novels)', (?s:.*)use one of"):
        plan(*cached, f"+stages.{stage}.weights={weights}", recipe=recipe)


@pytest.mark.parametrize(
    # ``fix`` is a part of the expected fix; ``None`` if there is no problem.
    ("overrides", "fix"),
    [
        (f"hardware=a100 {D}fp8=hybrid", "do not set fp8"),
        (f"hardware=l40s {D}fp8=hybrid", None),
        (f"hardware=l40s {D}fp8=hybrid {D}fp8_recipe=blockwise", "fp8_recipe=tensorwise"),
        (f"hardware=h100 {D}fp8=hybrid {D}fp8_recipe=mxfp8", "fp8_recipe=tensorwise"),
        (f"hardware=b200 {D}fp8=hybrid {D}fp8_recipe=mxfp8", None),
        ("hardware=a100 engine=tensorrt_llm_quantized", "format=int4_awq"),
        ("hardware=l40s engine=tensorrt_llm_quantized", None),
    ],
)
def test_fp8_needs_gpus_that_have_it(plan: MakePlan, overrides: str, fix: str | None) -> None:
    arguments = [*overrides.split(), "skip_rules=[memory,engine-image,fp8]"]
    notes = notes_of(plan(*arguments, recipe="recipe=llama3_1_8b_depth_2.5b"), "fp8")
    assert len(notes) == (fix is not None)
    assert all(str(fix) in note.fix for note in notes)


def test_a_small_cache_of_logits_limits_epochs_and_batches(plan: MakePlan, tmp_path: Path) -> None:
    """The recipe trains on 400 sequences of 256 tokens in batches of 4 sequences.

    Its text has thousands of sequences. A cache of two sequences is too small for a batch. A cache
    of 50 sequences is read in 8 epochs, one of 100 sequences in 4 epochs, which get no warning.
    """

    def epochs_notes(sequences: int) -> list[Problem]:
        setting = f"stages.cache_logits.num_sequences={sequences}"
        return notes_of(plan("teacher=cached", setting), "epochs")

    with pytest.raises(RecipeError, match=r"1,024 .* 512 at most(?s:.*)cache_logits\.num_seq"):
        epochs_notes(2)
    [note] = epochs_notes(50)
    assert "12,800" in note.what  # 50 × 256 tokens
    assert "8.0" in note.what
    assert epochs_notes(100) == []
    # A cache of 50 sequences from another run, whose text has 4,000 sequences.
    cache = bare_manifest("cache_logits", "logit_cache", CacheResult(50, 4000, 0, 0, 0.0, 0.0))
    settings = asdict(CacheLogitsConfig("cache_logits"))
    write_manifest(tmp_path, replace(cache, config=settings))
    [note] = notes_of(plan(f"{D}inputs.teacher={tmp_path}"), "epochs")
    assert "12,800" in note.what
    assert "num_sequences" in note.fix
    assert f"stages.{tmp_path}" not in note.fix  # the input is a folder, not a stage of this run


def test_too_large_batches_of_cache_logits_get_a_fix_that_fits(plan: MakePlan) -> None:
    cached = ["teacher=cached", "stages.cache_logits.num_sequences=null"]
    cached += ["stages.cache_logits.micro_batch_size=16"]
    with pytest.raises(RecipeError, match="cache_logits needs about") as caught:
        plan(*cached, recipe="recipe=llama3_1_8b_width")
    fix = [word for word in str(caught.value).split() if word.startswith("stages.cache_logits.")]
    assert "stages.cache_logits.micro_batch_size=8" in fix  # the largest that fits
    plan(*cached, *fix, recipe="recipe=llama3_1_8b_width")


def test_a_cache_of_all_text_is_as_large_as_the_text(plan: MakePlan, text: Path) -> None:
    cached = ("teacher=cached", "stages.cache_logits.num_sequences=null")

    def tokens_and_bytes(*overrides: str) -> tuple[int, int]:
        cache = stage_named(plan(*cached, *overrides, recipe=SMALL), "cache_logits")
        assert cache.workload is not None
        return cache.workload.tokens, cache.definition.disk_bytes(cache.config, cache.chain)

    train_tokens = 0.9 * text.stat().st_size / BYTES_PER_TOKEN
    tokens, size = tokens_and_bytes(f"data.sources=[{text}]")
    assert tokens == pytest.approx(train_tokens, rel=0.02)
    # 2 bytes each: ids of the 64 likeliest tokens, their probabilities, and that of all others.
    token_bytes = 64 * 2 + 65 * 2
    assert size == pytest.approx(train_tokens * token_bytes, rel=0.02)
    planned = plan(*cached, f"{MAX}=null", recipe="recipe=llama3_1_8b_width_2.5b")
    assert any("cache_logits" in note.what for note in notes_of(planned, "unknown-text"))
    with pytest.raises(RecipeError, match="tokens=many"):
        plan(*cached, f"data.sources=['{text}#tokens=many']")


def test_a_cached_teacher_has_no_layouts_with_context_parallelism(plan: MakePlan) -> None:
    """Training from a cache refuses context parallelism, so a plan does not propose it."""
    overrides = ("data.seq_length=32768", "skip_rules=[memory,batch,tokens]")
    for teacher, allows_context_parallelism in (("live", True), ("cached", False)):
        planned = plan(f"teacher={teacher}", *overrides, recipe="recipe=llama3_1_8b_width")
        workload = planned.chain.workloads["distill"]
        context_sizes = {w.layout.context for w in workloads_on_all_layouts(workload, 8, 8)}
        assert (len(context_sizes) > 1) == allows_context_parallelism


SEARCH, SPACE = "recipe=shrink", "stages.enumerate_shapes.space"
LATENCY, MEMORY = "stages.enumerate_shapes.budget.latency_ms", "hardware.memory_bytes"
"""Settings: the budget's latency of a decoding step, and the memory of a device in bytes."""


@pytest.mark.parametrize("prefix", [D, f"{H}distill."])
def test_layouts_must_be_possible_for_every_shape_of_a_search(
    plan: MakePlan, hf_folder: Path, prefix: str
) -> None:
    """The largest shape has 4 layers, and another has 3."""
    sizes = f"{SPACE}={{hidden_size_divisor: 32, ffn_hidden_size_divisor: 32}}"
    model = (f"model.hf_path={hf_folder}", "data.seq_length=64", sizes)
    layout = (f"{prefix}pipeline_model_parallel_size=4", f"{prefix}resources.devices=4")
    with pytest.raises(RecipeError, match="3 layers, fewer than PP=4"):
        plan(*model, *layout, recipe=SEARCH)


@pytest.mark.parametrize(
    ("recipe", "stage", "overrides"),
    [
        (SEARCH, "distill", f"budget.parameters=0.7 hardware.precision=32 {MEMORY}=4.23e9"),
        ("recipe=qwen3_8b_search", "successive_halving", f"{LATENCY}=0.7 {MEMORY}=64e9"),
    ],
)
def test_memory_must_suffice_for_every_shape_of_a_search(
    plan: MakePlan, recipe: str, stage: str, overrides: str
) -> None:
    """Some shapes have more layers than the largest, so their activations take more memory."""
    with pytest.raises(RecipeError, match=f"{stage} needs about"):
        plan(*overrides.split(), recipe=recipe)
