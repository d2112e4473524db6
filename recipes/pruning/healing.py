"""Reconstructs a pruned model by least squares on calibration text, layer by layer.

A weight that reads the residual stream has lost the inputs from the pruned channels. It is changed
to predict their contribution from the kept channels. A weight that writes to the stream is changed
to reproduce the teacher's stream, so each layer also corrects the errors of earlier layers.
arXiv:1707.06168 reconstructs channels in the same way. Only one layer is on the device, beside the
residual streams of both models, so memory does not depend on depth.

The algebra. A weight W [outputs, inputs] reads x_t at token t, and m_t is missing from its output.
The change D minimises Σ_t ‖m_t - D·x_t‖² + λ·‖D‖². Setting the derivative to 0 gives the normal
equations D·(G + λ·I) = C with the Gram matrix G = Σ x·xᵀ and C = Σ m·xᵀ. G is symmetric and, with
λ > 0, positive definite, so Cholesky solves (G + λ·I)·Dᵀ = Cᵀ. The ridge λ is stated in tokens: n
tokens mean λ = n·q, where q is the mean square of the inputs. The ridge thus acts like n more
tokens whose channels are independent and whose output misses nothing: they would add n·q to the
diagonal of G, and 0 to C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_convert import nemo
from nemo_convert.architecture import Architecture
from nemo_convert.convert import hf_weights
from nemo_convert.hf_config import with_shape
from recipes.backend.device import device
from recipes.core.metrics import ProgressCallback
from recipes.pruning.kept import HIDDEN, KeptIndices, prune_weight

RIDGE_TOKENS = 5000.0
"""Ridge strength λ, in equivalent calibration tokens. It prevents overfitting to little text."""


class LeastSquares:
    """Normal equations of a change to a weight [outputs, inputs], summed over tokens in float64."""

    def __init__(self, weight: Tensor) -> None:
        self.cross = torch.zeros_like(weight, dtype=torch.float64)
        self.gram = self.cross.new_zeros(weight.shape[1], weight.shape[1])
        self.tokens = 0

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Adds tokens.

        Args:
            inputs: The weight's inputs [b, s, inputs].
            missing: What the change should add to the weight's outputs [b, s, outputs].
        """
        inputs, missing = inputs.flatten(0, 1), missing.flatten(0, 1)
        self.tokens += len(inputs)
        self.gram += inputs.T @ inputs
        self.cross += missing.T @ inputs

    def change(self, ridge_tokens: float) -> Tensor:
        """Solves for the change D, float32 [outputs, inputs].

        The error on the tokens that were added is never larger with D than without a change.
        """
        # The mean diagonal of G is tokens·q, so ``solve`` gets λ = ridge_tokens·q.
        return solve(self.gram, self.cross.T, ridge_tokens / self.tokens).T.float()


def solve(gram: Tensor, right_side: Tensor, ridge: float) -> Tensor:
    """Solves (G + λ·I)·X = ``right_side`` with λ = ``ridge`` times the mean diagonal of G."""
    damping = torch.eye(len(gram)).to(gram) * gram.diagonal().mean() * ridge
    return torch.cholesky_solve(right_side, torch.linalg.cholesky(gram + damping))


