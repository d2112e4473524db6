"""Healing a pruned model in closed form: what is left is refitted to stand in for what is gone.

Layer by layer, least squares on calibration text change the weights that were cut. Those that read
the residual stream get out of what is left of it what the teacher's get out of all of it; those
that write to it bring it to the teacher's, so each layer also makes up for what earlier ones left
over. Channels are reconstructed so in arXiv:1707.06168. One layer at a time is on the device,
beside the residual streams of both models, so memory does not depend on depth.
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
from recipes.pruning.kept import HIDDEN, KeptIndices, cut

"""Takes how many layers are done, and of how many."""
PULL = 5000.0
"""Tokens that hold a weight to what it was cut to: they would read each channel by itself, at the
mean square of all. So what is fitted to little text strays little."""


class LeastSquares:
    """Normal equations of a change to a weight [outputs, inputs], summed over tokens in float64."""

    def __init__(self, weight: Tensor) -> None:
        self.cross = torch.zeros_like(weight, dtype=torch.float64)
        self.gram = self.cross.new_zeros(weight.shape[1], weight.shape[1])
        self.tokens = 0

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Takes what the weight reads [b, s, inputs], and what it fails to make of it."""
        inputs, missing = inputs.flatten(0, 1), missing.flatten(0, 1)
        self.tokens += len(inputs)
        self.gram += inputs.T @ inputs
        self.cross += missing.T @ inputs

    def change(self, pull: float) -> Tensor:
        """What to add to the weight, float32 [outputs, inputs]; no sum of squares gets larger."""
        return solve(self.gram, self.cross.T, pull / self.tokens).T.float()


def solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solves for ``right``, with so much of the mean diagonal added to the diagonal."""
    damping = torch.eye(len(gram)).to(gram) * gram.diagonal().mean() * ridge
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram + damping))


class Decoder:
    """A model as weights, run one layer at a time on the device.

    Weights have their Hugging Face names; those that are set are replaced.
    """

    def __init__(self, config: Mapping[str, object], weights: dict[str, Tensor]) -> None:
        known = AutoConfig.for_model(**config)
        self.device = device()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known, dtype=torch.float32)
        self._attention: nn.Module = model.model.layers[0].self_attn
        self._attention.o_proj = nn.Identity()
        self._rotary = type(model.model.rotary_emb)(config=known).to(self.device)
        self._eps: float = known.rms_norm_eps
        self.num_layers: int = known.num_hidden_layers
        self.head_size: int = self._attention.head_dim
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[f"{name}.weight"].to(self.device, torch.float32)

    def __setitem__(self, name: str, weight: Tensor) -> None:
        self._weights[f"{name}.weight"] = weight.to(self._weights[f"{name}.weight"])

    def __contains__(self, name: str) -> bool:
        return f"{name}.weight" in self._weights

    def embedded(self, tokens: Tensor) -> Tensor:
        """The residual stream before the first layer [b, s, hidden]."""
        found = functional.embedding(tokens, self._weights["model.embed_tokens.weight"])
        return found.to(self.device, torch.float32)

    def normalised(self, norm: str, stream: Tensor) -> Tensor:
        """What is read of the residual stream."""
        weight = self[norm]
        return functional.rms_norm(stream, weight.shape, weight, self._eps)

    def attended(self, layer: str, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        """What the heads make of normalised inputs, batch by batch."""
        start = f"{layer}self_attn."
        own = {
            name.removeprefix(start): weight.to(self.device, torch.float32)
            for name, weight in self._weights.items()
            if name.startswith(start) and "o_proj" not in name
        }
        self._attention.load_state_dict(own, assign=True)
        for each in inputs:
            rotary = self._rotary(each, torch.arange(each.shape[1], device=each.device)[None])
            yield self._attention(each, position_embeddings=rotary, attention_mask=None)[0]

    def activated(self, layer: str, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        """What the feed-forward part makes of normalised inputs, before its last product."""
        gate, up = self[f"{layer}mlp.gate_proj"], self[f"{layer}mlp.up_proj"]
        for each in inputs:
            yield functional.silu(each @ gate.T) * (each @ up.T)


@dataclass(frozen=True)
class Half:
    """A layer's attention, or its feed-forward part."""

    norm: str
    reads: tuple[str, ...]
    """Weights behind the norm."""
    between: Callable[[Decoder, str, Sequence[Tensor]], Iterator[Tensor]]
    writes: str
    """Weight that adds to the residual stream."""


HALVES = (
    Half(
        "input_layernorm",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        Decoder.attended,
        "self_attn.o_proj",
    ),
    Half(
        "post_attention_layernorm",
        ("mlp.gate_proj", "mlp.up_proj"),
        Decoder.activated,
        "mlp.down_proj",
    ),
)


