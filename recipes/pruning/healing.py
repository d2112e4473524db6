"""Reconstructs a pruned model by least squares on calibration text, layer by layer.

A weight that reads the residual stream loses the inputs from pruned channels. So this weight is
changed to predict their contribution from the kept channels. A weight that writes to the stream is
changed to reproduce the teacher's stream, so each layer also corrects errors of earlier layers.
arXiv:1707.06168 reconstructs channels in the same way. The device holds one layer at a time, beside
the residual streams of both models. So its memory does not depend on depth.

The algebra: a weight W [outputs, inputs] reads x_t at token t, and m_t is missing from its output.
The change D minimizes Σ_t ‖m_t - D·x_t‖² + λ·‖D‖². Setting the derivative to 0 gives the normal
equations D·(G + λ·I) = C with the Gram matrix G = Σ x·xᵀ and C = Σ m·xᵀ. With λ > 0, the symmetric
matrix G + λ·I is positive definite, so Cholesky solves (G + λ·I)·Dᵀ = Cᵀ. The ridge λ is stated in
tokens: n tokens mean λ = n·q, where q is the mean square of the inputs. The ridge thus acts like n
more tokens whose channels are independent and whose output misses nothing. Such tokens would add
n·q to the diagonal of G, and 0 to C.
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
"""Ridge strength in equivalent calibration tokens (n above). It prevents overfitting to little
text."""


class LeastSquares:
    """Normal equations of a change to a weight, summed over tokens in float64.

    ``cross`` is the matrix C [outputs, inputs] above, and ``gram`` is G [inputs, inputs].
    """

    def __init__(self, weight: Tensor) -> None:
        """Only the shape [outputs, inputs] and the device of ``weight`` are used."""
        self.cross = torch.zeros_like(weight, dtype=torch.float64)
        self.gram = self.cross.new_zeros(weight.shape[1], weight.shape[1])
        self.tokens = 0

    def add(self, inputs: Tensor, missing_outputs: Tensor) -> None:
        """Adds a batch of tokens, the weight's inputs [b, s, inputs], to the sums.

        ``missing_outputs`` [b, s, outputs] is what the change should add to the weight's outputs.
        """
        inputs, missing_outputs = inputs.flatten(0, 1), missing_outputs.flatten(0, 1)
        self.tokens += len(inputs)
        self.gram += inputs.T @ inputs
        self.cross += missing_outputs.T @ inputs

    def change(self, ridge_tokens: float) -> Tensor:
        """Solves for the change D, float32 [outputs, inputs].

        On the added tokens, the squared error with D is never larger than without a change.
        """
        # The mean diagonal of G is tokens·q, so ``solve`` uses λ = ridge_tokens·q.
        return solve(self.gram, self.cross.T, ridge_tokens / self.tokens).T.float()


def solve(gram: Tensor, right_side: Tensor, ridge: float) -> Tensor:
    """Solves (G + λ·I)·X = ``right_side`` for X. λ is ``ridge`` times the mean diagonal of G."""
    damping = torch.eye(len(gram)).to(gram) * gram.diagonal().mean() * ridge
    return torch.cholesky_solve(right_side, torch.linalg.cholesky(gram + damping))


class Decoder:
    """Runs a model one layer at a time on the device. Its weights stay in host memory.

    ``decoder[name]`` is a weight, where ``name`` is its Hugging Face name without ``.weight``.
    Reading returns a float32 copy on the device. Writing converts to the stored dtype.
    """

    def __init__(self, config: Mapping[str, object], weights: dict[str, Tensor]) -> None:
        """``config`` is the model's ``config.json``. Writing replaces items of ``weights``."""
        hf_config = AutoConfig.for_model(**config)
        self.device = device()
        with torch.device("meta"):  # allocates no weights: ``attend`` assigns those of one layer
            model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
        model.eval()  # disables attention dropout
        self._attention: nn.Module = model.model.layers[0].self_attn
        self._attention.o_proj = nn.Identity()  # ``attend`` returns the inputs of o_proj
        rotary_class = type(model.model.rotary_emb)  # the instance on "meta" has no values
        self._rotary = rotary_class(config=hf_config).to(self.device)
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
        """Returns the residual stream before the first layer [b, s, hidden] for tokens [b, s]."""
        embedding = functional.embedding(tokens, self._weights["model.embed_tokens.weight"])
        return embedding.to(self.device, torch.float32)

    def normalize(self, norm: str, stream: Tensor) -> Tensor:
        """Applies the RMSNorm with the weight ``norm`` to the residual stream."""
        weight = self[norm]
        return functional.rms_norm(stream, weight.shape, weight, self._eps)

    def attend(self, layer: str, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields the attention heads' outputs [b, s, heads·head_size] for each batch of inputs.

        Inputs are normalized. Outputs are those before the output projection.
        """
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
        """Yields the gated activations [b, s, ffn] for each batch of normalized inputs."""
        gate, up = self[f"{layer}mlp.gate_proj"], self[f"{layer}mlp.up_proj"]
        for batch in inputs:
            yield functional.silu(batch @ gate.T) * (batch @ up.T)


@dataclass(frozen=True)
class HalfLayer:
    """A layer's attention or feed-forward network, with names of weights inside the layer."""

    norm: str
    input_weights: tuple[str, ...]
    """Weights that read the normalized residual stream."""
    compute: Callable[[Decoder, str, Sequence[Tensor]], Iterator[Tensor]]
    """Computes the inputs of ``output_weight`` from the model, the prefix of the layer's weights
    (such as ``model.layers.3.``) and the normalized stream."""
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
    """Reconstructs a student in place, layer by layer, with the residual streams of both models.

    Each model's residual stream is a list with one tensor [b, s, hidden] for each batch. A layer is
    named by the prefix of its weights. ``heal`` explains the arguments.
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
        # Indices of the teacher's hidden channels that the student has: all if none was pruned.
        self._channels = kept.indices.get(HIDDEN, torch.arange(self._width)).to(teacher.device)

    def skip_layer(self, layer: str) -> None:
        """Runs the teacher's streams through a layer that the student does not have."""
        for half in HALVES:
            inputs = [self._teacher.normalize(layer + half.norm, x) for x in self._teacher_streams]
            weight = self._teacher[layer + half.output_weight]
            for i, features in enumerate(half.compute(self._teacher, layer, inputs)):
                self._teacher_streams[i] = self._teacher_streams[i] + features @ weight.T

    def reconstruct(self, half: HalfLayer, teacher_layer: str, student_layer: str) -> None:
        """Changes the student's weights of half a layer, and runs both streams through this half.

        Let x be the teacher's normalized stream, y the student's, and E·y the student's with zeros
        in the pruned channels. The fit D predicts the difference: x - E·y ≈ D·y. So
        W·x ≈ (W·E + W·D)·y for each teacher's weight W that reads x. The pruned weight is W·E, so
        W·D is added to it.
        """
        teacher_inputs, student_inputs, fit = self._fit_inputs(
            teacher_layer + half.norm, student_layer + half.norm
        )
        # ``prune_weight`` selects the kept rows and columns of the teacher's full weight. So D gets
        # the teacher's full width, with zeros in the columns of pruned channels.
        full_change = self._channels.new_zeros(self._width, self._width, dtype=torch.float32)
        full_change[:, self._channels] = fit.change(self._ridge_tokens)
        for name in half.input_weights:
            weight_change = prune_weight(
                f"{teacher_layer}{name}.weight",
                self._teacher[teacher_layer + name] @ full_change,
                self._kept,
                self._teacher.head_size,
            )
            weight_name = student_layer + name
            self._student[weight_name] = self._student[weight_name] + weight_change
        self._reconstruct_output(half, teacher_layer, student_layer, teacher_inputs, student_inputs)

    def _reconstruct_output(
        self,
        half: HalfLayer,
        teacher_layer: str,
        student_layer: str,
        teacher_inputs: list[Tensor],
        student_inputs: list[Tensor],
    ) -> None:
        """Fits the output weight to the teacher's stream, and adds the outputs to both streams."""
        teacher_weight = self._teacher[teacher_layer + half.output_weight]
        student_weight = self._student[student_layer + half.output_weight]
        fit = LeastSquares(student_weight)
        # The student's features come from the input weights that ``reconstruct`` has changed.
        features = list(half.compute(self._student, student_layer, student_inputs))
        teacher_features = half.compute(self._teacher, teacher_layer, teacher_inputs)
        for i, teacher_batch in enumerate(teacher_features):
            self._teacher_streams[i] = self._teacher_streams[i] + teacher_batch @ teacher_weight.T
            self._student_streams[i] = self._student_streams[i] + features[i] @ student_weight.T
            # Tokens are weighted by the stream's inverse RMS, because later layers normalize the
            # stream. Otherwise a few tokens with an RMS many times larger would dominate the fit.
            rms = self._teacher_streams[i].square().mean(-1, keepdim=True).sqrt()
            teacher_stream = self._teacher_streams[i][..., self._channels]
            fit.add(features[i] / rms, (teacher_stream - self._student_streams[i]) / rms)
        change = fit.change(self._ridge_tokens)
        self._student[student_layer + half.output_weight] = student_weight + change
        for i, batch in enumerate(features):
            self._student_streams[i] = self._student_streams[i] + batch @ change.T

    def reconstruct_head(self) -> None:
        """Changes the head or, if the head is tied, the weight of the final RMSNorm.

        A tied head is also the embedding, so only the final norm's weight can change: channel i is
        scaled by 1 + d_i. Let H be the head, H_r its kept columns, y the student's normalized
        stream, and m = x - E·y (see ``reconstruct``). The error of the logits is then
        H·m - H_r·diag(y)·d. Let P = H_rᵀ·H, and P_r the kept columns of P. G = Σ y·yᵀ and
        C = Σ m·yᵀ are sums of the fit. The normal equations of d are
        (P_r ∘ G)·d = rowsum(P ∘ Cᵀ), where ∘ is the elementwise product.
        """
        _, _, fit = self._fit_inputs("model.norm", "model.norm")
        if "lm_head" in self._student:
            head_change = self._teacher["lm_head"] @ fit.change(self._ridge_tokens)
            self._student["lm_head"] = self._student["lm_head"] + head_change
            return
        head = self._teacher["model.embed_tokens"]
        # A constant added to all logits changes no probability. Subtracting each column's mean over
        # the vocabulary makes the fit ignore such constants.
        head = (head - head.mean(dim=0)).double()
        product = head[:, self._channels].T @ head
        gram = product[:, self._channels] * fit.gram
        right_side = (product * fit.cross.T).sum(dim=1, keepdim=True)
        scale = 1 + solve(gram, right_side, self._ridge_tokens / fit.tokens).squeeze(1).float()
        self._student["model.norm"] = self._student["model.norm"] * scale

    def _fit_inputs(
        self, teacher_norm: str, student_norm: str
    ) -> tuple[list[Tensor], list[Tensor], LeastSquares]:
        """Returns both models' normalized streams x and y, and the fit of x - E·y to y."""
        teacher_inputs = [self._teacher.normalize(teacher_norm, x) for x in self._teacher_streams]
        student_inputs = [self._student.normalize(student_norm, x) for x in self._student_streams]
        fit = LeastSquares(student_inputs[0].new_empty(self._width, len(self._channels)))
        for teacher_input, student_input in zip(teacher_inputs, student_inputs, strict=True):
            difference = teacher_input.clone()  # because ``teacher_inputs`` are returned
            difference[..., self._channels] -= student_input
            fit.add(student_input, difference)
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
        progress: Called after every layer with the layer's number and the teacher's layer count.
        ridge_tokens: Ridge strength in equivalent calibration tokens.
    """
    reconstruction = Reconstruction(teacher, student, kept, batches, ridge_tokens)
    for number in range(1, teacher.num_layers + 1):
        # ``kept`` counts layers from 1, names of weights count them from 0.
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
    """Runs ``heal`` with a teacher that is a NeMo checkpoint, and a student in memory.

    ``student`` is the student's shape. ``weights`` are all its weights by Hugging Face name.
    Healing replaces them in this dictionary. ``heal`` explains the other arguments.
    """
    config, teacher_shape = nemo.read_config(teacher), nemo.architecture_of(teacher)
    heal(
        Decoder(with_shape(config, teacher_shape), dict(hf_weights(teacher))),
        Decoder(with_shape(config, student), weights),
        kept,
        batches,
        progress,
    )
