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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nemo_convert import convert, hf, nemo, parity, streaming
from nemo_convert.families import FAMILIES as SUPPORTED
from nemo_convert.hf_config import read_architecture
from recipes.backend.training_layers import RMSNorm
from recipes.core.files import read_json
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
from tests.support.conversion import assert_same_weights, assert_trains_alike, convert_by_command
from tests.support.folder_changes import GENERATION
from tests.support.models import EVEN, FAMILIES, ODD, write_tiny_model
from tests.support.ranks import run_ranks
from tests.support.rounding import NOISE_FACTOR, measure_ulp_noise

SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", GENERATION)
# Pruned sizes. The teachers have hidden_size=64, 4 heads, ffn_hidden_size=128, and the MoE has 6
# experts of moe_ffn_hidden_size=40.
WIDTH = {"hidden_size": 48, "num_attention_heads": 2}
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32}
TARGETS = {
    family: {**WIDTH, **(EXPERTS if "num_experts" in fields else {"ffn_hidden_size": 96})}
    for family, fields in FAMILIES.items()
}
"""Target widths of each family, as fields of ``PruneTargets``."""


def test_every_family_has_a_tiny_model() -> None:
    assert {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in FAMILIES} == set(SUPPORTED)


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
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
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
    """Prunes ``teacher.nemo`` to ``pruned.nemo``: drops layer 2, and prunes to ``TARGETS``.

    ``calibration`` has the tokens [sequences, SEQ_LENGTH] for the importance scores.
    """
    teacher = folder / "teacher.nemo"
    cfg = ScoreConfig(calibration="random", num_loss_samples=0)
    text = TextSequences.of(calibration)
    scores = score_checkpoint(cfg, teacher, text, MetricsLog(None)).widths
    teacher_shape = nemo.architecture_of(teacher)
    student = pruned_shape(teacher_shape, PruneTargets(drop_layers=(2,), **TARGETS[family]))
    layers = [n for n in range(1, teacher_shape.num_layers + 1) if n != 2]  # layer 2 is dropped
    kept = select_indices(scores, teacher_shape, student, layers)
    weights = prune_weights(teacher, kept, student.kv_channels)
    save_weights(teacher, student, weights, folder / "pruned.nemo")


class StatefulNorm(RMSNorm):
    """Norm with an extra state, like TransformerEngine's norms (its ``pytorch/ops/op.py``)."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or state.numel() == 0


def require_norm_states(checkpoint: Path, stateless: Path) -> None:
    """Asserts that norms with an extra state load checkpoints with and without such states.

    Args:
        checkpoint: NeMo checkpoint whose norms have states, for loaders that require them.
        stateless: Path at which this function writes a checkpoint of this model without states.
            Its weights are arbitrary.
    """
    nemo.initialize(nemo.Parallelism())
    core = nemo.build_core(nemo.restore_model(checkpoint), nemo.Parallelism(), training=True)
    weights = stateless / nemo.WEIGHTS
    weights.mkdir(parents=True)
    dist_checkpointing.save(core.sharded_state_dict(prefix="module."), str(weights))
    # TransformerEngine fuses all other norms into the next linear layer.
    unfused = {"final_layernorm", "q_layernorm", "k_layernorm"}
    if core.config.num_moe_experts:  # only a dense model fuses this norm
        unfused.add("pre_mlp_layernorm")
    for name, module in core.named_modules():
        if name.rpartition(".")[2] in unfused and isinstance(module, RMSNorm):
            module.__class__ = StatefulNorm
    state = core.sharded_state_dict(prefix="module.")
    assert any(name.endswith(f"norm.{nemo.EXTRA_STATE}") for name in state)
    dist_checkpointing.load(state, str(checkpoint / nemo.WEIGHTS))  # fails if a state is missing
    nemo.load_weights(core, stateless)  # does not read states


class GroupedExperts(torch.nn.Module):
    """Two experts with the state dict of TransformerEngine's grouped linear layer."""

    def sharded_state_dict(self, prefix: str) -> dict[str, str]:
        names = ("weight0", "weight1", "_extra_state", "_extra_state1")
        return {f"{prefix}{name}": name for name in names}


def test_fp8_states_of_experts_are_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names: list[str] = []

    def record_names(state: dict[str, Any], _: Path) -> dict[str, Any]:
        names.extend(state)
        return {}

    monkeypatch.setattr(nemo, "read_sharded", record_names)
    nemo.load_weights(GroupedExperts(), tmp_path)
    assert names == ["module.weight0", "module.weight1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_shapes_are_exported_exactly_and_trained(
    family: str, text_file: Path, tmp_path: Path
) -> None:
    """Our training layers, which replace Megatron's, have the same logits and gradients."""
    source, back = tmp_path / "hf", tmp_path / "back"
    write_tiny_model(source, text_file, family, train=False, **ODD)
    assert convert_by_command("to-nemo", source, tmp_path / "m.nemo") == 0
    require_norm_states(tmp_path / "m.nemo", tmp_path / "stateless.nemo")
    # Two sequences of 31 tokens. The vocabulary has 293 tokens.
    tokens = torch.randint(0, 280, (2, 31), generator=torch.Generator().manual_seed(1))
    assert_trains_alike(tmp_path / "m.nemo", tokens)
    assert convert_by_command("to-hf", tmp_path / "m.nemo", back) == 0
    assert_same_weights(source, back)
    for name in SIDE_FILES:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name
    before, after = (read_json(folder / "config.json") for folder in (source, back))
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
    fields = {**EVEN, "dtype": torch.bfloat16, "max_shard_size": "60KB"}  # gives several shards
    write_tiny_model(source, text_file, family, train=False, **fields)
    (source / GENERATION).unlink()
    assert len(list(source.glob("*.safetensors"))) > 1
    assert convert_by_command("to-nemo", source, tmp_path / "m.nemo") == 0
    assert convert_by_command("to-hf", tmp_path / "m.nemo", back) == 0
    assert_same_weights(source, back)
    assert not (back / GENERATION).exists()


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(tokens).logits
    return logits


