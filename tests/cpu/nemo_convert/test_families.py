"""Converts, prunes and trains a tiny model of every family, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from nemo_convert import convert, hf, nemo, parity, streaming
from nemo_convert.families import FAMILIES as SUPPORTED
from nemo_convert.hf_config import read_architecture
from recipes.backend.training_layers import RMSNorm
from recipes.core.metrics import METRICS, MetricsLog, steps_of
from recipes.data.corpus import SPLITS
from recipes.data.split_writer import SplitWriter
from recipes.data.token_sequences import TextSequences
from recipes.distillation.settings import DistillConfig
from recipes.distillation.training import CHECKPOINTS
from recipes.evaluation.text_quality import load_transformers
from recipes.pruning.kept import select_indices
from recipes.pruning.pruned_checkpoint import prune_weights, save_weights
from recipes.pruning.scoring import score_checkpoint
from recipes.pruning.settings import ScoreConfig
from recipes.pruning.targets import PruneTargets, pruned_shape
from tests.cpu.nemo_convert.family_ranks import (
    DATA_PARALLEL,
    DP,
    LEARNING_RATE,
    LOGITS,
    PP,
    SEQ_LENGTH,
    TP,
)
from tests.support.conversion import (
    assert_same_weights,
    assert_trains_alike,
    convert_by_command,
)
from tests.support.models import EVEN, FAMILIES, ODD, write_tiny_model
from tests.support.ranks import run_ranks
from tests.support.rounding import ROUNDINGS, measure_ulp_noise

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
WIDTH = {"hidden_size": 48, "num_attention_heads": 2}
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32}
TARGETS = {
    family: {**WIDTH, **(EXPERTS if "num_experts" in fields else {"ffn_hidden_size": 96})}
    for family, fields in FAMILIES.items()
}


def test_every_family_has_a_tiny_model() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping
    tiny = {mapping[type(AutoConfig.for_model(name))].__name__ for name in FAMILIES}
    assert tiny == set(SUPPORTED)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Returns a folder with tokens, training data, and a folder of models for each family.

    ``<family>/`` has ``hf``, ``teacher.nemo`` and ``pruned.nemo``. The teachers have been
    trained for a few steps.
    """
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        folder = root / family
        write_tiny_model(folder / "hf", text_file, family, **EVEN)
        convert.to_nemo(folder / "hf", folder / "teacher.nemo")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")  # the same in all families
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
    sequences = torch.tensor(ids[: len(ids) // SEQ_LENGTH * SEQ_LENGTH]).view(-1, SEQ_LENGTH)
    save_file({"tokens": sequences[:2].clone()}, root / "tokens.safetensors")
    (root / "data").mkdir()
    with SplitWriter(root / "data", SPLITS) as writer:
        for split in SPLITS:
            writer.add(split, ids)
    for family in FAMILIES:
        prune(family, root / family, sequences[:8])
    return root


def prune(family: str, folder: Path, calibration: torch.Tensor) -> None:
    teacher = folder / "teacher.nemo"
    cfg = ScoreConfig(calibration="random", num_loss_samples=0)
    text = TextSequences.of(calibration)
    scores = score_checkpoint(cfg, teacher, text, MetricsLog(None)).widths
    teacher_shape = nemo.architecture_of(teacher)
    student = pruned_shape(teacher_shape, PruneTargets(drop_layers=(2,), **TARGETS[family]))
    kept = select_indices(
        scores,
        teacher_shape,
        student,
        [n for n in range(1, teacher_shape.num_layers + 1) if n != 2],  # layer 2 is dropped
    )
    weights = prune_weights(teacher, kept, student.kv_channels)
    save_weights(teacher, student, weights, folder / "pruned.nemo")


class StatefulNorm(RMSNorm):
    """Has an extra state, like the norms of TransformerEngine (``pytorch/ops/op.py``)."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or state.numel() == 0


def require_norm_states(checkpoint: Path, stateless: Path) -> None:
    """Asserts that norms with an extra state can be loaded from checkpoints with and without it.

    ``checkpoint`` has such states. This function writes ``stateless``, which has none.
    """
    nemo.initialize(nemo.Parallelism())
    core = nemo.build_core(nemo.restore_model(checkpoint), nemo.Parallelism(), training=True)
    weights = stateless / nemo.WEIGHTS
    weights.mkdir(parents=True)
    dist_checkpointing.save(core.sharded_state_dict(prefix="module."), str(weights))
    unfused = {"final_layernorm", "q_layernorm", "k_layernorm"}
    if core.config.num_moe_experts:  # a dense model fuses this norm into the next linear layer
        unfused.add("pre_mlp_layernorm")
    norms = [m for name, m in core.named_modules() if name.rpartition(".")[2] in unfused]
    for norm in norms:
        if isinstance(norm, RMSNorm):
            norm.__class__ = StatefulNorm
    state = core.sharded_state_dict(prefix="module.")
    assert any(name.endswith(f"norm.{nemo.EXTRA_STATE}") for name in state)
    dist_checkpointing.load(state, str(checkpoint / nemo.WEIGHTS))
    nemo.load_weights(core, stateless)


class Experts(torch.nn.Module):
    """Experts with the state dict of TransformerEngine's grouped linear layer."""

    def sharded_state_dict(self, prefix: str) -> dict[str, str]:
        names = ("weight0", "weight1", "_extra_state", "_extra_state1")
        return {f"{prefix}{name}": name for name in names}


def test_fp8_states_of_experts_are_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names: list[str] = []
    monkeypatch.setattr(nemo, "read_sharded", lambda state, _: names.extend(state) or {})
    nemo.load_weights(Experts(), tmp_path)
    assert names == ["module.weight0", "module.weight1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_odd_shapes(family: str, text_file: Path, tmp_path: Path) -> None:
    source, back = tmp_path / "hf", tmp_path / "back"
    write_tiny_model(source, text_file, family, train=False, **ODD)
    assert convert_by_command("to-nemo", source, tmp_path / "m.nemo") == 0
    require_norm_states(tmp_path / "m.nemo", tmp_path / "stateless.nemo")
    assert convert_by_command("to-hf", tmp_path / "m.nemo", back) == 0
    assert_same_weights(source, back)
    for name in SIDE_FILES:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, back))
    # Older versions of transformers read only this key.
    before["torch_dtype"] = before.pop("dtype")
    assert after == before | {"head_dim": ODD["head_dim"]}
    arch = read_architecture(after, family)
    model = hf.load_causal_lm(back)
    assert arch.parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_bfloat16_shards(family: str, text_file: Path, tmp_path: Path) -> None:
    """The model has an untied head. It has no generation config, and conversion adds none."""
    source, back = tmp_path / "hf", tmp_path / "back"
    shape = {**EVEN, "dtype": torch.bfloat16, "max_shard_size": "60KB"}
    write_tiny_model(source, text_file, family, train=False, **shape)
    (source / "generation_config.json").unlink()
    assert len(list(source.glob("*.safetensors"))) > 1
    assert convert_by_command("to-nemo", source, tmp_path / "m.nemo") == 0
    assert convert_by_command("to-hf", tmp_path / "m.nemo", back) == 0
    assert_same_weights(source, back)
    assert not (back / "generation_config.json").exists()


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(tokens).logits
    return logits


def tokens_of(root: Path) -> torch.Tensor:
    return load_file(root / "tokens.safetensors")["tokens"]


def require_logits_of(folder: Path, tokens: torch.Tensor, *logits: torch.Tensor) -> None:
    """Asserts that logits equal those of transformers, up to rounding."""
    model = hf.load_causal_lm(folder)
    expected = logits_of(model, tokens)
    noise = measure_ulp_noise(model, lambda: logits_of(model, tokens))
    for actual in logits:
        torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDINGS * noise)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_a_pruned_model(family: str, root: Path, tmp_path: Path) -> None:
    """transformers gives the logits of Megatron, and of the model that evaluation loads."""
    checkpoint, tokens = root / family / "pruned.nemo", tokens_of(root)
    convert.to_hf(checkpoint, tmp_path / "hf")
    by_megatron = parity.core_logits(parity.load_core(checkpoint), tokens)
    by_evaluation = logits_of(load_transformers(checkpoint), tokens)
    require_logits_of(tmp_path / "hf", tokens, by_megatron, by_evaluation)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    teacher = nemo.architecture_of(root / family / "teacher.nemo")
    targets = PruneTargets(num_layers=3, **TARGETS[family])
    expected = pruned_shape(teacher, targets)
    assert read_architecture(config, family) == expected
    assert config["head_dim"] == EVEN["head_dim"]
    assert expected.parameters() == sum(t.numel() for _, t in convert.hf_weights(checkpoint))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_layers_compute_the_same_model(family: str, root: Path) -> None:
    """Our training layers replace Megatron's. Compares logits and the gradient of every weight."""
    assert_trains_alike(root / family / "teacher.nemo", tokens_of(root))


