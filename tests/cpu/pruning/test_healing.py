"""Least-squares reconstruction is exact where possible, and always better than pruning alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nemo_convert.hf import load_causal_lm
from recipes.pruning.healing import RIDGE_TOKENS, Decoder, LeastSquares, heal
from recipes.pruning.kept import KeptIndices, prune_weight, student_name
from tests.support.models import EVEN, FAMILIES

DENSE = [family for family, fields in FAMILIES.items() if "num_experts" not in fields]
"""Model types of the families without experts."""
HEAD_SIZE = EVEN["head_dim"]
KEPT_CHANNELS = EVEN["hidden_size"] // 2
Tensors = dict[str, torch.Tensor]


def random_model(family: str, **fields: Any) -> Any:
    """Makes a tiny model of two layers. All weights are random, including norms and biases."""
    torch.manual_seed(0)
    shape = {**EVEN, **FAMILIES[family], "num_hidden_layers": 2, "initializer_range": 0.1, **fields}
    config = AutoConfig.for_model(family, max_position_embeddings=64, **shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, which transformers sets to 1 and 0
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(sequences: int = 16, seed: int = 1) -> torch.Tensor:
    """Returns random token ids [sequences, 32]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(EVEN["vocab_size"], (sequences, 32), generator=generator)


@torch.no_grad()
def logits(model: Any, text: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(text, use_cache=False).logits
    return result


def prune_and_heal(
    model: Any,
    kept: KeptIndices,
    shape: dict[str, int],
    ridge_tokens: float | None,
    text: torch.Tensor | None = None,
) -> Any:
    """Prunes a model, and heals the pruned model unless ``ridge_tokens`` is ``None``.

    Args:
        model: The teacher.
        kept: What the student keeps of the teacher.
        shape: Fields of the student's config that differ from the teacher's, except for its depth.
        ridge_tokens: Ridge strength of the healing, see ``heal``.
        text: Calibration text, by default ``tokens()``.
    """
    config = {**model.config.to_dict(), **shape, "num_hidden_layers": len(kept.layers)}
    config.pop("layer_types", None)  # has an entry for each layer of the teacher
    names = dict(model.named_parameters())  # unlike the state dict, does not have a tied head
    teacher_weights = {name: w for name, w in model.state_dict().items() if name in names}
    weights = {
        name: prune_weight(teacher_name, weight, kept, HEAD_SIZE)
        for teacher_name, weight in teacher_weights.items()
        if (name := student_name(teacher_name, kept)) is not None
    }
    if ridge_tokens is not None:
        teacher = Decoder(model.config.to_dict(), teacher_weights)
        batches = (tokens() if text is None else text).split(4)
        heal(teacher, Decoder(config, weights), kept, batches, ridge_tokens=ridge_tokens)
    student = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    student.load_state_dict(weights, strict=False)  # a tied head is not among the weights
    student.tie_weights()
    return student


@torch.no_grad()
def make_half_redundant(model: Any) -> tuple[KeptIndices, dict[str, int]]:
    """Makes the second half of channels, heads and neurons linear combinations of the first half.

    A student that keeps the first half can therefore be reconstructed exactly. The second half of
    the channels is a rotation of the first half, so both have the same mean square. RMSNorm then
    divides the kept channels by the same number in the student as in the teacher.

    Returns:
        The indices of the first half, and the student's sizes as fields of ``config.json``.
    """
    rotation = torch.linalg.qr(torch.randn(KEPT_CHANNELS, KEPT_CHANNELS)).Q
    norm, embedding = model.model.norm.weight, model.model.embed_tokens.weight
    embedding[:, KEPT_CHANNELS:] = embedding[:, :KEPT_CHANNELS] @ rotation.T
    # Healing cannot move norm weights that differ between channels into a tied head.
    if model.config.tie_word_embeddings:
        norm.fill_(1.5)
    indices: Tensors = {"hidden_size": torch.arange(KEPT_CHANNELS)}
    for number, layer in enumerate(model.model.layers, 1):
        attention, mlp = layer.self_attn, layer.mlp
        value_mix = torch.randn(HEAD_SIZE, HEAD_SIZE)
        queries, keys, values = attention.q_proj, attention.k_proj, attention.v_proj
        # The first half of the heads is kept: 2 of 4 for queries, 1 of 2 for keys and values.
        # The second half has the same queries and keys, so the same attention, and mixed values.
        for projection, num_heads in ((queries, 2), (keys, 1), (values, 1)):
            for tensor in projection.parameters():  # the weight, and the bias if there is one
                first = tensor[: num_heads * HEAD_SIZE]
                second = value_mix @ first if projection is values else first
                tensor[num_heads * HEAD_SIZE :] = second
        # Of 128 neurons, neuron n + 64 gets a multiple of the activation of neuron n.
        mlp.gate_proj.weight[64:] = mlp.gate_proj.weight[:64]
        mlp.up_proj.weight[64:] = torch.randn(64, 1) * mlp.up_proj.weight[:64]
        for projection in (attention.o_proj, mlp.down_proj):  # they write to the hidden channels
            projection.weight[KEPT_CHANNELS:] = rotation @ projection.weight[:KEPT_CHANNELS]
        indices |= {f"layers.{number}.ffn_hidden_size": torch.arange(64)}
        indices |= {f"layers.{number}.num_query_groups": torch.arange(1)}
        indices |= {f"layers.{number}.num_attention_heads": torch.arange(2)}
    shape = {
        "hidden_size": KEPT_CHANNELS,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return KeptIndices([1, 2], indices), shape


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("tied", [False, True])
def test_pruned_linear_combinations_are_restored(family: str, tied: bool) -> None:
    """Compares logits on text that was not used for calibration."""
    model = random_model(family, tie_word_embeddings=tied)
    kept, shape = make_half_redundant(model)
    unseen = tokens(4, seed=2)
    expected = logits(model, unseen)
    spread = expected.std()
    pruned = logits(prune_and_heal(model, kept, shape, ridge_tokens=None), unseen)
    assert (pruned - expected).std() > 0.5 * spread
    # Almost no ridge, which would keep the fit from being exact.
    healed = logits(prune_and_heal(model, kept, shape, ridge_tokens=1e-10), unseen)
    torch.testing.assert_close(healed, expected, rtol=0, atol=2e-3 * spread.item())


@pytest.mark.parametrize("family", DENSE)
def test_an_unpruned_model_does_not_change(family: str) -> None:
    model = random_model(family)
    healed = prune_and_heal(model, KeptIndices([1, 2], {}), {}, ridge_tokens=1e-3)
    for name, weight in model.state_dict().items():
        assert torch.equal(healed.state_dict()[name], weight), name


def test_least_squares_never_increase_the_error() -> None:
    """Fits a weight with 8 outputs and 32 inputs, of which 16 are duplicates, to noise."""
    torch.manual_seed(0)
    inputs, missing_outputs = torch.randn(1, 24, 32), torch.randn(1, 24, 8)  # 24 tokens
    inputs[..., 16:] = inputs[..., :16]  # G is singular, so only the ridge makes it solvable
    fit = LeastSquares(torch.zeros(8, 32))
    for start in range(0, 24, 8):
        fit.add(inputs[:, start : start + 8], missing_outputs[:, start : start + 8])
    errors = []
    for ridge_tokens in (1e-2, 1.0, 100.0, 1e8):
        remainder = missing_outputs - inputs @ fit.change(ridge_tokens).T
        errors.append(remainder.square().sum().item())
    before = missing_outputs.square().sum().item()
    assert errors == sorted(errors)  # a stronger ridge leaves a larger error
    assert errors[0] < errors[1] < 0.5 * before  # 16 distinct inputs fit most of 24 tokens
    assert errors[-1] == pytest.approx(before, rel=1e-4)  # so strong a ridge allows no change
    assert max(errors) <= before
    # Another solver of the normal equations gives the same change.
    x, y = inputs[0].double(), missing_outputs[0].double()
    ridge = torch.eye(32).double() * x.square().mean()  # λ·I for a ridge of one token
    exact = torch.linalg.lstsq(x.T @ x + ridge, x.T @ y, driver="gelsd").solution
    torch.testing.assert_close(fit.change(1.0), exact.T.float(), rtol=1e-3, atol=1e-4)
    change = fit.change(100.0)
    fit.add(inputs, missing_outputs)
    # The ridge is relative to the number of tokens, so doubling both gives the same solution.
    torch.testing.assert_close(fit.change(200.0), change)


AXES = {
    "hidden": ({"hidden_size": 48}, {"hidden_size": 48}),
    "feed-forward": ({"intermediate_size": 96}, {"ffn_hidden_size": 96}),
    "depth": ({}, {}),
    "groups": (
        {"num_attention_heads": 2, "num_key_value_heads": 1},
        {"num_attention_heads": 2, "num_query_groups": 1},
    ),
}
"""Maps each way of pruning to the student's fields in ``config.json``, and to the number of indices
that each axis of ``KeptIndices`` keeps. ``depth`` drops layer 3."""


@pytest.mark.parametrize("names", [*([name] for name in AXES), list(AXES)], ids="+".join)
def test_a_healed_student_is_closer_to_its_teacher(
    names: list[str], even_llama: Path, text_file: Path
) -> None:
    """Measures the KL on the calibration text and on other text of the same source."""
    ids = AutoTokenizer.from_pretrained(even_llama)(text_file.read_text()[: 1 << 16])["input_ids"]
    sequences = torch.tensor(ids[: 40 * 64]).view(40, 64)  # 40 sequences of 64 tokens
    model = load_causal_lm(even_llama)
    shape: dict[str, int] = {}
    indices: Tensors = {}
    for name in names:
        fields, counts = AXES[name]
        shape |= fields
        for axis, count in counts.items():
            # All layers share the hidden channels. Other axes have a key for each layer.
            prefixes = [""] if axis == "hidden_size" else [f"layers.{n}." for n in range(1, 5)]
            indices |= {f"{prefix}{axis}": torch.arange(count) for prefix in prefixes}
    kept = KeptIndices([1, 2, 4] if "depth" in names else [1, 2, 3, 4], indices)
    calibration, unseen = sequences[:32], sequences[32:]
    students = [
        prune_and_heal(model, kept, shape, ridge_tokens, calibration)
        for ridge_tokens in (None, RIDGE_TOKENS)
    ]
    for text in (calibration, unseen):
        expected = logits(model, text).log_softmax(-1)
        pruned_kl, healed_kl = (
            functional.kl_div(
                logits(student, text).log_softmax(-1),
                expected,
                log_target=True,
                reduction="batchmean",
            ).item()
            for student in students
        )
        assert healed_kl < 0.8 * pruned_kl  # clearly lower, not only by rounding
