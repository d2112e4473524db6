"""Parity gates: a converted model has the same weights and logits."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_convert import nemo
from nemo_convert.convert import HEAD, ROTARY_BUFFER, hf_weights
from nemo_convert.families import FAMILIES
from nemo_convert.hf import Weights, load_causal_lm
from recipes.core.errors import RecipeError

if TYPE_CHECKING:
    import torch

LOGITS_TOLERANCE = 1e-3
"""Largest logit difference in float32, as a fraction of the logits' standard deviation. Rounding
gives about 1e-5 of it, a wrong conversion a tenth or more."""
WINDOW = 128
TEXT = """\
A lighthouse keeper wrote down the weather every evening for forty-one years. On most nights the
entry was a single word, and the word was "wind". In 1893, however, a visiting surveyor found that
the notebooks also held 2,406 sketches of passing ships, each with its tonnage and its flag. He
copied them into tables, compared the dates with harbour records, and could show that the coast had
been far busier than anybody believed. The keeper, asked why he had drawn them, said only: "It was
something to do after the lamp was lit." Today the notebooks are read by climate scientists, who
care little about the ships; they want the one word, repeated fourteen thousand times, because no
instrument stood anywhere near that rock until 1921. Numbers such as 3.14159 or 10^6, code such as
`for i in range(10): print(i)`, and letters beyond ASCII (é, ß, 東京, Привет) appear here so that
every part of a tokenizer is used.
"""


@dataclass(frozen=True)
class Parity:
    """Comparison of two models on the same tokens."""

    max_logit_difference: float
    logit_spread: float
    """Standard deviation of the expected logits."""
    tokens: int
    weights_equal: bool

    def require(self, what: str) -> Parity:
        """Raises ``RecipeError`` unless the models are equal; returns itself."""
        if not self.weights_equal:
            raise RecipeError(
                f"parity gate failed: {what}: weights differ after the round trip.",
                "if one of both was changed since, convert it again; do not use it as it is",
            )
        tolerance = LOGITS_TOLERANCE * self.logit_spread
        if not self.max_logit_difference <= tolerance:  # also catches NaN
            raise RecipeError(
                f"parity gate failed: {what}: logits differ by {self.max_logit_difference:.2e}, "
                f"more than {tolerance:.0e}, {LOGITS_TOLERANCE:.0e} of their spread.",
                "do not use it: its config.json asks for what NeMo's class of this family, which "
                "nemo_convert/families.py names, does not compute",
            )
        return self


def multiply_in_float32() -> None:
    """Turns off TensorFloat-32, in which cuBLAS rounds to 10 bits.

    TransformerEngine requests it for every float32 GEMM, whatever PyTorch is set to. cuBLAS reads
    the variable once: call this before anything runs on a GPU.
    """
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"


def compare(hf_folder: Path, checkpoint: Path, core: Any = None) -> Parity:
    """Compares a Hugging Face folder with a NeMo checkpoint, one model in memory after the other.

    Logits are compared on ``TEXT`` in float32. Weights are read back from the checkpoint's files
    and compared for equality.

    Args:
        hf_folder: Hugging Face folder.
        checkpoint: NeMo checkpoint directory.
        core: Megatron model to compute logits with, instead of the checkpoint's.
    """
    import torch
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(hf_folder, trust_remote_code=False)(
        TEXT, return_tensors="pt"
    )["input_ids"]
    tokens = tokens[:, :WINDOW]
    with torch.no_grad():
        expected = load_causal_lm(hf_folder)(tokens).logits
    logits = core_logits(load_core(checkpoint) if core is None else core, tokens)
    difference = (expected - logits).abs().max().item()
    spread, equal = expected.std().item(), same_weights(hf_folder, checkpoint)
    return Parity(difference, spread, tokens.numel(), equal)


def core_logits(core: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Computes logits [batch, sequence, vocabulary] of a Megatron model at TP=PP=1, in float32."""
    import torch

    core.float().eval()
    core.config.params_dtype = torch.float32
    tokens = tokens.to(next(core.parameters()).device)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None].expand_as(tokens)
    with torch.no_grad():
        logits: torch.Tensor = core(tokens, positions, None).cpu()
    return logits


def same_weights(hf_folder: Path, checkpoint: Path) -> bool:
    """Returns whether a checkpoint has exactly the weights of a folder."""
    import torch

    source = Weights(hf_folder)
    names = source.names()
    for name, tensor in hf_weights(checkpoint):
        names.discard(name)
        if not torch.equal(source.read(name), tensor):
            return False
    # A folder may also store a tied head, and old ones inv_freq buffers, which are not weights.
    return not {n for n in names if n != HEAD and not n.endswith(ROTARY_BUFFER)}


def verify(first: Path, second: Path) -> Parity:
    """Compares a Hugging Face folder and a NeMo checkpoint (directory or file), in either order."""
    is_nemo = [path.is_file() or (path / nemo.CONTEXT).is_dir() for path in (first, second)]
    if is_nemo[0] == is_nemo[1]:
        raise RecipeError(
            "verify compares a Hugging Face folder with a NeMo checkpoint; got two of a kind.",
            "give one of each",
        )
    folder, packed = (second, first) if is_nemo[0] else (first, second)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = nemo.open_checkpoint(packed, Path(scratch))
        return compare(folder, checkpoint)


def load_core(checkpoint: Path, model: Any = None) -> torch.nn.Module:
    """Builds and loads a checkpoint's Megatron model in this process, in float32.

    Args:
        checkpoint: NeMo checkpoint directory.
        model: NeMo model to build, instead of the one in the checkpoint's context.
    """
    import torch

    nemo.initialize(nemo.Parallelism())
    model = nemo.restore_model(checkpoint) if model is None else model
    core = nemo.build_core(model, nemo.Parallelism(), torch.float32)
    family = FAMILIES[nemo.architecture_of(checkpoint).hf_architecture]
    parameters = {family.canonical_name(name): p for name, p in core.named_parameters()}
    for name, tensor in nemo.read_weights(checkpoint):
        parameters.pop(name).data.copy_(tensor)
    if parameters:
        raise RecipeError(f"{checkpoint} has no {', '.join(parameters)}.", "it is incomplete")
    return core
