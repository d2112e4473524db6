"""Importance of channels, heads and layers, from forward passes of a Megatron model.

ModelOpt computes the scores of widths (channels, heads, experts) from activations
(arXiv:2407.14679). Layers have two scores. Block influence is 1 - cos of the angle between a
layer's input and output (arXiv:2403.03853). The loss score is the rise of the LM loss if the layer
is left out. Layers may be split over pipeline ranks, and micro batches over data-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from modelopt.torch import nas
from modelopt.torch.prune.plugins.mcore_minitron import (
    ImportanceEstimatorRegistry,
    get_mcore_minitron_config,
)
from torch import Tensor, nn
from torch.nn import functional

from nemo_convert import nemo
from recipes.backend.device import device
from recipes.backend.local_layers import (
    register_rms_norm,
    restore_fused_attention,
    use_local_layers,
)
from recipes.backend.without_cuda import enable as enable_patches_without_cuda
from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.core.precision import dtype_of
from recipes.core.stage import Input, world_size
from recipes.data.token_sequences import TextSequences, read_sequences
from recipes.evaluation.predictions import chunks, float32_head, require_better_than_chance
from recipes.pruning.kept import Importance
from recipes.pruning.settings import ScoreConfig

MAX_TOKEN_FRACTION = 0.5
"""If one token is a larger fraction of the calibration text, the text is refused as padding."""


def calibration_text(cfg: ScoreConfig, data: Input, teacher: Path) -> TextSequences:
    """Returns calibration text, or random tokens with ``calibration=random``.

    Raises:
        RecipeError: The text is mostly one token, or has fewer micro batches than there are
            data-parallel ranks.
    """
    if cfg.calibration == "random":
        vocabulary = nemo.architecture_of(teacher).vocab_size
        shape = (cfg.num_calibration_samples, cfg.seq_length)
        generator = torch.Generator().manual_seed(cfg.seed)
        return TextSequences.of(torch.randint(vocabulary, shape, generator=generator))
    text = read_sequences(data, "calibration", cfg.seq_length, cfg.num_calibration_samples)
    data_ranks = world_size() // cfg.pipeline_model_parallel_size
    batches = math.ceil(len(text) / cfg.micro_batch_size)
    if batches < data_ranks:
        raise RecipeError(
            f"the calibration text has only {len(text)} sequence(s), which are {batches} micro "
            f"batch(es) for {data_ranks} data-parallel ranks.",
            "use fewer ranks, a smaller micro_batch_size, or more calibration text (data.sources, "
            "stages.prepare_data.calibration_fraction)",
        )
    fraction = text.tokens.flatten().bincount().max().item() / text.tokens.numel()
    if fraction > MAX_TOKEN_FRACTION:
        raise RecipeError(
            f"{fraction:.0%} of the calibration text is one token: it is padding or mock data.",
            "calibrate on real text (data.sources)",
        )
    return text


def score_checkpoint(
    cfg: ScoreConfig, teacher: Path, text: TextSequences, log: MetricsLog
) -> Importance:
    """Computes the importance scores of a NeMo checkpoint on calibration sequences.

    Raises:
        RecipeError: The model's loss on text is near chance.
    """
    parallel = nemo.Parallelism(pipeline=cfg.pipeline_model_parallel_size)
    enable_patches_without_cuda()
    nemo.initialize(parallel)
    model = nemo.restore_model(teacher)
    # ModelOpt needs separate norms, but TransformerEngine fuses them into the linear layers.
    use_local_layers(model.config)
    core = nemo.build_core(model, parallel, dtype_of(cfg.precision))
    nemo.load_weights(core, teacher)
    core.eval()
    ablation = LayerAblation(core, text.first(cfg.loss_sequences), cfg.micro_batch_size, log)
    [teacher_loss] = ablation.losses([()])  # one empty block: no layer is left out
    if cfg.calibration == "text":
        require_better_than_chance(
            teacher_loss, core.vocab_size, ", or measure on noise: stages.score.calibration=random"
        )
    layers: dict[str, dict[int, float]] = {}
    blocks: dict[int, dict[int, float]] = {}
    if cfg.num_loss_samples:
        layers["loss"] = _loss_rises(ablation, 1, teacher_loss)
        for size in cfg.block_sizes or ():
            blocks[size] = _loss_rises(ablation, size, teacher_loss)
    # This is the last step, because it converts the model for ModelOpt.
    influence, widths = _influence_and_widths(core, text, cfg.micro_batch_size, log)
    return Importance(teacher_loss, {"block_influence": influence, **layers}, blocks, widths)


def _loss_rises(ablation: LayerAblation, block_size: int, teacher_loss: float) -> dict[int, float]:
    """Returns the rise of the LM loss, in nats, without each block, by the block's first layer."""
    first_layers = range(1, ablation.num_layers - block_size + 2)
    losses = ablation.losses([range(first, first + block_size) for first in first_layers])
    return {first: loss - teacher_loss for first, loss in zip(first_layers, losses, strict=True)}


