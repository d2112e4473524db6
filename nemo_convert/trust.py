"""Refuses NeMo checkpoints that would run unknown code when they are opened.

``context/io.json`` names Python objects, which NeMo calls with arguments from the same file.
``weights/.metadata`` is a pickle, which also names what it calls. Checkpoints of this repository
name only what is listed here. Others are refused, unless the user trusts their author.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError
from recipes.core.files import read_json

TRUST = "TRUST_CHECKPOINTS"
"""Environment variable: with ``1``, all checkpoints are opened."""
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
"""Objects that contexts name, in addition to the classes of models."""
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
"""Objects that ``weights/.metadata`` names."""


def require_known_context(io_json: Path) -> None:
    """Refuses a context that names unknown objects.

    Raises:
        RecipeError: It names some, and ``TRUST`` is not set.
    """
    names = set(_names(read_json(io_json)))
    unknown = sorted(n for n in names - KNOWN if not MODELS.fullmatch(n) and not TYPES.fullmatch(n))
    if unknown and os.environ.get(TRUST) != "1":
        raise RecipeError(
            f"{io_json} names {', '.join(unknown[:5])}: opening it would call that, as you.",
            "convert it by its data alone, python -m nemo_convert to-hf SRC DST, and set "
            f"model.hf_path=DST; or, if you trust who made it, set {TRUST}=1 "
            f"(+cluster.env.{TRUST}='1' for stages)",
        )


def _names(value: Any) -> Iterator[str]:
    """Yields the objects that a context names, and ``trust_remote_code`` where it is on."""
    if isinstance(value, dict):
        if value.get("type") == "pyref":
            yield f"{value['module']}.{value['name']}"
        for key, item in value.items():
            if key != "paths":
                yield from _names(item)
    elif isinstance(value, list):
        if len(value) == 2 and value[0] == "Attr(name='trust_remote_code')":
            yield from ["trust_remote_code"] if _is_on(value[1]) else []
        for item in value:
            yield from _names(item)


def _is_on(leaf: Any) -> bool:
    return not isinstance(leaf, dict) or leaf.get("value") not in (None, False)


def read_description(weights: Path) -> Any:
    """Reads the metadata of a torch_dist checkpoint.

    Raises:
        RecipeError: It names unknown objects, and ``TRUST`` is not set.
    """
    with (weights / ".metadata").open("rb") as file:
        return _Description(file, weights / ".metadata").load()


class _Description(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Imports a known object."""
        full_name = f"{module}.{name}"
        if full_name in DESCRIPTION or TYPES.fullmatch(full_name) or os.environ.get(TRUST) == "1":
            return super().find_class(module, name)
        raise RecipeError(
            f"{self._path} names {full_name}: opening it would call that, as you.",
            f"ask for the weights as safetensors; or, if you trust who made it, set {TRUST}=1",
        )