@pytest.fixture(scope="module", params=[TP, PP])
def layout(request: pytest.FixtureRequest, root: Path) -> str:
    # The same two processes handle all families, because most of the time goes into imports.
    run_ranks("-m", "tests.cpu.nemo_convert.family_ranks", request.param, str(root))
    return str(request.param)


def test_two_ranks_give_the_logits_of_transformers_and_train(layout: str, root: Path) -> None:
    tokens = tokens_of(root)
    for family in FAMILIES:
        logits = load_file(root / family / layout / LOGITS)["logits"]
        require_logits_of(root / family / "hf", tokens, logits)
    # The run for TP trains all families, into folders TP. The run for PP trains those of
    # DATA_PARALLEL with data parallelism, into folders DP.
    for family in FAMILIES if layout == TP else DATA_PARALLEL:
        require_trained(root / family / (TP if layout == TP else DP))


def require_trained(folder: Path) -> None:
    """Asserts that one step with positive losses changed every weight of the student."""
    [step] = steps_of(folder / METRICS, "distill")
    assert step["teacher_loss"] < 5.0  # chance is ln(294) = 5.7
    assert min(step[name] for name in ("kd", "hidden", "lm", "grad_norm")) > 0, step
    start = folder.parent / "pruned.nemo"
    before = dict(convert.hf_weights(start))
    after = dict(convert.hf_weights(folder / "work" / "artifact" / "s.nemo"))
    assert before.keys() == after.keys()
    assert [n for n, tensor in before.items() if torch.equal(tensor, after[n])] == []
    # Names of checkpoints count steps from 0: this is the checkpoint after the only step.
    require_exact_start(folder / "work" / CHECKPOINTS / "step=0", start)


def require_exact_start(trained: Path, start: Path) -> None:
    """Asserts that Adam's first step started from the stored weights, without rounding them."""
    leading_axes = nemo.leading_axes(nemo.architecture_of(start))

    def read(folder: Path, prefix: str = "") -> dict[tuple[str, Any], torch.Tensor]:
        keys = {prefix + key: axes for key, axes in leading_axes.items()}
        weights = streaming.read_weights(folder / nemo.WEIGHTS, keys)
        return {(key.removeprefix(prefix), index): tensor for key, index, tensor in weights}

    before = read(start)
    after, mean, mean_square = (
        read(trained, f"optimizer.state.{name}.") for name in ("param", "exp_avg", "exp_avg_sq")
    )
    assert after.keys() == before.keys()
    beta1, beta2 = DistillConfig().adam_beta1, DistillConfig().adam_beta2
    for key, weight in before.items():
        # Adam's first step: both moments are divided by 1 - beta, their bias correction.
        update = mean[key] / (1 - beta1) / ((mean_square[key] / (1 - beta2)).sqrt() + 1e-8)
        expected = weight - LEARNING_RATE * update
        torch.testing.assert_close(after[key], expected, rtol=1e-6, atol=1e-6, msg=key[0])