class LayerAblation:
    """Computes the loss of a Megatron model without some layers. All ranks call it together."""

    def __init__(
        self, core: nn.Module, text: TextSequences, micro_batch_size: int, log: MetricsLog
    ) -> None:
        self._core, self._text, self._log = core, text, log
        self._micro_batch_size = micro_batch_size
        self._layers = list(core.decoder.layers)  # only those of this rank
        self._numbers = [layer.layer_number for layer in self._layers]  # counted from 1
        self.num_layers = core.config.num_layers
        if core.post_process:  # this rank has the head, and computes the losses
            tied = core.share_embeddings_and_output_weights
            weight = core.shared_embedding_or_output_weight() if tied else core.output_layer.weight
            self._head = float32_head(weight.detach())

    @torch.no_grad()
    def losses(self, blocks: Sequence[Collection[int]]) -> list[float]:
        """Returns the mean LM loss without each block of layers, in nats; the same on all ranks.

        A block is a set of layer numbers, counted from 1.
        """
        sums = torch.zeros(len(blocks), dtype=torch.float64)  # losses, summed over predictions
        for done, batch in _batches(self._text, self._micro_batch_size):
            tokens, mask = batch.tokens.to(device()), batch.prediction_mask.to(device())
            # The hidden states before a block do not depend on the block: all blocks share them.
            states = _run_layers(self._core, self._layers, tokens)
            for index, block in enumerate(blocks):
                sums[index] += self._loss_without(block, states, tokens, mask)
            self._log.progress("leave out", done, len(self._text), blocks=len(blocks))
        sums = sums.to(device())  # 0 on all pipeline ranks but the last
        torch.distributed.broadcast(
            sums,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        means: list[float] = (_sum_over_data_ranks(sums) / self._text.predictions).tolist()
        return means

    def _loss_without(
        self, block: Collection[int], states: list[Tensor], tokens: Tensor, mask: Tensor
    ) -> float:
        """Returns the loss without a block, summed over predictions, on the last pipeline rank.

        Earlier ranks return 0, and send the output to the next rank if it differs from ``states``.
        ``states`` are the result of ``_run_layers`` for ``tokens`` [b, s] with all layers. ``mask``
        [b, s - 1] is true for predictions in the loss.
        """
        input_changes = any(number < self._numbers[0] for number in block)
        if input_changes:  # an earlier rank sends the input without the block
            start, hidden = 0, _receive(states[0])
        else:  # the layers of this rank before the first one that is left out are not rerun
            indices_in_block = (i for i, number in enumerate(self._numbers) if number in block)
            start = next(indices_in_block, len(self._layers))
            hidden = states[start]
        rotary = self._core.rotary_pos_emb(tokens.shape[1])
        for layer in self._layers[start:]:
            if layer.layer_number not in block:
                hidden = _run_layer(layer, hidden, rotary)
        if self._core.post_process:
            return self._lm_loss(hidden, tokens, mask)
        output_changes = any(number <= self._numbers[-1] for number in block)
        if output_changes:  # the next rank waits in ``_receive``
            _send(hidden)
        return 0.0

    def _lm_loss(self, hidden: Tensor, tokens: Tensor, mask: Tensor) -> float:
        """Returns the LM loss of hidden states [s, b, h], summed over predictions in ``mask``."""
        # Position i predicts token i + 1. ``tokens`` and ``mask`` are transposed to [s, b].
        hidden, targets = hidden[:-1][mask.T], tokens.T[1:][mask.T]
        total = 0.0
        for rows in chunks(len(targets), self._core.vocab_size):
            logits = self._head(self._core.decoder.final_layernorm(hidden[rows]))
            total += float(functional.cross_entropy(logits, targets[rows], reduction="sum"))
        return total


def _run_layers(core: nn.Module, layers: Sequence[nn.Module], tokens: Tensor) -> list[Tensor]:
    """Runs this rank's layers, and exchanges hidden states with the neighboring pipeline ranks.

    Returns:
        The input of each layer of this rank, then the last layer's output, all [s, b, h].
    """
    if core.pre_process:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None].expand_as(tokens)
        states = [core.embedding(input_ids=tokens, position_ids=positions)]
    else:
        shape = (tokens.shape[1], tokens.shape[0], core.config.hidden_size)
        empty = torch.empty(shape, dtype=core.config.params_dtype, device=tokens.device)
        states = [_receive(empty)]
    rotary = core.rotary_pos_emb(tokens.shape[1])
    for layer in layers:
        states.append(_run_layer(layer, states[-1], rotary))
    if not core.post_process:
        _send(states[-1])
    return states


