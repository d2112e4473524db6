"""What opening a NeMo checkpoint would run, looked at before it is opened.

``context/io.json`` names Python objects by module and name, and NeMo calls them with the arguments
that stand beside them. ``weights/.metadata`` is a pickle, which names what it calls. So whoever
made a checkpoint can run anything as whoever opens it. What our own checkpoints name is known and
harmless; anything else is refused, unless the user says that its maker is trusted.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError

TRUST = "TRUST_CHECKPOINTS"
"""Environment variable: with ``1``, checkpoints are opened whatever they name."""
KNOWN = frozenset(
    (
        "builtins.dict",
        "builtins.list",
        "builtins.tuple",
        "fiddle._src.config.BuildableTraverserMetadata",
        "fiddle._src.config.Config",
        "megatron.core.optimizer.optimizer_config.OptimizerConfig",
        "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
        "nemo.lightning.io.artifact.hf_auto.from_pretrained",
        "nemo.lightning.io.pl.TrainerContext",
        "nemo.lightning.pytorch.optim.lr_scheduler.CosineAnnealingScheduler",
        "nemo.lightning.pytorch.optim.megatron.MegatronOptimizerModule",
        "nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy",
        "nemo.lightning.pytorch.trainer.Trainer",
        "transformers.generation.configuration_utils.GenerationConfig",
    )
)
"""What contexts name, beside the classes of models."""
MODELS = re.compile(r"nemo\.collections\.llm\.gpt\.model\.\w+\.\w+(Config\w*|Model)")
TYPES = re.compile(r"torch\.(bfloat16|float16|float32)")
DESCRIPTION = frozenset(
    (
        "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
        "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
        "pathlib.PosixPath",
        "torch.Size",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
        "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
        "torch.distributed.checkpoint.metadata.Metadata",
        "torch.distributed.checkpoint.metadata.MetadataIndex",
        "torch.distributed.checkpoint.metadata.StorageMeta",
        "torch.distributed.checkpoint.metadata.TensorProperties",
        "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.planner.TensorWriteData",
        "torch.distributed.checkpoint.planner.WriteItem",
        "torch.distributed.checkpoint.planner.WriteItemType",
        "torch.serialization._get_layout",
    )
)
"""What descriptions of weights name."""


def require_known_context(io_json: Path) -> None:
    """Refuses a context that names what no model of ours has.

    Raises:
        RecipeError: It does, and ``TRUST`` is not set.
    """
    described = json.loads(io_json.read_text(encoding="utf-8"))
    unknown = sorted(name for name in set(_names(described)) if not _is_known(name))
    if unknown and os.environ.get(TRUST) != "1":
        raise RecipeError(
            f"{io_json} names {', '.join(unknown[:5])}: opening it would call that, as you.",
            "convert it by its data alone, python -m nemo_convert to-hf SRC DST, and set "
            f"model.hf_path=DST; or, if you trust who made it, set {TRUST}=1 "
            f"(+cluster.env.{TRUST}='1' for stages)",
        )


def _is_known(name: str) -> bool:
    return name in KNOWN or bool(MODELS.fullmatch(name) or TYPES.fullmatch(name))


def _names(value: Any) -> Iterator[str]:
    """Everything that a serialised context names, and code that it asks a tokenizer to bring."""
    if isinstance(value, dict):
        if value.get("type") == "pyref":
            yield f"{value['module']}.{value['name']}"
        for key, item in value.items():
            if key != "paths":
                yield from _names(item)
    elif isinstance(value, list):
        if len(value) == 2 and value[0] == "Attr(name='trust_remote_code')":
            yield from ["trust_remote_code"] if _leaf(value[1]) else []
        for item in value:
            yield from _names(item)


def _leaf(value: Any) -> bool:
    return not isinstance(value, dict) or value.get("value") not in (None, False)


def read_description(weights: Path) -> Any:
    """The metadata of a torch_dist checkpoint, as torch reads it, but for what it may name.

    Raises:
        RecipeError: It names what no description of weights needs, and ``TRUST`` is not set.
    """
    with (weights / ".metadata").open("rb") as file:
        return _Description(file, weights / ".metadata").load()


class _Description(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Finds what is known."""
        named = f"{module}.{name}"
        if named in DESCRIPTION or TYPES.fullmatch(named) or os.environ.get(TRUST) == "1":
            return super().find_class(module, name)
        raise RecipeError(
            f"{self._path} names {named}: opening it would call that, as you.",
            f"ask for the weights as safetensors; or, if you trust who made it, set {TRUST}=1",
        )
