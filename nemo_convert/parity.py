"""Parity gates: check that a converted model has the same weights and logits.

The models of NeMo and transformers must each agree with the plain PyTorch forward pass of
``reference``. It is not enough that they agree with each other: both read configs with the same
version of transformers, so they may share an error.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_convert import nemo
from nemo_convert.architecture import Architecture
from nemo_convert.convert import hf_weights, require_matching_config, require_sound
from nemo_convert.families import FAMILIES
from nemo_convert.generation_config import require_loadable_generation_config
from nemo_convert.hf import Weights, load_causal_lm
from nemo_convert.hf_config import as_transformers_4, read_architecture
from nemo_convert.preflight import HEAD, require_convertible
from nemo_convert.reference import reference_logits
from recipes.core.errors import RecipeError
from recipes.core.files import read_json

if TYPE_CHECKING:
    import torch

LOGITS_TOLERANCE = 1e-3
"""Largest logit difference in float32, as a fraction of the logits' standard deviation. Rounding
gives about 1e-5, a wrong conversion 0.1 or more."""
NUM_TOKENS = 128
"""Number of tokens of ``TEXT`` that are compared, unless the model has fewer positions."""
ADJACENT = 64
"""Number of first tokens, which have the positions 0, 1, 2, … Later positions have gaps."""
LAST_POSITION = 2047
"""Position of the last token, unless the model has fewer positions."""
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
    """Comparison of NeMo's and transformers' models with the reference on the same tokens."""

    nemo_difference: float
    """Largest difference of a logit between NeMo and the reference."""
    transformers_difference: float
    """Largest difference of a logit between transformers and the reference."""
    logits_std: float
    """Standard deviation of the reference's logits."""
    tokens: int
    """Number of compared tokens."""
    different_weight: str | None
    """Name of a weight that is missing in the folder or in the checkpoint, or whose values differ;
    ``None`` if all weights are equal."""

    @property
    def max_logit_difference(self) -> float:
        """The larger of the two differences; NaN if one of them is NaN."""
        return float(np.maximum(self.nemo_difference, self.transformers_difference))

    def require(self, what: str) -> Parity:
        """Returns this comparison; raises ``RecipeError`` if a weight or the logits differ.

        ``what`` names the compared models in the message.
        """
        if self.different_weight is not None:
            raise RecipeError(
                f"parity gate failed: {what}: {self.different_weight} differs or is "
                "missing in one of the models.",
                "do not use this checkpoint; convert the source again",
            )
        tolerance = LOGITS_TOLERANCE * self.logits_std
        differences = {"NeMo": self.nemo_difference, "transformers": self.transformers_difference}
        for library, difference in differences.items():
            if not difference <= tolerance:  # also catches NaN
                raise RecipeError(
                    f"parity gate failed: {what}: logits of {library} differ by {difference:.2e} "
                    f"from the reference (allowed: {tolerance:.0e}, {LOGITS_TOLERANCE:.0e} of "
                    "the reference's standard deviation).",
                    f"do not use this checkpoint: {library}'s model does not match config.json",
                )
        return self


def compare(hf_folder: Path, checkpoint: Path, core: Any = None) -> Parity:
    """Compares a Hugging Face folder with a NeMo checkpoint, with one model in memory at a time.

    Logits are compared on ``TEXT`` in float32. Weights are read back from the checkpoint's files
    and compared for equality. This covers embedding rows of tokens that are not in ``TEXT``.
    ``core`` is the Megatron model that computes NeMo's logits; by default, the checkpoint's model.
    """
    import torch
    from transformers import AutoTokenizer

    require_matching_config(checkpoint)
    config = as_transformers_4(read_json(hf_folder / "config.json"), str(hf_folder))
    tokenizer = AutoTokenizer.from_pretrained(nemo.side_folder(checkpoint), trust_remote_code=False)
    num_positions = read_architecture(config, str(hf_folder)).max_position_embeddings
    all_tokens = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    tokens = all_tokens[:, : min(NUM_TOKENS, num_positions)]
    positions = spread_positions(tokens.shape[1], min(LAST_POSITION, num_positions - 1))
    weights = Weights(hf_folder)
    with torch.no_grad():
        expected = reference_logits(config, weights.read, tokens, positions)
        transformers_logits = load_causal_lm(hf_folder)(
            tokens,
            # Without a mask, transformers takes each jump of the positions for a new document.
            attention_mask=torch.ones_like(tokens),
            position_ids=positions[None],
        ).logits
    # No variable holds a loaded model, so its memory is free before the weights are compared.
    nemo_logits = core_logits(core or load_core(checkpoint), tokens, positions)
    return Parity(
        nemo_difference=(expected - nemo_logits).abs().max().item(),
        transformers_difference=(expected - transformers_logits).abs().max().item(),
        logits_std=expected.std().item(),
        tokens=tokens.numel(),
        different_weight=find_different_weight(weights, checkpoint),
    )


def spread_positions(num_tokens: int, last: int) -> torch.Tensor:
    """Returns an increasing RoPE position for each token [num_tokens].

    The first ``ADJACENT`` positions are consecutive. The later ones are spaced evenly up to
    ``last``. So a few tokens test RoPE at the positions of a long text.
    """
    import torch

    if num_tokens > last:  # no position up to ``last`` can be skipped
        return torch.arange(num_tokens)
    num_near = min(ADJACENT, num_tokens)
    # linspace starts at the last near position, which [1:] drops.
    far = torch.linspace(num_near - 1, last, num_tokens - num_near + 1)[1:].round().long()
    return torch.cat([torch.arange(num_near), far])