def _run_layer(layer: nn.Module, hidden: Tensor, rotary: Tensor) -> Tensor:
    """Returns the output of a layer. Attention is causal without a mask."""
    output: Tensor = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)[0]
    return output


def _receive(like: Tensor) -> Tensor:
    """Receives hidden states from the previous pipeline rank, with shape and dtype of ``like``."""
    hidden = torch.empty_like(like)
    torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
    return hidden


def _send(hidden: Tensor) -> None:
    """Sends hidden states to the next pipeline rank."""
    torch.distributed.send(hidden, parallel_state.get_pipeline_model_parallel_next_rank())


class _Estimators(ImportanceEstimatorRegistry):  # type: ignore[misc]
    """ModelOpt's importance estimators, changed to skip experts without a token in a micro batch.

    The mean over no tokens is NaN. One NaN would make all scores of the expert's width NaN.
    """

    def register_hook(
        self, module: nn.Module, hook_fn: Callable[..., None], *args: Any, **kwargs: Any
    ) -> None:
        """Registers ``hook_fn``, but does not call it on an empty input tensor."""

        def hook(module: nn.Module, inputs: tuple[Any, ...], *output: Any) -> None:
            has_no_tokens = bool(inputs) and inputs[0].numel() == 0
            if not has_no_tokens:
                hook_fn(module, inputs, *output)

        super().register_hook(module, hook, *args, **kwargs)


@torch.no_grad()
def _influence_and_widths(
    core: nn.Module, text: TextSequences, batch_size: int, log: MetricsLog
) -> tuple[dict[int, float], dict[str, Tensor]]:
    """Returns {layer: block influence}, and ``Importance.widths``, from one pass over the text."""
    register_rms_norm()
    # ModelOpt scores only converted models. The divisors matter only if ModelOpt prunes.
    divisors = get_mcore_minitron_config(
        hidden_size_divisor=1,
        ffn_hidden_size_divisor=1,
        num_moe_experts_divisor=1,
        num_layers_divisor=1,
    )
    nas.convert(core, mode=[("mcore_minitron", divisors)])
    restore_fused_attention(core)  # ``nas.convert`` has replaced it
    registry = _Estimators(core)  # its hooks collect ModelOpt's sums
    layers = list(core.decoder.layers)
    sums = torch.zeros(len(layers), dtype=torch.float64)  # block influence, summed over sequences
    for done, batch in _batches(text, batch_size):
        states = _run_layers(core, layers, batch.tokens.to(device()))
        for index, (before, after) in enumerate(pairwise(states)):
            cosine = functional.cosine_similarity(before.float(), after.float(), dim=2)  # [s, b]
            sums[index] += (1 - cosine).mean(dim=0).sum().item()  # mean over positions
        log.progress("calibrate", done, len(text))
    sums = _sum_over_data_ranks(sums)
    influence = {
        layer.layer_number: float(total) / len(text)
        for layer, total in zip(layers, sums, strict=True)
    }
    scores_by_rank = _gather_ranks((influence, _width_scores(core, layers)))
    registry.cleanup()
    all_influence: dict[int, float] = {}
    widths: dict[str, Tensor] = {}
    for rank_influence, rank_widths in scores_by_rank:
        all_influence |= rank_influence
        # The score of hidden channels is a sum over all ranks. Other scores belong to one rank.
        hidden = rank_widths.pop("hidden_size") + widths.pop("hidden_size", 0)
        widths |= {"hidden_size": hidden, **rank_widths}
    return all_influence, widths


