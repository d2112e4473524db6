"""Scores, kept indices and pruned weights of a tiny model, also compared with ModelOpt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import modelopt.torch.prune as mtp
import pytest
import torch
from modelopt.torch.prune.plugins.mcore_minitron import get_mcore_minitron_config
from transformers import AutoTokenizer

from nemo_convert import convert, nemo, parity
from nemo_convert.architecture import Architecture
from nemo_convert.hf import load_causal_lm
from recipes.backend.local_layers import register_rms_norm
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Input
from recipes.data.token_sequences import TextSequences
from recipes.distillation.results import KeptLayers
from recipes.pruning.kept import (
    Importance,
    KeptIndices,
    layers_to_keep,
    prune_weight,
    select_indices,
)
from recipes.pruning.pruned_checkpoint import prune_weights, save_weights
from recipes.pruning.results import PruneResult, ScoreResult
from recipes.pruning.scoring import calibration_text, score_checkpoint
from recipes.pruning.settings import PruneConfig, ScoreConfig
from recipes.pruning.targets import PruneTargets, pruned_shape
from recipes.stages import prune as prune_stage
from tests.support.logits import LogitsWatch
from tests.support.manifests import bare_manifest
from tests.support.models import EVEN, write_tiny_model
from tests.support.ranks import run_ranks
from tests.support.rounding import NOISE_FACTOR, measure_ulp_noise

VOCABULARY = EVEN["vocab_size"]
DOCUMENT_END = 83
"""Id of a frequent token, which the tests treat as the end of a document."""
WeightChange = Callable[[Any], None]  # changes a Hugging Face model in place
SCORE = ScoreConfig(num_loss_samples=8, block_sizes=[2])


@pytest.fixture(scope="module")
def calibration(even_llama: Path, text_file: Path) -> torch.Tensor:
    """Returns 16 sequences of training text. On other text, a loss near chance may be refused."""
    tokenizer = AutoTokenizer.from_pretrained(even_llama)
    ids = tokenizer(text_file.read_text()[: 1 << 16])["input_ids"]
    return torch.tensor(ids[: 16 * 32]).view(16, 32)


def convert_changed(folder: Path, even_llama: Path, change: WeightChange = lambda _: None) -> Path:
    """Changes the weights of ``even_llama``, and returns the changed model as NeMo checkpoint."""
    model = load_causal_lm(even_llama)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder / "hf")
    AutoTokenizer.from_pretrained(even_llama).save_pretrained(folder / "hf")
    convert.to_nemo(folder / "hf", folder / "even.nemo")
    return folder / "even.nemo"


@pytest.fixture(scope="module")
def teacher(even_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_changed(tmp_path_factory.mktemp("teacher"), even_llama)


def score(checkpoint: Path, tokens: torch.Tensor, cfg: ScoreConfig = SCORE) -> Importance:
    return score_checkpoint(
        cfg, checkpoint, TextSequences.of(tokens, DOCUMENT_END), MetricsLog(None)
    )


@pytest.fixture(scope="module")
def importance(teacher: Path, calibration: torch.Tensor) -> Importance:
    return score(teacher, calibration)


def prune(
    teacher: Path, importance: Importance, out: Path, method: str = "loss", **targets: Any
) -> tuple[Path, Architecture, KeptIndices]:
    """Prunes by scores to the sizes ``targets``. ``method`` selects the scores of layers."""
    teacher_shape = nemo.architecture_of(teacher)
    student = pruned_shape(teacher_shape, PruneTargets(**targets))
    layers = layers_to_keep(importance, method, student.num_layers)
    kept = select_indices(importance.widths, teacher_shape, student, layers)
    weights = prune_weights(teacher, kept, student.kv_channels)
    save_weights(teacher, student, weights, out / "even.nemo")
    return out / "even.nemo", student, kept


def test_layers_of_a_pruned_checkpoint_keep_the_numbers_of_the_unpruned_model(
    teacher: Path, importance: Importance, tmp_path: Path
) -> None:
    """The manifest says that the checkpoint's 4 layers are layers 2, 3, 5 and 6 of that model."""
    artifact = tmp_path / ARTIFACT
    artifact.mkdir()
    (artifact / teacher.name).symlink_to(teacher)
    importance.save(artifact)
    loss = importance.teacher_loss  # of 16 sequences with 32 tokens, which have 31 predictions
    score_result = ScoreResult("text", 16, 16 * 32, loss, importance.layers, 16 * 31)
    inputs = {
        "checkpoint": Input(tmp_path, bare_manifest("distill", "c", KeptLayers([2, 3, 5, 6]))),
        "importance": Input(tmp_path, bare_manifest("score", "importance", score_result)),
    }
    (tmp_path / "out").mkdir()
    outcome = prune_stage.run(PruneConfig(drop_layers=[1, 3]), inputs, tmp_path / "out")
    assert isinstance(outcome.result, PruneResult)
    assert outcome.result.kept_layers == [3, 6]
    assert outcome.result.dropped_layers() == [2, 5]


