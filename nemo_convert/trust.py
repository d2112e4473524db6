"""Refuses NeMo checkpoints that would run unknown code when they are opened.

``context/io.json`` names Python objects, which NeMo calls with arguments from the same file.
``weights/.metadata`` is a pickle. It names functions that are called when the pickle is read.
Checkpoints of this repository name only objects that are listed in this module. A checkpoint that
names other objects is refused, unless the user trusts its author.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import EnumType
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError
from recipes.core.files import STORAGE_FIXES, read_json

TRUST = "TRUST_CHECKPOINTS"
"""Environment variable. With the value ``1``, the user trusts all checkpoints."""
WEIGHTS_FIX = f"get the weights as safetensors; or, if you trust the author, set {TRUST}=1"
CONTEXT_OBJECTS = frozenset(
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
"""Objects that ``context/io.json`` may name, besides ``MODEL_NAMES`` and ``DTYPE_NAMES``."""
MODEL_NAMES = re.compile(r"nemo\.collections\.llm\.gpt\.model\.\w+\.\w+(Config\w*|Model)")
"""Matches NeMo's language models and their configs."""
DTYPE_NAMES = re.compile(r"torch\.(bfloat16|float16|float32)")
METADATA_OBJECTS = frozenset(
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
"""Objects that ``weights/.metadata`` may name, besides ``DTYPE_NAMES``."""


def _trusts_checkpoints() -> bool:
    return os.environ.get(TRUST) == "1"


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Raises a ``RecipeError`` instead of an error that a damaged file or folder causes.

    Damaged content can raise any error in the libraries that read it. Errors of the disk, such as
    a refused permission, are not replaced.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in STORAGE_FIXES:
            raise
        # torch adds advice after the reason: "This is an …" or "In PyTorch …". It is removed.
        reason, *_ = re.split(r"\n|\. This is an|\. In PyTorch", str(error))
        what = f"{path} is missing or damaged: {type(error).__name__}: {reason}"
        raise RecipeError(what, "copy or convert the checkpoint again") from error


def require_known_context(io_json: Path) -> None:
    """Refuses a ``context/io.json`` that names unknown objects, unless checkpoints are trusted."""
    names = set(_named_objects(read_json(io_json)))
    unknown = [
        name
        for name in sorted(names - CONTEXT_OBJECTS)
        if not (MODEL_NAMES.fullmatch(name) or DTYPE_NAMES.fullmatch(name))
    ]
    if unknown and not _trusts_checkpoints():
        raise RecipeError(
            f"{io_json} names {', '.join(unknown[:5])}: opening it would run that code.",
            "convert only the weights with python -m nemo_convert to-hf SRC DST, which does not "
            "open the context, and set model.hf_path=DST; or, if you trust the author, set "
            f"{TRUST}=1 (+cluster.env.{TRUST}='1' for stages)",
        )


def _named_objects(value: Any) -> Iterator[str]:
    """Yields the names of all Python objects in a value of ``io.json``."""
    if isinstance(value, dict):
        if value.get("type") == "pyref":  # represents a Python object
            yield f"{value['module']}.{value['name']}"
        for item in value.values():
            yield from _named_objects(item)
    elif isinstance(value, list):
        for item in value:
            yield from _named_objects(item)


def require_no_remote_code(config: Any, checkpoint: Path) -> None:
    """Refuses a context that sets ``trust_remote_code``, unless checkpoints are trusted.

    Args:
        config: Fiddle's config of the model, not built yet. Checking the argument labels in
            ``io.json`` would not suffice: Fiddle reads argument names from its other fields.
        checkpoint: Path of the checkpoint, for the message.
    """
    from fiddle import Buildable
    from fiddle.daglish import iterate

    for value, _ in iterate(config):
        arguments = value.__arguments__ if isinstance(value, Buildable) else {}
        if arguments.get("trust_remote_code") and not _trusts_checkpoints():
            raise RecipeError(
                f"{checkpoint} sets trust_remote_code: opening it would run code in it.",
                "use a checkpoint without this argument; or, if you trust the author, set "
                f"{TRUST}=1",
            )


def read_metadata(weights: Path) -> Any:
    """Reads ``.metadata`` in the folder ``weights`` of a torch_dist checkpoint.

    Raises:
        RecipeError: The metadata is absent or damaged. Or it names an unknown object, and
            checkpoints are not trusted.
    """
    path = weights / ".metadata"
    with explain_damage(path), path.open("rb") as file:
        return _MetadataUnpickler(file, path).load()


def require_tensors(metadata: Any, keys: Iterable[str], weights: Path) -> None:
    """Refuses damaged metadata and, unless checkpoints are trusted, weights stored as objects.

    PyTorch's reader unpickles a Python object without restrictions, so it could run any code.

    Args:
        metadata: What ``read_metadata`` returned.
        keys: Keys of the weights that will be read. Keys that are not stored are ignored.
        weights: Folder of the checkpoint's weights, for the message.
    """
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    with explain_damage(weights / ".metadata"):
        if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
            raise TypeError("it does not describe the weights of a checkpoint")
    for key in keys:
        stored = metadata.state_dict_metadata.get(key)
        is_object = stored is not None and type(stored) is not TensorStorageMetadata
        if is_object and not _trusts_checkpoints():
            what = f"{weights} stores {key} as a Python object: opening it could run code."
            raise RecipeError(what, WEIGHTS_FIX)


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler that imports only objects of ``METADATA_OBJECTS`` and dtypes."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Imports a known object. Refuses other objects, unless checkpoints are trusted."""
        full_name = f"{module}.{name}"
        if full_name == "builtins.getattr":  # Python 3.11.2 pickles enums as getattr(CLASS, NAME)
            return self._enum_member
        is_known = full_name in METADATA_OBJECTS or DTYPE_NAMES.fullmatch(full_name)
        if is_known or _trusts_checkpoints():
            return super().find_class(module, name)
        raise self._error(full_name)

    def _enum_member(self, enum: object, name: str) -> Any:
        """Replaces ``getattr``, which could return any attribute. Returns members of enums only."""
        if isinstance(enum, EnumType) and name in enum.__members__:
            return enum[name]
        raise self._error("builtins.getattr")

    def _error(self, name: str) -> RecipeError:
        what = f"{self._path} names {name}: opening it would run that code."
        return RecipeError(what, WEIGHTS_FIX)