def _width_scores(core: nn.Module, layers: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Returns this pipeline rank's scores: roots of the sums of squares that ModelOpt collected.

    Keys are those of ``Importance.widths``. ``hidden_size`` is a sum over only this rank's norms.
    """
    # ModelOpt's sums are in ``_activations``. Those of ``core`` are a tensor [hidden] per norm.
    norm_scores = [_sum_over_data_ranks(squares).sqrt() for squares in core._activations.values()]
    scores = {"hidden_size": torch.stack(norm_scores).sum(dim=0)}
    for layer in layers:
        name = f"layers.{layer.layer_number}"
        if core.config.num_moe_experts:
            scores |= _expert_scores(name, layer.mlp.experts)
        else:
            scores[f"{name}.ffn_hidden_size"] = _sum_over_data_ranks(layer.mlp._activations).sqrt()
        channels = _sum_over_data_ranks(layer.self_attention._activations)
        channels_of_heads = channels.view(-1, core.config.kv_channels)
        scores[f"{name}.num_attention_heads"] = channels_of_heads.sum(dim=1).sqrt()
    return {name: score.float().cpu().contiguous() for name, score in scores.items()}


def _expert_scores(layer: str, experts: nn.Module) -> dict[str, Tensor]:
    """Returns the scores of a layer's experts and of each expert's channels.

    An expert's score is the mean norm of its output. ``layer`` is the keys' prefix ``layers.{i}``.
    """
    sums = {name: _sum_over_data_ranks(values) for name, values in experts._activations.items()}
    means = sums["expert_l2_scores"] / sums["expert_sample_counts"].clamp(min=1)
    scores = {f"{layer}.num_moe_experts": means}
    for index, expert in enumerate(experts.local_experts):
        squares = expert._activations
        if squares is None:  # no token was routed to this expert
            squares = torch.zeros(expert.config.moe_ffn_hidden_size)
        channel_scores = _sum_over_data_ranks(squares).sqrt()
        scores[f"{layer}.experts.{index}.moe_ffn_hidden_size"] = channel_scores
    return scores


def _sum_over_data_ranks(values: Tensor) -> Tensor:
    """Returns the sum of ``values`` over the data-parallel ranks."""
    total = values.to(device())  # ModelOpt keeps some sums on the CPU, which NCCL cannot reduce
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total


def _gather_ranks(value: Any) -> list[Any]:
    """Returns the value of each pipeline rank, in the order of ranks."""
    group = parallel_state.get_pipeline_model_parallel_group()
    values = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group)
    return values


def _batches(text: TextSequences, size: int) -> Iterator[tuple[int, TextSequences]]:
    """Yields this data-parallel rank's micro batches of ``size`` sequences.

    Each item is (number of sequences up to the end of the batch, batch). A micro batch is never
    divided between ranks, because ModelOpt's scores of an expert's width depend on which sequences
    are in the same micro batch.
    """
    first = parallel_state.get_data_parallel_rank() * size
    step = parallel_state.get_data_parallel_world_size() * size
    for start in range(first, len(text), step):
        batch = text[start : start + size]
        yield start + len(batch), batch