class Decoder:
    """Runs a model, whose weights are in host memory, one layer at a time on the device.

    Its items are the weights, by Hugging Face name without the end ``.weight``.
    """

    def __init__(self, config: Mapping[str, object], weights: dict[str, Tensor]) -> None:
        hf_config = AutoConfig.for_model(**config)
        self.device = device()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
        model.eval()  # without dropout of attention
        self._attention: nn.Module = model.model.layers[0].self_attn
        self._attention.o_proj = nn.Identity()  # ``attend`` returns the inputs of o_proj
        self._rotary = type(model.model.rotary_emb)(config=hf_config).to(self.device)
        self._eps: float = hf_config.rms_norm_eps
        self.num_layers: int = hf_config.num_hidden_layers
        self.head_size: int = self._attention.head_dim
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[f"{name}.weight"].to(self.device, torch.float32)

    def __setitem__(self, name: str, weight: Tensor) -> None:
        self._weights[f"{name}.weight"] = weight.to(self._weights[f"{name}.weight"])

    def __contains__(self, name: str) -> bool:
        return f"{name}.weight" in self._weights

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns the residual stream before the first layer [b, s, hidden]."""
        embedding = functional.embedding(tokens, self._weights["model.embed_tokens.weight"])
        return embedding.to(self.device, torch.float32)

    def normalise(self, norm: str, stream: Tensor) -> Tensor:
        """Applies an RMSNorm to the residual stream."""
        weight = self[norm]
        return functional.rms_norm(stream, weight.shape, weight, self._eps)

    def attend(self, layer: str, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields the attention heads' outputs for normalised inputs, batch by batch."""
        prefix = f"{layer}self_attn."
        layer_weights = {
            name.removeprefix(prefix): weight.to(self.device, torch.float32)
            for name, weight in self._weights.items()
            if name.startswith(prefix) and "o_proj" not in name
        }
        self._attention.load_state_dict(layer_weights, assign=True)
        for batch in inputs:
            rotary = self._rotary(batch, torch.arange(batch.shape[1], device=batch.device)[None])
            # Without a mask, transformers computes causal attention.
            yield self._attention(batch, position_embeddings=rotary, attention_mask=None)[0]

    def activate(self, layer: str, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields the gated activations for normalised inputs, batch by batch."""
        gate, up = self[f"{layer}mlp.gate_proj"], self[f"{layer}mlp.up_proj"]
        for batch in inputs:
            yield functional.silu(batch @ gate.T) * (batch @ up.T)


@dataclass(frozen=True)
class HalfLayer:
    """A layer's attention, or its feed-forward network."""

    norm: str
    input_weights: tuple[str, ...]
    """Weights that read the normalised residual stream."""
    compute: Callable[[Decoder, str, Sequence[Tensor]], Iterator[Tensor]]
    """Computes the inputs of ``output_weight`` from the normalised stream."""
    output_weight: str
    """Weight whose output is added to the residual stream."""


HALVES = (
    HalfLayer(
        "input_layernorm",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        Decoder.attend,
        "self_attn.o_proj",
    ),
    HalfLayer(
        "post_attention_layernorm",
        ("mlp.gate_proj", "mlp.up_proj"),
        Decoder.activate,
        "mlp.down_proj",
    ),
)


class Reconstruction:
    """Reconstructs a student in place, with the residual streams of both models.

    A stream is a list with one tensor [b, s, hidden] for each batch. ``batches`` are tokens [b, s].
    A layer is named by the prefix of its weights, such as ``model.layers.3.``.
    """

    def __init__(
        self,
        teacher: Decoder,
        student: Decoder,
        kept: KeptIndices,
        batches: Sequence[Tensor],
        ridge_tokens: float,
    ) -> None:
        self._teacher, self._student, self._kept = teacher, student, kept
        self._ridge_tokens = ridge_tokens
        self._teacher_streams = [teacher.embed(tokens) for tokens in batches]
        self._student_streams = [student.embed(tokens) for tokens in batches]
        self._width = self._teacher_streams[0].shape[-1]
        # Indices of the teacher's hidden channels that the student has.
        self._channels = kept.indices.get(HIDDEN, torch.arange(self._width)).to(teacher.device)

    def skip_layer(self, layer: str) -> None:
        """Runs the teacher's streams through a layer that the student does not have."""
        for half in HALVES:
            inputs = [self._teacher.normalise(layer + half.norm, x) for x in self._teacher_streams]
            weight = self._teacher[layer + half.output_weight]
            for i, outputs in enumerate(half.compute(self._teacher, layer, inputs)):
                self._teacher_streams[i] = self._teacher_streams[i] + outputs @ weight.T

    def reconstruct(self, half: HalfLayer, teacher_layer: str, student_layer: str) -> None:
        """Changes the weights of half a layer, and runs both models' streams through it.

        Let x be the teacher's inputs, y the student's, and E·y the student's with zeros in the
        pruned channels. The fit D predicts the difference: x - E·y ≈ D·y. So W·x ≈ (W·E + W·D)·y
        for each weight W that reads x. Pruning already kept W·E, so W·D is added.
        """
        teacher_inputs, student_inputs, fit = self._fit_inputs(
            teacher_layer + half.norm, student_layer + half.norm
        )
        # D, with columns of 0 for pruned channels: ``prune_weight`` selects the kept columns.
        change = self._channels.new_zeros(self._width, self._width, dtype=torch.float32)
        change[:, self._channels] = fit.change(self._ridge_tokens)
        for name in half.input_weights:
            added = prune_weight(
                f"{teacher_layer}{name}.weight",
                self._teacher[teacher_layer + name] @ change,
                self._kept,
                self._teacher.head_size,
            )
            self._student[student_layer + name] = self._student[student_layer + name] + added
        self._reconstruct_output(half, teacher_layer, student_layer, teacher_inputs, student_inputs)

    def _reconstruct_output(
        self,
        half: HalfLayer,
        teacher_layer: str,
        student_layer: str,
        teacher_inputs: list[Tensor],
        student_inputs: list[Tensor],
    ) -> None:
        """Changes the output weight, so that the student's stream approaches the teacher's."""
        teacher_weight = self._teacher[teacher_layer + half.output_weight]
        weight = self._student[student_layer + half.output_weight]
        fit = LeastSquares(weight)
        # The student already has the input weights that ``reconstruct`` changed.
        inputs = list(half.compute(self._student, student_layer, student_inputs))
        for i, outputs in enumerate(half.compute(self._teacher, teacher_layer, teacher_inputs)):
            self._teacher_streams[i] = self._teacher_streams[i] + outputs @ teacher_weight.T
            self._student_streams[i] = self._student_streams[i] + inputs[i] @ weight.T
            # Tokens are weighted by the inverse RMS of their stream, because later layers normalise
            # it. Otherwise a few tokens, whose RMS is many times larger, would dominate the fit.
            rms = self._teacher_streams[i].square().mean(-1, keepdim=True).sqrt()
            missing = self._teacher_streams[i][..., self._channels] - self._student_streams[i]
            fit.add(inputs[i] / rms, missing / rms)
        change = fit.change(self._ridge_tokens)
        self._student[student_layer + half.output_weight] = weight + change
        for i, batch in enumerate(inputs):
            self._student_streams[i] = self._student_streams[i] + batch @ change.T

    def reconstruct_head(self) -> None:
        """Changes the head or, if the head is tied, the weight of the final RMSNorm.

        A tied head is also the embedding, so only the final norm's weight can change: channel i is
        scaled by 1 + d_i. Let H be the head, H_r its kept columns, y the student's normalised
        stream, and m = x - E·y (see ``reconstruct``). The error of the logits is then
        H·m - H_r·diag(y)·d. With P = H_rᵀ·H, the normal equations of d are
        (P_r ∘ G)·d = rowsum(P ∘ Cᵀ), where ∘ is the elementwise product, P_r are the kept
        columns of P, and G = Σ y·yᵀ and C = Σ m·yᵀ are those of the fit.
        """
        _, _, fit = self._fit_inputs("model.norm", "model.norm")
        if "lm_head" in self._student:
            added = self._teacher["lm_head"] @ fit.change(self._ridge_tokens)
            self._student["lm_head"] = self._student["lm_head"] + added
            return
        head = self._teacher["model.embed_tokens"]
        # A constant added to all logits changes no probability, so columns have their mean removed.
        head = (head - head.mean(dim=0)).double()
        product = head[:, self._channels].T @ head
        gram = product[:, self._channels] * fit.gram
        right_side = (product * fit.cross.T).sum(dim=1, keepdim=True)
        scale = 1 + solve(gram, right_side, self._ridge_tokens / fit.tokens).squeeze(1).float()
        self._student["model.norm"] = self._student["model.norm"] * scale

    def _fit_inputs(
        self, teacher_norm: str, student_norm: str
    ) -> tuple[list[Tensor], list[Tensor], LeastSquares]:
        """Returns both models' normalised streams, and the fit of their difference."""
        teacher_inputs = [self._teacher.normalise(teacher_norm, x) for x in self._teacher_streams]
        student_inputs = [self._student.normalise(student_norm, x) for x in self._student_streams]
        fit = LeastSquares(student_inputs[0].new_empty(self._width, len(self._channels)))
        for teacher_input, student_input in zip(teacher_inputs, student_inputs, strict=True):
            missing = teacher_input.clone()  # the caller needs the teacher's inputs unchanged
            missing[..., self._channels] -= student_input
            fit.add(student_input, missing)
        return teacher_inputs, student_inputs, fit


@torch.no_grad()
def heal(
    teacher: Decoder,
    student: Decoder,
    kept: KeptIndices,
    batches: Sequence[Tensor],
    progress: ProgressCallback = lambda done, total: None,
    ridge_tokens: float = RIDGE_TOKENS,
) -> None:
    """Changes a student's weights to reproduce its teacher on calibration text.

    Args:
        teacher: The unpruned model.
        student: The pruned model; its weights are replaced.
        kept: The layers and indices that pruning kept.
        batches: Calibration tokens, each [b, s].
        progress: Called after every layer of the teacher.
        ridge_tokens: See ``RIDGE_TOKENS``.
    """
    reconstruction = Reconstruction(teacher, student, kept, batches, ridge_tokens)
    for number in range(1, teacher.num_layers + 1):
        teacher_layer = f"model.layers.{number - 1}."
        if number in kept.layers:
            student_layer = f"model.layers.{kept.layers.index(number)}."
            for half in HALVES:
                reconstruction.reconstruct(half, teacher_layer, student_layer)
        else:
            reconstruction.skip_layer(teacher_layer)
        progress(number, teacher.num_layers)
    reconstruction.reconstruct_head()


def heal_weights(
    teacher: Path,
    student: Architecture,
    kept: KeptIndices,
    weights: dict[str, Tensor],
    batches: Sequence[Tensor],
    progress: ProgressCallback,
) -> None:
    """Reconstructs the student's ``weights``, by their Hugging Face names, in place.

    ``teacher`` is a NeMo checkpoint, ``student`` the pruned shape; ``batches`` are tokens [b, s].
    """
    config, teacher_shape = nemo.read_config(teacher), nemo.architecture_of(teacher)
    heal(
        Decoder(with_shape(config, teacher_shape), dict(hf_weights(teacher))),
        Decoder(with_shape(config, student), weights),
        kept,
        batches,
        progress,
    )