class Healing:
    """Both models and their residual streams on the text, one tensor [b, s, hidden] a batch.

    The student is changed in place; ``batches`` of tokens are [b, s].
    """

    def __init__(
        self,
        teacher: Decoder,
        student: Decoder,
        kept: KeptIndices,
        batches: Sequence[Tensor],
        pull: float,
    ) -> None:
        self._teacher, self._student, self._kept = teacher, student, kept
        self._pull = pull
        self._whole = [teacher.embedded(tokens) for tokens in batches]
        self._left = [student.embedded(tokens) for tokens in batches]
        self._width = self._whole[0].shape[-1]
        self._rows = kept.rows.get(HIDDEN, torch.arange(self._width)).to(teacher.device)

    def pass_by(self, layer: str) -> None:
        """Goes through a layer that the student has not."""
        for half in HALVES:
            read = [self._teacher.normalised(layer + half.norm, x) for x in self._whole]
            writes = self._teacher[layer + half.writes]
            for i, made in enumerate(half.between(self._teacher, layer, read)):
                self._whole[i] = self._whole[i] + made @ writes.T

    def heal(self, half: Half, theirs: str, ours: str) -> None:
        """Refits half a layer, and goes through it."""
        read, seen, fit = self._behind(theirs + half.norm, ours + half.norm)
        change = self._widened(fit.change(self._pull))
        for name in half.reads:
            more = cut(
                f"{theirs}{name}.weight",
                self._teacher[theirs + name] @ change,
                self._kept,
                self._teacher.head_size,
            )
            self._student[ours + name] = self._student[ours + name] + more
        self._write(half, theirs, ours, read, seen)

    def _write(
        self, half: Half, theirs: str, ours: str, read: list[Tensor], seen: list[Tensor]
    ) -> None:
        whole, left = self._teacher[theirs + half.writes], self._student[ours + half.writes]
        fit = LeastSquares(left)
        inputs = list(half.between(self._student, ours, seen))
        for i, made in enumerate(half.between(self._teacher, theirs, read)):
            self._whole[i] = self._whole[i] + made @ whole.T
            self._left[i] = self._left[i] + inputs[i] @ left.T
            # What follows reads the stream normalised, and a few tokens are many times as large.
            size = self._whole[i].square().mean(-1, keepdim=True).sqrt()
            missing = self._whole[i][..., self._rows] - self._left[i]
            fit.add(inputs[i] / size, missing / size)
        change = fit.change(self._pull)
        self._student[ours + half.writes] = left + change
        for i, made in enumerate(inputs):
            self._left[i] = self._left[i] + made @ change.T

    def heal_head(self) -> None:
        """Refits what is read after the last layer."""
        _, _, fit = self._behind("model.norm", "model.norm")
        if "lm_head" in self._student:
            more = self._teacher["lm_head"] @ fit.change(self._pull)
            self._student["lm_head"] = self._student["lm_head"] + more
            return
        # A tied head is what the first layer reads, too: only the size of its inputs can change.
        # Logits matter up to a constant, so what all words share of a column is left out.
        head = self._teacher["model.embed_tokens"]
        head = (head - head.mean(dim=0)).double()
        pull = head[:, self._rows].T @ head
        gram = pull[:, self._rows] * fit.gram
        right = (pull * fit.cross.T).sum(dim=1, keepdim=True)
        scale = 1 + solve(gram, right, self._pull / fit.tokens).squeeze(1).float()
        self._student["model.norm"] = self._student["model.norm"] * scale

    def _behind(self, theirs: str, ours: str) -> tuple[list[Tensor], list[Tensor], LeastSquares]:
        """What both read of their streams, and how the student's is to be changed for it."""
        read = [self._teacher.normalised(theirs, x) for x in self._whole]
        seen = [self._student.normalised(ours, x) for x in self._left]
        fit = LeastSquares(seen[0].new_empty(self._width, len(self._rows)))
        for full, part in zip(read, seen, strict=True):
            missing = full.clone()
            missing[..., self._rows] -= part
            fit.add(part, missing)
        return read, seen, fit

    def _widened(self, change: Tensor) -> Tensor:
        """Columns for all channels, of which those that are gone will be cut again."""
        wide = change.new_zeros(self._width, self._width)
        wide[:, self._rows] = change
        return wide


@torch.no_grad()
def heal(
    teacher: Decoder,
    student: Decoder,
    kept: KeptIndices,
    batches: Sequence[Tensor],
    progress: ProgressCallback = lambda done, total: None,
    pull: float = PULL,
) -> None:
    """Changes a student's weights so that it makes of a text what its teacher makes.

    Args:
        teacher: The whole model.
        student: What is left of it; its weights are replaced.
        kept: What that is.
        batches: Tokens to calibrate on, each [b, s].
        progress: Told after every layer of the teacher.
        pull: See ``PULL``.
    """
    healing = Healing(teacher, student, kept, batches, pull)
    for number in range(1, teacher.num_layers + 1):
        theirs = f"model.layers.{number - 1}."
        if number in kept.layers:
            ours = f"model.layers.{kept.layers.index(number)}."
            for half in HALVES:
                healing.heal(half, theirs, ours)
        else:
            healing.pass_by(theirs)
        progress(number, teacher.num_layers)
    healing.heal_head()


def heal_weights(
    teacher: Path,
    student: Architecture,
    kept: KeptIndices,
    weights: dict[str, Tensor],
    batches: Sequence[Tensor],
    progress: ProgressCallback,
) -> None:
    """Heals what was cut of a NeMo checkpoint, in place.

    ``weights`` are the student's, by their Hugging Face names; ``batches`` of tokens are [b, s].
    """
    config, whole = nemo.read_config(teacher), nemo.architecture_of(teacher)
    heal(
        Decoder(with_shape(config, whole), dict(hf_weights(teacher))),
        Decoder(with_shape(config, student), weights),
        kept,
        batches,
        progress,
    )