def tokens_of(root: Path) -> torch.Tensor:
    return load_file(root / "tokens.safetensors")["tokens"]


def require_logits_of(folder: Path, tokens: torch.Tensor, *logits: torch.Tensor) -> None:
    """Asserts that each of ``logits`` equals what transformers computes, up to rounding.

    Args:
        folder: Hugging Face folder of the model.
        tokens: Tokens [batch, sequence].
        logits: Tensors [batch, sequence, vocabulary] for the same tokens.
    """
    model = hf.load_causal_lm(folder)
    expected = logits_of(model, tokens)
    noise = measure_ulp_noise(model, lambda: logits_of(model, tokens))
    for actual in logits:
        torch.testing.assert_close(actual, expected, rtol=0, atol=NOISE_FACTOR * noise)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_a_pruned_model(family: str, root: Path, tmp_path: Path) -> None:
    """The exported model has the logits of Megatron's model and of the model in evaluation."""
    checkpoint, tokens = root / family / "pruned.nemo", tokens_of(root)
    convert.to_hf(checkpoint, tmp_path / "hf")
    by_megatron = parity.core_logits(parity.load_core(checkpoint), tokens)
    by_evaluation = logits_of(load_transformers(checkpoint), tokens)
    require_logits_of(tmp_path / "hf", tokens, by_megatron, by_evaluation)
    config = read_json(tmp_path / "hf" / "config.json")
    teacher = nemo.architecture_of(root / family / "teacher.nemo")
    targets = PruneTargets(num_layers=3, **TARGETS[family])  # 1 of 4 layers was dropped
    expected = pruned_shape(teacher, targets)
    assert read_architecture(config, family) == expected
    assert config["head_dim"] == EVEN["head_dim"]  # is not pruned
    assert expected.parameters() == sum(t.numel() for _, t in convert.hf_weights(checkpoint))


@pytest.fixture(scope="module", params=[TP, PP])
def layout(request: pytest.FixtureRequest, root: Path) -> str:
    """Runs ``family_ranks`` with a layout, and returns the layout."""
    # The same two processes handle all families, because most of the time goes into imports.
    run_ranks("-m", "tests.cpu.nemo_convert.family_ranks", request.param, str(root))
    return str(request.param)


def test_two_ranks_give_the_logits_of_transformers_and_train(layout: str, root: Path) -> None:
    tokens = tokens_of(root)
    for family in FAMILIES:
        logits = load_file(root / family / layout / LOGITS)["logits"]
        require_logits_of(root / family / "hf", tokens, logits)
    # The run with TP=2 trains all families with TP=2. The run with PP=2 trains only the families
    # DATA_PARALLEL, with DP=2.
    training_layout = TP if layout == TP else DP
    for family in FAMILIES if training_layout == TP else DATA_PARALLEL:
        require_trained(root / family / training_layout)


def require_trained(folder: Path) -> None:
    """Asserts that one step with positive losses changed every weight of the student.

    ``folder`` is a folder that ``family_ranks.distil`` wrote.
    """
    [step] = steps_of(folder / METRICS, "distill")
    assert step["teacher_loss"] < 5.0  # a uniform guess of 294 tokens has ln(294) = 5.7
    assert min(step[name] for name in ("kd", "hidden", "lm", "grad_norm")) > 0, step
    pruned = folder.parent / "pruned.nemo"
    before = dict(convert.hf_weights(pruned))
    after = dict(convert.hf_weights(folder / "work" / "artifact" / "s.nemo"))
    assert before.keys() == after.keys()
    unchanged = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert unchanged == []
    # Names of checkpoints count steps from 0: this is the checkpoint after the only step.
    require_exact_start(folder / "work" / CHECKPOINTS / "step=0", pruned)


def require_exact_start(trained: Path, start: Path) -> None:
    """Asserts that Adam's first step started from the stored weights, without rounding them.

    Args:
        trained: Checkpoint of training after the first step, with the optimizer's float32 weights
            and moments.
        start: NeMo checkpoint with the initial weights.
    """
    leading_axes = nemo.leading_axes(nemo.architecture_of(start))

    def read(folder: Path, prefix: str = "") -> dict[tuple[str, Any], torch.Tensor]:
        """Maps (checkpoint key without ``prefix``, index of layer and expert) to the weight."""
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
        # Dividing by 1 - beta corrects the bias of a moment after one step. 1e-8 is Adam's epsilon.
        update = mean[key] / (1 - beta1) / ((mean_square[key] / (1 - beta2)).sqrt() + 1e-8)
        expected = weight - LEARNING_RATE * update
        torch.testing.assert_close(after[key], expected, rtol=1e-6, atol=1e-6, msg=key[0])