def logits(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the logits of a NeMo checkpoint."""
    return parity.core_logits(parity.load_core(checkpoint), tokens)


TARGETS = {"num_layers": 3, "hidden_size": 40, "ffn_hidden_size": 72, "num_attention_heads": 2}
"""Sizes that prune all axes but query groups, which ModelOpt cannot prune."""


def test_pruned_weights_are_the_teachers_at_the_saved_indices(
    teacher: Path, importance: Importance, tmp_path: Path
) -> None:
    student, shape, kept = prune(teacher, importance, tmp_path, **TARGETS)
    kept.save(tmp_path)
    saved = KeptIndices.load(tmp_path)
    assert saved.layers == kept.layers
    weights, teacher_weights = dict(convert.hf_weights(student)), dict(convert.hf_weights(teacher))
    assert sum(weight.numel() for weight in weights.values()) == shape.parameters()
    hidden = saved.indices["hidden_size"]
    for index, number in enumerate(saved.layers):
        ffn, heads = (
            saved.indices[f"layers.{number}.{axis}"]
            for axis in ("ffn_hidden_size", "num_attention_heads")
        )
        assert (len(hidden), len(ffn), len(heads)) == (40, 72, 2)  # as in ``TARGETS``
        head_columns = torch.cat([torch.arange(16) + 16 * head for head in heads])
        for name, columns in (("mlp.down_proj", ffn), ("self_attn.o_proj", head_columns)):
            weight = teacher_weights[f"model.layers.{number - 1}.{name}.weight"]
            expected = weight[hidden][:, columns]
            assert torch.equal(weights[f"model.layers.{index}.{name}.weight"], expected)


def test_pruning_gives_the_logits_of_modelopts_own_pruning(
    teacher: Path, calibration: torch.Tensor, importance: Importance, tmp_path: Path
) -> None:
    """ModelOpt's pruning also sorts channels by importance, which does not change the logits."""
    student, _, _ = prune(teacher, importance, tmp_path, "block_influence", **TARGETS)
    register_rms_norm()
    core = parity.load_core(teacher)

    def forward(model: Any) -> None:
        for tokens in calibration.split(4):
            model(tokens, torch.arange(32)[None].expand(4, 32), None)

    divisors = get_mcore_minitron_config(
        hidden_size_divisor=8, ffn_hidden_size_divisor=8, num_layers_divisor=1
    )
    core, _ = mtp.prune(
        core.eval(),
        mode=[("mcore_minitron", divisors)],
        constraints={"export_config": TARGETS},
        dummy_input=None,
        config={"forward_loop": forward},
    )
    expected = parity.core_logits(core, calibration)
    our_core = parity.load_core(student)
    actual = parity.core_logits(our_core, calibration)
    noise = measure_ulp_noise(our_core, lambda: parity.core_logits(our_core, calibration))
    torch.testing.assert_close(actual, expected, rtol=0, atol=NOISE_FACTOR * noise)


def logits_without(folder: Path, dropped: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """Returns the logits of a Hugging Face model without the layers ``dropped``, counted from 1."""
    model = load_causal_lm(folder)
    kept_layers = [layer for n, layer in enumerate(model.model.layers, 1) if n not in dropped]
    for index, layer in enumerate(kept_layers):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(kept_layers)
    model.config.num_hidden_layers = len(kept_layers)
    with torch.no_grad():
        result: torch.Tensor = model(tokens, use_cache=False).logits
    return result


def test_loss_scores_equal_the_loss_of_a_model_without_the_layers(
    even_llama: Path, calibration: torch.Tensor, importance: Importance
) -> None:
    tokens = calibration[:8]  # ``SCORE.num_loss_samples`` sequences
    mask = tokens[:, :-1] != DOCUMENT_END  # the start of the next document is not predicted
    assert 0 < (~mask).sum() < mask.sum(), "some predictions must be masked"

    def loss(*dropped: int) -> float:
        """Returns the mean loss without some layers, over the predictions that ``mask`` selects."""
        predictions = logits_without(even_llama, list(dropped), tokens)[:, :-1][mask]
        return torch.nn.functional.cross_entropy(predictions, tokens[:, 1:][mask]).item()

    assert importance.teacher_loss == pytest.approx(loss(), abs=1e-4)
    for layer, change in importance.layers["loss"].items():
        assert change == pytest.approx(loss(layer) - loss(), abs=1e-4)
    for first, change in importance.blocks[2].items():
        assert change == pytest.approx(loss(first, first + 1) - loss(), abs=1e-4)


def test_layers_are_chosen_by_the_method(importance: Importance) -> None:
    loss_scores = importance.layers["loss"]
    all_layers = [1, 2, 3, 4]
    assert layers_to_keep(importance, "loss", 4) == all_layers
    least_important = min(loss_scores, key=lambda layer: loss_scores[layer])
    assert {*all_layers} - {*layers_to_keep(importance, "loss", 3)} == {least_important}
    start = min(importance.blocks[2], key=lambda first: importance.blocks[2][first])
    assert {*all_layers} - {*layers_to_keep(importance, "block", 2)} == {start, start + 1}
    with pytest.raises(RecipeError, match=r"stages.score.block_sizes=\[3\]"):
        layers_to_keep(importance, "block", 1)  # drops 3 layers, but ``SCORE`` has blocks of 2
    with pytest.raises(RecipeError, match="num_loss_samples"):
        layers_to_keep(replace(importance, layers={"block_influence": loss_scores}), "loss", 2)


DEAD_NEURONS, DEAD_GROUP, DEAD_LAYER, DEAD_CHANNELS = [3, 50, 127], 1, 2, [5, 40]  # without effect


def make_dead(model: Any) -> None:
    """Sets weights to 0, so that neurons, a query group and a layer have no effect."""
    layers = model.model.layers
    for layer in layers:
        layer.mlp.up_proj.weight[DEAD_NEURONS] = 0
        layer.self_attn.v_proj.weight[16 * DEAD_GROUP : 16 * (DEAD_GROUP + 1)] = 0  # 16: head size
    layers[DEAD_LAYER - 1].self_attn.o_proj.weight[:] = 0
    layers[DEAD_LAYER - 1].mlp.down_proj.weight[:] = 0


def test_dead_neurons_groups_and_layers_are_pruned_without_effect(
    even_llama: Path, calibration: torch.Tensor, tmp_path: Path
) -> None:
    checkpoint = convert_changed(tmp_path / "teacher", even_llama, make_dead)
    importance = score(checkpoint, calibration)
    assert importance.layers["loss"][DEAD_LAYER] == pytest.approx(0, abs=1e-6)
    targets = {"num_layers": 3, "ffn_hidden_size": 125, "num_query_groups": 1}  # drops the dead
    student, _, kept = prune(checkpoint, importance, tmp_path, "block_influence", **targets)
    assert DEAD_LAYER not in kept.layers
    for layer in kept.layers:
        neurons = kept.indices[f"layers.{layer}.ffn_hidden_size"].tolist()
        assert sorted({*range(128)} - {*neurons}) == DEAD_NEURONS
        assert kept.indices[f"layers.{layer}.num_attention_heads"].tolist() == [0, 1]
    expected = logits(checkpoint, calibration)
    torch.testing.assert_close(logits(student, calibration), expected, rtol=1e-5, atol=1e-5)


def test_a_dead_head_and_dead_channels_have_the_lowest_scores(
    even_llama: Path, calibration: torch.Tensor, tmp_path: Path
) -> None:
    """Head 1 attends equally to all earlier tokens. Its output is the mean of values, near 0."""

    def make_head_and_channels_dead(model: Any) -> None:
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight *= 50  # so that head 0 attends to single tokens
            attention.q_proj.weight[16:32] = 0  # head 1, which has 16 channels
            attention.o_proj.weight[:, 16:32] = 0
            for projection in (attention.o_proj, layer.mlp.down_proj):
                projection.weight[DEAD_CHANNELS] = 0
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[DEAD_CHANNELS] = 0

            # Changes v_proj before the layer uses it: the mean input then gives values of 0.
            def remove_mean(_: Any, __: Any, out: torch.Tensor, module: Any = attention) -> None:
                mean = out.mean(dim=(0, 1))
                weight = module.v_proj.weight
                weight -= torch.outer(weight @ mean, mean) / mean.square().sum()

            layer.input_layernorm.register_forward_hook(remove_mean)
        model(calibration)  # one forward pass runs all hooks

    checkpoint = convert_changed(tmp_path / "teacher", even_llama, make_head_and_channels_dead)
    scores = score(checkpoint, calibration).widths
    for layer in range(1, EVEN["num_hidden_layers"] + 1):
        heads = scores[f"layers.{layer}.num_attention_heads"]
        assert heads[1] < 0.9 * heads[0]  # lower by more than rounding
    assert sorted(scores["hidden_size"].argsort()[:2].tolist()) == DEAD_CHANNELS
    assert scores["hidden_size"][DEAD_CHANNELS].max() == 0


def assert_same_scores(scores: Importance, expected: Importance) -> None:
    assert scores.teacher_loss == pytest.approx(expected.teacher_loss, rel=1e-6)
    for method, values in expected.layers.items():
        assert scores.layers[method] == pytest.approx(values, rel=1e-5, abs=1e-6)
    assert scores.widths.keys() == expected.widths.keys()
    for name, values in expected.widths.items():
        torch.testing.assert_close(scores.widths[name], values, rtol=1e-5, atol=1e-6)


def test_scores_do_not_depend_on_micro_batches_and_chunks_of_logits(
    teacher: Path,
    calibration: torch.Tensor,
    importance: Importance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = replace(SCORE, block_sizes=[])
    limit = 4 * VOCABULARY * 50  # bytes of the float32 logits of 50 positions
    monkeypatch.setattr("recipes.evaluation.predictions.LOGITS_BYTES", limit)
    with LogitsWatch(VOCABULARY) as watch:  # records the largest logits
        scores = score(teacher, calibration, replace(cfg, micro_batch_size=3))
    assert watch.max_positions == 50
    assert_same_scores(scores, importance)
    no_scores = replace(cfg, num_loss_samples=0)  # still measures the teacher's loss
    configs = [replace(no_scores, micro_batch_size=size) for size in (1, 8)]
    first, second = (score(teacher, calibration, config).teacher_loss for config in configs)
    assert first == pytest.approx(second, rel=1e-6)


def test_padding_and_short_text_and_noise_in_place_of_text_are_refused(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise_cfg = replace(SCORE, calibration="random", num_calibration_samples=4, seq_length=32)
    text_cfg = replace(noise_cfg, calibration="text")
    data = Input(tmp_path, bare_manifest("prepare_data", "dataset", None))
    noise = calibration_text(noise_cfg, data, teacher).tokens
    assert torch.equal(noise, calibration_text(noise_cfg, data, teacher).tokens)  # a fixed seed
    with pytest.raises(RecipeError, match="hardly below chance"):
        score(teacher, noise, text_cfg)
    assert score(teacher, noise, replace(noise_cfg, block_sizes=[])).widths
    padding = torch.zeros(3, 32, dtype=torch.int64)
    padded = TextSequences.of(torch.cat([noise[:1], padding]))  # one micro batch
    monkeypatch.setattr("recipes.pruning.scoring.read_sequences", lambda *_: padded)
    for ranks, message in (("1", "is one token"), ("2", "1 micro batch.* 2 data-parallel ranks")):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        with pytest.raises(RecipeError, match=message):
            calibration_text(text_cfg, data, teacher)


def test_weights_that_do_not_match_the_shape_are_refused(teacher: Path, tmp_path: Path) -> None:
    shape = replace(nemo.architecture_of(teacher), ffn_hidden_size=96)  # the weights have 128
    weights = prune_weights(teacher, KeptIndices([1, 2, 3, 4], {}), shape.kv_channels)
    with pytest.raises(RecipeError, match="according to the config"):
        save_weights(teacher, shape, weights, tmp_path / "even.nemo")
    assert not (tmp_path / "even.nemo").exists()


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(RecipeError, match="add its axes to AXES"):
        prune_weight("model.layers.0.mlp.router.weight", torch.ones(2, 2), KeptIndices([1], {}), 16)


RANK_SCRIPT = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from recipes.core.stage import rank
from tests.cpu.pruning.test_minitron import SCORE, score
tokens = torch.load(sys.argv[2], weights_only=True)
stages = int(sys.argv[4])
scores = score(Path(sys.argv[1]), tokens, replace(SCORE, pipeline_model_parallel_size=stages))
if rank() == 0:
    scores.save(Path(sys.argv[3]))
"""
"""Program of each rank. Arguments: checkpoint, file of tokens, folder for scores, stages."""


def score_on_ranks(
    teacher: Path, calibration: torch.Tensor, ranks: int, stages: int, folder: Path
) -> Importance:
    """Scores a checkpoint on ``ranks / stages`` data-parallel pipelines of ``stages`` stages."""
    (folder / "ranks.py").write_text(RANK_SCRIPT)
    torch.save(calibration, folder / "tokens.pt")
    paths = folder / "ranks.py", teacher, folder / "tokens.pt", folder
    run_ranks(*map(str, paths), str(stages), number=ranks)
    return Importance.load(folder)


def test_two_data_parallel_pipelines_give_the_scores_of_one_rank(
    teacher: Path, calibration: torch.Tensor, importance: Importance, tmp_path: Path
) -> None:
    scores = score_on_ranks(teacher, calibration, 4, 2, tmp_path)  # 2 pipelines of 2 stages
    assert scores.blocks[2] == pytest.approx(importance.blocks[2], rel=1e-5, abs=1e-6)
    assert_same_scores(scores, importance)


def test_two_data_parallel_ranks_give_the_expert_scores_of_one_rank(
    calibration: torch.Tensor, text_file: Path, tmp_path: Path
) -> None:
    write_tiny_model(tmp_path / "hf", text_file, "qwen3_moe", **EVEN)
    convert.to_nemo(tmp_path / "hf", tmp_path / "moe.nemo")
    expected = score(tmp_path / "moe.nemo", calibration)
    assert any("experts" in name for name in expected.widths)
    assert_same_scores(score_on_ranks(tmp_path / "moe.nemo", calibration, 2, 1, tmp_path), expected)