def core_logits(
    core: torch.nn.Module, tokens: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes logits [batch, sequence, vocabulary] of a Megatron model at TP=PP=1, in float32.

    Args:
        core: Megatron's ``GPTModel``. Its weights stay in float32 afterwards.
        tokens: Token ids [batch, sequence].
        positions: RoPE position of each token [sequence]; by default 0, 1, 2, …
    """
    import torch

    core.float().eval()
    core.config.params_dtype = torch.float32
    tokens = tokens.to(next(core.parameters()).device)
    if positions is None:
        positions = torch.arange(tokens.shape[1])
    with torch.no_grad(), _rope_at(core, positions):
        logits: torch.Tensor = core(tokens, positions[None].to(tokens), None).cpu()
    return logits


@contextmanager
def _rope_at(core: Any, positions: torch.Tensor) -> Iterator[None]:
    """Temporarily makes a model apply RoPE at increasing ``positions`` [sequence].

    Megatron ignores ``position_ids`` for RoPE. Its angles [sequence, 1, 1, dim] are always those of
    positions 0, 1, 2, …
    """

    def angles_at_positions(rope: Any, arguments: Any, angles: torch.Tensor) -> torch.Tensor:
        """Returns the angles that replace ``angles``, the output of the RoPE module."""
        # A direct call of forward() runs no hooks, so this hook does not call itself.
        all_angles = rope.forward(int(positions[-1]) + 1)  # of positions 0 to the last
        return all_angles[positions.to(angles.device)]

    hook = core.rotary_pos_emb.register_forward_hook(angles_at_positions)
    try:
        yield
    finally:
        hook.remove()


def find_different_weight(folder_weights: Weights, checkpoint: Path) -> str | None:
    """Finds a weight that the folder or the checkpoint lacks, or whose values differ.

    Returns:
        The weight's Hugging Face name; ``None`` if all weights are equal.
    """
    import torch

    uncompared = folder_weights.names()
    for name, tensor in hf_weights(checkpoint):
        if name not in uncompared:
            return name
        uncompared.remove(name)
        original = folder_weights.read(name)
        # A conversion may cast weights to float32, which is exact. So both get the wider dtype.
        wider = torch.promote_types(original.dtype, tensor.dtype)
        if not torch.equal(original.to(wider), tensor.to(wider)):
            return name
    return min(uncompared - {HEAD}, default=None)  # a checkpoint never stores a tied head


def verify(first: Path, second: Path) -> Parity:
    """Compares a Hugging Face folder and a NeMo checkpoint (directory or file), in either order.

    Raises:
        RecipeError: One of the two is damaged, or they have different sizes.
    """
    for path in (first, second):
        if not path.exists():
            raise RecipeError(f"{path} does not exist.", "correct the path")
    # A NeMo checkpoint is a .nemo file, or a directory with context/ and weights/.
    is_nemo = [
        path.is_file() or (path / nemo.CONTEXT).is_dir() or (path / nemo.WEIGHTS).is_dir()
        for path in (first, second)
    ]
    if is_nemo[0] == is_nemo[1]:
        raise RecipeError(
            "verify compares a Hugging Face folder with a NeMo checkpoint; got two "
            f"{'NeMo checkpoints' if is_nemo[0] else 'Hugging Face folders'}.",
            "give one Hugging Face folder and one NeMo checkpoint",
        )
    folder, nemo_path = (second, first) if is_nemo[0] else (first, second)
    require_convertible(str(folder))
    require_loadable_generation_config(folder)
    nemo.import_nemo()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = nemo.open_checkpoint(nemo_path, Path(scratch))
        require_sound(checkpoint)
        _require_same_sizes(folder, nemo_path, nemo.architecture_of(checkpoint))
        return compare(folder, checkpoint)


def _require_same_sizes(folder: Path, checkpoint: Path, arch: Architecture) -> None:
    """Refuses a folder whose ``config.json`` has other sizes than ``arch``, the checkpoint's."""
    sizes = read_architecture(read_json(folder / "config.json"), str(folder)).as_dict()
    # Only the parity gate checks these two, which do not change the size of a weight.
    ignored = ("max_position_embeddings", "tied_embeddings")
    differences = [
        f"{name}={sizes[name]} and {size}"
        for name, size in arch.as_dict().items()
        if name not in ignored and sizes[name] != size
    ]
    if differences:
        what = f"{folder} and {checkpoint} are different models: {', '.join(differences)}."
        raise RecipeError(what, "give the folder and the checkpoint of one model")


def load_core(checkpoint: Path, model: Any = None) -> torch.nn.Module:
    """Builds and loads a checkpoint's Megatron model in this process, in float32.

    ``model`` is the NeMo model to build; by default, the one in the checkpoint's context.
    """
    import torch

    nemo.initialize(nemo.Parallelism())
    model = nemo.restore_model(checkpoint) if model is None else model
    core = nemo.build_core(model, nemo.Parallelism(), torch.float32)
    family = FAMILIES[nemo.architecture_of(checkpoint).hf_architecture]
    parameters = {family.transformer_engine_name(name): p for name, p in core.named_parameters()}
    for name, tensor in nemo.read_weights(checkpoint):
        parameters.pop(name).data.copy_(tensor)
    if parameters:  # the remaining ones, which are not in the checkpoint
        raise RecipeError(
            f"{checkpoint} has no {', '.join(parameters)}.", "convert the model again"
        )
    return core
